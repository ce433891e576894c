"""What a reward is given, what it answers, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The names that a batch function can ask for besides columns; a column cannot carry one of them.
BATCH_NAMES = ("prompts", "completions", "continuations", "prompt_ids", "completion_ids")


class RewardError(ValueError):
    """A reward function that cannot be used, or that failed.

    Attributes:
        function: Name of the reward function.
        row: First row of the batch at fault, None when the whole batch is.
    """

    def __init__(self, message: str, *, function: str | None = None, row: int | None = None):
        super().__init__(message)
        self.function, self.row = function, row


@dataclass(frozen=True)
class RewardInputs:
    """B responses to be scored.

    Attributes:
        prompts: Texts, as the user wrote them. B strings.
        completions: Texts of the responses, without special tokens. B strings.
        prompt_ids: Tokens of each prompt under the policy's tokenizer. B lists of ints.
        completion_ids: Tokens of each response, EOS included where it ended by one, no padding. B lists of ints.
        columns: Extra columns of the prompts, by name. Each of B values.
        continuations: The responses as they go on from their prompts: prompt + continuation is the whole text. Many
            tokenizers drop the space before a response that is decoded by itself, so "the lever" + "is strong" would be
            "the leveris strong". B strings, or None when nobody knows.

    Raises:
        ValueError: If the lengths differ or a column takes a reserved name.
    """

    prompts: list[str]
    completions: Sequence[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    continuations: Sequence[str] | None = None

    def __post_init__(self) -> None:
        batch = {name: getattr(self, name) for name in BATCH_NAMES if getattr(self, name) is not None}
        for name, values in [*batch.items(), *self.columns.items()]:
            if len(values) != len(self.prompts):
                raise ValueError(
                    f"{name} must hold one value per prompt, got {len(values)} for {len(self.prompts)} prompts"
                )
        check_column_names(self.columns)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> RewardInputs:
        """The given rows, in the given order."""
        return RewardInputs(
            prompts=[self.prompts[row] for row in rows],
            completions=[self.completions[row] for row in rows],
            prompt_ids=[self.prompt_ids[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            continuations=None if self.continuations is None else [self.continuations[row] for row in rows],
        )

    def describe(self, row: int) -> str:
        """One row in words, shortened, for error messages."""
        return f"row {row} (prompt {_shorten(self.prompts[row])}, response {_shorten(self.completions[row])})"


def check_column_names(names: Iterable[str]) -> None:
    """Refuse columns under a name that rewards know as something else."""
    for name in names:
        if name in BATCH_NAMES:
            raise ValueError(
                f"a column cannot be named {name!r}: rewards receive the batch's own {name} under that name"
            )


def _shorten(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


@dataclass(frozen=True)
class Scores:
    """What a reward says of B responses.

    Attributes:
        total: Score of each response. Shape (B,), float64, finite.
        terms: The ledger: what each term contributed, weight included. Each of shape (B,), float64; NaN where the term
            did not apply, which counts as 0. The terms sum to ``total``.
    """

    total: np.ndarray
    terms: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        for row, total in enumerate(self.total.tolist()):
            parts = [part for part in (float(term[row]) for term in self.terms.values()) if not math.isnan(part)]
            tolerance = 1e-9 * max(
                1.0, math.fsum(map(abs, parts))
            )  # relative: float64 cannot do better for large scores
            assert abs(total - math.fsum(parts)) <= tolerance, (
                f"terms {parts} do not sum to the total {total} in row {row}"
            )


def sum_terms(terms: dict[str, np.ndarray]) -> np.ndarray:
    """Total of a ledger, (B,) float64: terms that did not apply (NaN) count as 0.

    Raises:
        RewardError: If a finite score times its weight, or the sum, is too large for a float.
    """
    with np.errstate(over="ignore"):  # refused below, with a better message
        total = np.nansum(np.stack(list(terms.values())), axis=0)
    if not np.isfinite(total).all():
        row = int(np.flatnonzero(~np.isfinite(total))[0])
        raise RewardError(
            f"the terms {', '.join(terms)} sum to {total[row]} in row {row}; use smaller weights or clip them", row=row
        )
    return total
