"""Checks of what a reward function returned: one finite number per response, and nothing that merely looks like it."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np


class BadOutput(Exception):
    """A broken rule, in words that continue "reward function 'f' returned ...", and the first row that breaks it."""

    def __init__(self, what: str, row: int | None = None):
        super().__init__(what)
        self.what, self.row = what, row


def to_score(value: Any) -> float:
    """One finite number from a Python, numpy or torch scalar.

    Raises:
        BadOutput: For anything else: bool, string, None, NaN, infinity, anything with a shape.
    """
    if hasattr(value, "detach"):  # a torch tensor, recognised without importing torch
        value = value.detach().cpu()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        raise BadOutput(f"the bool {value}; a score is a number, write float(...)")
    if isinstance(value, (str, bytes)):
        raise BadOutput(f"the string {value[:40]!r}; a score is a number")
    if value is None:
        raise BadOutput("None (is a `return` missing?); a score is a number")
    if not isinstance(value, numbers.Real):
        shape = getattr(value, "shape", None)
        what = f"a {type(value).__name__}" if shape is None else f"a {type(value).__name__} of shape {tuple(shape)}"
        raise BadOutput(f"{what}; a score is a single number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadOutput(f"{number}; a score must be finite")
    return number


def to_scores(values: Any, num_rows: int, *, allow_none: bool, per: str = "response") -> np.ndarray:
    """One number per row from a list, tuple, numpy array or torch tensor of exactly that length.

    Nothing is broadcast: a single number, or a list of one, for more responses is refused.

    Args:
        values: What the function returned.
        num_rows: B.
        allow_none: Whether an element may be None, "this reward does not apply here".
        per: What a row is, for messages.

    Returns:
        Shape (B,), float64, NaN where None was returned.

    Raises:
        BadOutput: With the first row that breaks the rule.
    """
    expected = f"expected a list of {num_rows} numbers, one per {per}"
    if values is None:
        raise BadOutput(f"None (is a `return` missing?); {expected}")
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.dtype.is_complex or str(values.dtype) == "torch.bool":
            values = values.tolist()  # as float64 they would pass for numbers; element by element they are refused
        else:
            values = values.double().numpy()  # float64 first: numpy has no bfloat16
    elif not isinstance(values, (list, tuple, str, bytes, dict, set, numbers.Number)) and hasattr(values, "__array__"):
        values = np.asarray(values)
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise BadOutput(f"an array of shape {values.shape}; {expected}")
    elif not isinstance(values, (list, tuple)):
        shown = f" ({values!r})" if isinstance(values, (numbers.Number, str)) and len(repr(values)) <= 40 else ""
        raise BadOutput(f"a {type(values).__name__}{shown}; {expected}")
    if len(values) != num_rows:
        raise BadOutput(f"{len(values)} values for {num_rows} {per}s; {expected}")
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
        scores = values.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise BadOutput(f"{scores[bad[0]]}; a score must be finite", int(bad[0]))
        return scores
    scores = np.empty(num_rows)
    for row, value in enumerate(values):
        try:
            scores[row] = math.nan if allow_none and value is None else to_score(value)
        except BadOutput as error:
            raise BadOutput(error.what, row) from None
    return scores


def to_token_scores(values: Any, lengths: list[int]) -> list[np.ndarray | None]:
    """What a dense function returned: for each response one number per token, or None where it does not apply.

    Raises:
        BadOutput: With the first row that breaks the rule.
    """
    if not isinstance(values, (list, tuple)) or len(values) != len(lengths):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise BadOutput(
            f"{got}; a dense reward returns a list of {len(lengths)} lists, one number per token of each response"
        )
    rows: list[np.ndarray | None] = []
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        try:
            rows.append(None if value is None else to_scores(value, length, allow_none=False, per="token"))
        except BadOutput as error:
            where = "" if error.row is None else f" (for token {error.row})"
            raise BadOutput(f"{error.what}{where}", row) from None
    return rows
