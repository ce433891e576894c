"""Numeric answers: the last number in a text, and whether it is the right one."""

from __future__ import annotations

import math
import numbers
import re
import unicodedata
from typing import Any

from .references import ReferenceReward, against_column
from .text import UNSPACED

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_VALUE = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
# A sign counts where nothing stands before it that one could subtract from; digits that follow a letter (H2O, B12) are a
# name. The values of a chain a/b/c are told apart later: two are a fraction, three a date.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![^\W{UNSPACED}])(?<![)\]}}])[-−+])?[$€£¥]?(?<![^\W_{UNSPACED}])(?P<chain>{_VALUE}(?:\s?/\s?{_VALUE})*)"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215f\u2189]")  # ¼ ½ ¾ ⅐ ... ↉


def numeric_answer(column: str = "answer", *, tolerance: float = 1e-6) -> ReferenceReward:
    """1 if the last number in the response is the answer, else 0; 0 also where there is no number.

    How numbers are read is said in :func:`last_number`.

    Args:
        column: Where the answers are: in each row a number, a text whose last number is the answer (as in GSM8K's
            "... #### 72"), a list of several, or None where there is none (the reward does not apply then).
        tolerance: Largest difference, relative to the answer or to 1, whichever is larger; >= 0.

    Raises:
        ValueError: If ``column`` cannot name a parameter, or ``tolerance`` is negative or not finite.

    Example:
        >>> numeric_answer()(["3 * 14 = 42.", "So it is 1,000 km", "no idea"], ["#### 42", 1000, 7])
        [1.0, 1.0, 0.0]
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real) or not 0 <= tolerance < math.inf:
        raise ValueError(f"numeric_answer: tolerance must be a finite number >= 0, got {tolerance!r}")

    def score(text: str, answers: list[float]) -> float:
        value = last_number(text)
        return float(value is not None and any(abs(value - a) <= tolerance * max(1.0, abs(a)) for a in answers))

    return against_column("numeric_answer", column, score, read=_answers)


def last_number(text: str) -> float | None:
    """The last number in a text, None where there is none.

    * The point is the decimal sign, and commas between groups of three digits are left out: "1,234.5" is 1234.5. Other
      commas separate numbers: the last one in "3,5" is 5.
    * A fraction is its value: "1/2" and ``\\frac{1}{2}`` are .5, "2 1/2" and "2½" are 2.5. A division by 0 is no number,
      and in a chain such as the date 3/4/2025 the last value counts.
    * A percent sign is a unit, like "$" or "km": "50%" is 50. So it equals the answers "50" and "50%" but not ".5".
    * "-" is a sign unless a letter, a digit or a bracket stands right before it: the last number in "7-4" is 4.
    * Digits of every script count ("４２"); digits right behind a letter ("H2O") do not. Powers in words of their own
      ("2 x 10^5", "2 million") are not computed.

    Example:
        >>> last_number("-$1,250.50 in all"), last_number("3 1/4 cups"), last_number("none")
        (-1250.5, 3.25, None)
    """
    if not text.isascii():
        text = _VULGAR_FRACTION.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), text)
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else _WIDE.get(c, c) for c in text)
    if "frac" in text:
        text = _LATEX_FRACTION.sub(r"\1/\2", re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text))
    found: float | None = None
    before: re.Match[str] | None = None
    for match in _NUMBER.finditer(text):
        parts = [float(part.replace(",", "")) for part in re.split(r"\s?/\s?", match["chain"])]
        value, negative = parts[-1], match["sign"] in ("-", "−")
        if len(parts) == 2:
            if parts[1] == 0:
                continue
            value = parts[0] / parts[1]
            if before is not None and match["sign"] is None and 0 < value < 1:
                if before["chain"].isdecimal() and text[before.end() : match.start()] == " ":
                    value, negative = float(before["chain"]) + value, before["sign"] in ("-", "−")
        found, before = (-value if negative else value), match
    return found


# What else Chinese and Japanese text writes at full width; its comma separates clauses and is left alone.
_WIDE = {"．": ".", "－": "-", "／": "/", "＄": "$"}


def _answers(cell: Any, where: str) -> list[float]:
    """The answers in one cell.

    Raises:
        ValueError: If one is no number and holds none.
    """
    cells = cell if isinstance(cell, (list, tuple)) and len(cell) else [cell]
    answers = []
    for answer in cells:
        number = last_number(answer) if isinstance(answer, str) else answer
        if isinstance(number, bool) or not isinstance(number, numbers.Real) or not math.isfinite(number):
            raise ValueError(f"{where} must hold a number, a text with a number in it or a list of these, got {cell!r}")
        answers.append(float(number))
    return answers
