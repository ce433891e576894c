"""The numbers of the live panel, in words."""

from __future__ import annotations

import threading
import time
from typing import Any

from rlhf_gym.feedback.summary import Habits, Summary, summarise
from rlhf_gym.intervals import Estimate

from .labelling import Labelling

SHARE_OF_TIME = 0.05
KINDS = {
    "comparison": "comparisons",
    "rating": "ratings",
    "correction": "corrections",
    "flag": "unsafe",
    "skip": "skipped",
    "undo": "undone",
}


class Panel:
    """Computes the numbers anew when somebody looks, but not so often that those who judge wait for it."""

    def __init__(self, labelling: Labelling) -> None:
        self._labelling = labelling
        self._lock = threading.Lock()
        self._summary: Summary | None = None
        self._of: Any = None
        self._took = self._at = 0.0

    def values(self) -> dict[str, Any]:
        """What the template shows."""
        full, part = self._labelling.num_judged()
        summary = self._fresh()
        annotators = [*summary.annotators] + ([summary.everyone] if len(summary.annotators) != 1 else [])
        return {
            "counts": [
                ("questions", self._labelling.num_questions),
                ("complete", full),
                ("begun", part),
                *((label, summary.kinds.get(kind, 0)) for kind, label in KINDS.items()),
            ],
            "agreement": [
                *(
                    (f"Krippendorff’s α, {alpha.name}", number(alpha.estimate), alpha.num_units)
                    for alpha in summary.alphas
                ),
                *((f"Cohen’s κ, {kappa.name}", number(kappa.estimate), kappa.num_units) for kappa in summary.kappas),
            ],
            "annotators": [_row(habits) for habits in annotators if habits.num_comparisons or habits.median_seconds],
        }

    def _fresh(self) -> Summary:
        with self._lock:
            store = self._labelling.store
            state = (store.counts(), store.changes_by_others())
            resting = time.monotonic() - self._at < self._took * (1 / SHARE_OF_TIME - 1)
            if self._summary is None or (state != self._of and not resting):
                start = time.monotonic()
                self._summary = summarise(store, set(self._labelling.items))
                self._of, self._at = state, time.monotonic()
                self._took = self._at - start
            return self._summary


def _row(habits: Habits) -> dict[str, Any]:
    return {
        "name": habits.annotator,
        "comparisons": habits.num_comparisons,
        "left": share(habits.left),
        "longer": share(habits.longer),
        "gold": share(habits.gold),
        "seconds": "" if habits.median_seconds is None else f"{habits.median_seconds:.1f}",
    }


def share(estimate: Estimate | None) -> str:
    """A share with its interval, in per cent."""
    if estimate is None:
        return ""
    text = f"{estimate.mean:.0%}"
    return text if estimate.low is None else f"{text} [{estimate.low:.0%}, {estimate.high:.0%}]"


def number(estimate: Estimate) -> str:
    """A number with its interval; "not known" where nothing varies."""
    if estimate.mean != estimate.mean:
        return "not known: all answers are alike"
    text = f"{estimate.mean:.2f}"
    return text if estimate.low is None else f"{text} [{estimate.low:.2f}, {estimate.high:.2f}]"
