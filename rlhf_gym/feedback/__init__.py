"""Feedback: judgements of people, how far they agree, and what is learned about those who judge.

The page where they judge is `rlhf_gym.feedback.page`; see ``docs/human_feedback.md``.
"""

from .agreement import cohen_kappa, krippendorff_alpha, reliability_table
from .annotators import Choice, FittedAnnotator, SimulatedAnnotator, choices, fit_annotators
from .export import demonstrations, export, labels, preferences, ratings
from .items import Source, items_of_run, read_items
from .judgements import Comparison, Correction, Flag, Item, Judgement, Score, Skip, Undo
from .store import Event, FeedbackStore, KeyReused
from .summary import Summary, summarise

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
    "Source",
    "Summary",
    "Undo",
    "choices",
    "cohen_kappa",
    "demonstrations",
    "export",
    "fit_annotators",
    "items_of_run",
    "krippendorff_alpha",
    "labels",
    "preferences",
    "ratings",
    "read_items",
    "reliability_table",
    "summarise",
]
