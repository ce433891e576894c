"""Feedback: judgements of people, how far they agree, and what is learned about those who judge."""

from .agreement import cohen_kappa, krippendorff_alpha, reliability_table
from .export import demonstrations, export, preferences, ratings
from .judgements import Comparison, Correction, Flag, Item, Judgement, Score, Skip, Undo
from .store import Event, FeedbackStore, KeyReused

__all__ = [
    "Comparison",
    "Correction",
    "Event",
    "FeedbackStore",
    "Flag",
    "Item",
    "Judgement",
    "KeyReused",
    "Score",
    "Skip",
    "Undo",
    "cohen_kappa",
    "demonstrations",
    "export",
    "krippendorff_alpha",
    "preferences",
    "ratings",
    "reliability_table",
]
