"""Regular expressions over words, by derivatives: the state after a word is the expression that is still to match.

Expressions are tuples, so that equal ones are equal states: ("never",), ("empty",), ("any",), ("word", w),
("then", a, b), ("or", frozenset), ("star", a). Built through the functions below they are kept in a normal form in
which every expression has finitely many derivatives.

Source: Brzozowski 1964, "Derivatives of regular expressions".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

Expression = tuple[Any, ...]

NEVER: Expression = ("never",)
EMPTY: Expression = ("empty",)
ANY: Expression = ("any",)

_PIECES = re.compile(r"\s+|[()|*+?.]|(?:\\.|[^\s()|*+?.\\])+")


def then(first: Expression, second: Expression) -> Expression:
    """One after the other."""
    if NEVER in (first, second):
        return NEVER
    if first == EMPTY:
        return second
    if second == EMPTY:
        return first
    if first[0] == "then":
        return then(first[1], then(first[2], second))
    return ("then", first, second)


def either(choices: Iterable[Expression]) -> Expression:
    """Any one of them."""
    flat: set[Expression] = set()
    for choice in choices:
        flat |= choice[1] if choice[0] == "or" else {choice}
    flat.discard(NEVER)
    if len(flat) < 2:
        return flat.pop() if flat else NEVER
    return ("or", frozenset(flat))


def star(inner: Expression) -> Expression:
    """Any number of times, none included."""
    if inner in (NEVER, EMPTY):
        return EMPTY
    return inner if inner[0] == "star" else ("star", inner)


def nullable(expression: Expression) -> bool:
    """Whether it matches no word at all."""
    kind = expression[0]
    if kind == "then":
        return nullable(expression[1]) and nullable(expression[2])
    if kind == "or":
        return any(map(nullable, expression[1]))
    return kind in ("empty", "star")


def derivative(expression: Expression, word: str) -> Expression:
    """What must match the rest, once ``word`` has been read."""
    kind = expression[0]
    if kind == "any":
        return EMPTY
    if kind == "word":
        return EMPTY if expression[1] == word else NEVER
    if kind == "then":
        first, second = expression[1:]
        after = then(derivative(first, word), second)
        return either([after, derivative(second, word)]) if nullable(first) else after
    if kind == "or":
        return either(derivative(choice, word) for choice in expression[1])
    if kind == "star":
        return then(derivative(expression[1], word), expression)
    return NEVER


def parse(pattern: str) -> Expression:
    """Reads the notation of `rlhf_gym.exact.matches`.

    Raises:
        ValueError: Saying where it cannot be read.
    """
    pieces = [(match.group(), match.start()) for match in _PIECES.finditer(pattern) if not match.group().isspace()]
    if sum(map(len, _PIECES.findall(pattern))) != len(pattern):
        raise ValueError(f"pattern {pattern!r} ends with a backslash that nothing follows")
    expression, rest = _choices(pattern, pieces)
    if rest:
        raise ValueError(f"pattern {pattern!r}: nothing opens the ')' at position {rest[0][1]}")
    return expression


def _choices(pattern: str, pieces: list[tuple[str, int]]) -> tuple[Expression, list[tuple[str, int]]]:
    choices, rest = [], pieces
    while True:
        sequence, rest = _sequence(pattern, rest)
        choices.append(sequence)
        if not rest or rest[0][0] != "|":
            return either(choices), rest
        rest = rest[1:]


def _sequence(pattern: str, pieces: list[tuple[str, int]]) -> tuple[Expression, list[tuple[str, int]]]:
    parts: list[Expression] = []
    while pieces and pieces[0][0] not in ("|", ")"):
        (piece, position), pieces = pieces[0], pieces[1:]
        if piece == "(":
            inner, pieces = _choices(pattern, pieces)
            if not pieces:
                raise ValueError(f"pattern {pattern!r}: nothing closes the '(' at position {position}")
            parts.append(inner)
            pieces = pieces[1:]
        elif piece in ("*", "+", "?"):
            if not parts:
                raise ValueError(f"pattern {pattern!r}: nothing stands before the {piece!r} at position {position}")
            last = parts.pop()
            parts.append(either([EMPTY, last]) if piece == "?" else star(last))
            if piece == "+":
                parts[-1] = then(last, parts[-1])
        else:
            parts.append(ANY if piece == "." else ("word", re.sub(r"\\(.)", r"\1", piece)))
    expression = EMPTY
    for part in reversed(parts):
        expression = then(part, expression)
    return expression, pieces
