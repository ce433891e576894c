"""Feedback: judgements of people, how far they agree, and what is learned about those who judge."""

from .agreement import cohen_kappa, krippendorff_alpha, reliability_table

__all__ = [
    "cohen_kappa",
    "krippendorff_alpha",
    "reliability_table",
]
