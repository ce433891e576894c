"""Feedback: judgements of people, how far they agree, and what is learned about those who judge."""

from .agreement import cohen_kappa, krippendorff_alpha, reliability_table
from .annotators import Choice, FittedAnnotator, SimulatedAnnotator, choices, fit_annotators
from .export import demonstrations, export, preferences, ratings
from .judgements import Comparison, Correction, Flag, Item, Judgement, Score, Skip, Undo
from .store import Event, FeedbackStore, KeyReused

__all__ = [
    "Choice",
    "Comparison",
    "Correction",
    "Event",
    "FeedbackStore",
    "FittedAnnotator",
    "Flag",
    "Item",
    "Judgement",
    "KeyReused",
    "Score",
    "SimulatedAnnotator",
    "Skip",
    "Undo",
    "choices",
    "cohen_kappa",
    "demonstrations",
    "export",
    "fit_annotators",
    "krippendorff_alpha",
    "preferences",
    "ratings",
    "reliability_table",
]
