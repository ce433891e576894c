"""Where in a line of JSON a value stands. Only read when something is wrong, so that reading costs nothing more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
"""Keys and indices from the line's object down to a value: ``("messages", 2, "content")``."""

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|[^\s"{}\[\],:]+')


def positions(text: str) -> Iterator[tuple[Path, int]]:
    """Path and column of each value, in order. A key that stands twice in an object comes twice.

    Args:
        text: A line that is JSON, as far as it is read.

    Example:
        >>> list(positions('{"a": [1, {"b": 2}]}'))
        [((), 1), (('a',), 7), (('a', 0), 8), (('a', 1), 11), (('a', 1, 'b'), 17)]
    """
    path: list[Any] = []
    open_brackets: list[str] = []
    key_comes = False
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "}]":
            if open_brackets:
                open_brackets.pop(), path.pop()
            key_comes = False
        elif token == ",":
            key_comes = bool(open_brackets) and open_brackets[-1] == "{"
            if open_brackets and not key_comes:
                path[-1] += 1
        elif token == ":":
            continue
        elif key_comes:
            path[-1], key_comes = _text_of(token), False
        else:
            yield tuple(path), match.start() + 1
            if token in "{[":
                open_brackets.append(token)
                path.append(0 if token == "[" else "")
                key_comes = token == "{"


def column_of_value(text: str, path: Path) -> int:
    """Column of a value; that of the closest value around it where it is missing."""
    found = dict(positions(text))
    while path and path not in found:
        path = path[:-1]
    return found.get(path, 1)


def column_of_repeat(text: str) -> int:
    """Column of the first value whose key stood in its object before."""
    seen = set()
    for path, column in positions(text):
        if path in seen:
            return column
        seen.add(path)
    return 1


def column_of_token(text: str, token: str) -> int:
    """Column of a number or constant outside of the texts."""
    return next((match.start() + 1 for match in _TOKEN.finditer(text) if match[0] == token), 1)


def _text_of(token: str) -> str:
    try:
        return json.loads(token)
    except ValueError:  # a key with a broken escape: any name will do
        return token
