"""What whoever asks for judgements decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_gym.feedback.judgements import MAX_NAME, text_of

MAX_CRITERIA = 12
MAX_GUIDELINES = 100_000


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """How questions are asked."""

    criteria: tuple[str, ...] = ()
    """What each response is rated for, from 1 to 5, besides being compared."""
    guidelines: str = ""
    """Shown to annotators as plain text."""
    overlap: float = 1.0
    """People who judge each question, at least 1; at 1.2 every fifth question goes to two."""
    gold_rate: float = 0.1
    """Share of questions whose answer is known, where the items have such, in [0, 1]; each annotator gets them."""
    seed: int = 0
    """Of the order of questions and of what is shown left."""

    def __post_init__(self) -> None:
        if len(self.criteria) > MAX_CRITERIA or len(set(self.criteria)) != len(self.criteria):
            raise ValueError(f"criteria must be at most {MAX_CRITERIA} different names, got {self.criteria}")
        for name in self.criteria:
            text_of("a criterion", name, MAX_NAME)
        text_of("guidelines", self.guidelines)
        if len(self.guidelines) > MAX_GUIDELINES:
            raise ValueError(
                f"guidelines must have at most {MAX_GUIDELINES:,} characters, got {len(self.guidelines):,}"
            )
        if not (math.isfinite(self.overlap) and self.overlap >= 1):
            raise ValueError(f"overlap must be at least 1, got {self.overlap:g}")
        if not 0 <= self.gold_rate <= 1:
            raise ValueError(f"gold_rate must be in [0, 1], got {self.gold_rate:g}")
