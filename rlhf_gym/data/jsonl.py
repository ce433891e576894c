"""A strict reader of JSON Lines: one object on each line, and every fault with its line and column.

What Python's own reader lets through is refused here, because it changes or breaks the data later without a word: NaN and
numbers beyond float64 (no other JSON reader takes them), a key twice in an object (one of the values is lost), half of a
surrogate pair (cannot be written as UTF-8), the same id twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rlhf_gym.atomic import write_text

from .locate import column_of_repeat, column_of_token, column_of_value
from .problems import LIMIT, Problems

MAX_LINE_BYTES = 10 * 2**20
_BOM = b"\xef\xbb\xbf"
# First bytes of what is given by mistake; one problem then, and not one for each line.
_OTHER_FILES = {
    b"\xff\xfe": "this is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "this is UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "this is a gzip file; unpack it first",
    b"PK\x03\x04": "this is a zip file; unpack it first",
    b"PAR1": "this is a Parquet file; write it as JSON Lines first, for instance with datasets' to_json",
}
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {list: "an array", str: "a text", bool: "true or false", int: "a number", float: "a number"}


class Row(NamedTuple):
    """One object of a file."""

    line: int
    """From 1."""
    text: str
    """The line as it stands there, without its end."""
    value: dict[str, Any]


class _Refused(Exception):
    """A number or constant that is no JSON, or that no float64 holds."""


def read_jsonl(path: str | Path, *, limit: int = LIMIT) -> tuple[list[Row], Problems]:
    """All objects of a file, and all that is wrong with the other lines.

    A byte-order mark at the beginning, CRLF and empty lines are fine. An "id" is a text or an integer, on one line only.

    Args:
        path: A file in UTF-8.
        limit: Problems to list; further ones are counted.

    Returns:
        The rows without a problem, in order, and the problems.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    problems = Problems(str(path), limit)
    rows: list[Row] = []
    ids: dict[str, int] = {}
    with path.open("rb") as file:
        start = file.read(4)
        other = next((message for magic, message in _OTHER_FILES.items() if start.startswith(magic)), None)
        if other:
            problems.add(1, 1, other)
            return [], problems
        file.seek(len(_BOM) if start.startswith(_BOM) else 0)
        for number, raw in enumerate(_lines(file), start=1):
            text = _decode(raw, number, problems)
            if text is None or not text.strip(" \t\r"):
                continue
            value = _parse(text, number, problems)
            if value is not None and has_own_id(value, text, number, ids, problems):
                rows.append(Row(number, text, value))
    if not rows and not problems.total:
        problems.add(1, 1, "the file is empty; it needs at least one row")
    return rows, problems


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write objects, a line each; the file holds either its old content or all of the new one.

    Raises:
        ValueError: If a value is NaN or infinite.
        TypeError: If a value is no JSON.
    """
    write_text(path, "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines without their ends, None for one that is too long; such a line is never held in memory."""
    while line := file.readline(MAX_LINE_BYTES + 2):
        if line.endswith(b"\n"):
            line = line[:-1].removesuffix(b"\r")
        elif len(line) == MAX_LINE_BYTES + 2:
            while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                pass
        yield line if len(line) <= MAX_LINE_BYTES else None


def _decode(raw: bytes | None, number: int, problems: Problems) -> str | None:
    if raw is None:
        problems.add(number, 1, f"the line is longer than {MAX_LINE_BYTES:,} bytes, the most that is read")
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        byte = f"0x{raw[error.start]:02x}"
        problems.add(number, column, f"byte {byte} is not UTF-8 ({error.reason}); save the file as UTF-8")
        return None


def _parse(text: str, number: int, problems: Problems) -> dict[str, Any] | None:
    """The object on a line, None when it holds none."""
    column, message = 1, ""
    try:
        value = _DECODER.decode(text)
        if not isinstance(value, dict):
            message = f"a line must be an object {{...}}, got {_KINDS.get(type(value), 'null')}"
        elif _HALF_PAIR.search(text) and (column := _half_pair(text)):
            message = "half of a surrogate pair, which no UTF-8 text can hold; write the character itself"
    except json.JSONDecodeError as error:
        column, message = error.pos + 1, _explain(error, text, number)
    except _Refused as error:
        column, message = column_of_token(text, str(error)), _explain_number(str(error))
    except _Repeated as error:
        column, message = column_of_repeat(text), f"the key {str(error)!r} is in one object twice; one would be lost"
    except RecursionError:
        message = "arrays or objects are nested too deeply to be read"
    if message:
        problems.add(number, column, message)
        return None
    return value


def _explain(error: json.JSONDecodeError, text: str, number: int) -> str:
    message = f"not JSON: {error.msg}"
    if error.msg == "Extra data":
        message = "there is more text after the object; each object needs a line of its own"
    elif text.startswith("\ufeff"):
        message = "a byte-order mark in the middle of the file, as when files are joined; delete it"
    elif number == 1 and text.lstrip().startswith("["):
        message += "; this looks like one array over many lines: write each of its objects on a line of its own"
    return message


def _explain_number(token: str) -> str:
    if token.lstrip("-")[:1].isdigit():
        shown = token if len(token) <= 40 else f"{token[:20]}... ({len(token)} digits)"
        return f"the number {shown} is too large to be kept"
    return f"{token} is no JSON; write null, or leave the key out"


def _half_pair(text: str) -> int:
    """Column of the first escape that is half of a surrogate pair, 0 when there is none."""
    high = 0
    for match in re.finditer(r"\\(?:u([0-9a-fA-F]{4})|.)|[^\\]", text):
        code = int(match[1], 16) if match[1] else 0
        if high and not 0xDC00 <= code < 0xE000:
            return high
        if not high and 0xDC00 <= code < 0xE000:
            return match.start() + 1
        high = match.start() + 1 if 0xD800 <= code < 0xDC00 else 0
    return 0


def has_own_id(value: dict[str, Any], text: str, number: int, ids: dict[str, int], problems: Problems) -> bool:
    """Whether the "id" of a row, if it has one, is a text or an integer that no row before it has; notes it in ``ids``."""
    given = value.get("id")
    if given is None:
        return True
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        message = f'"id" must be a text or an integer, got {json.dumps(given)[:40]}'
    elif (first := ids.setdefault(str(given), number)) != number:
        message = f"the id {given!r} is that of line {first}; each row needs its own"
    else:
        return True
    problems.add(number, column_of_value(text, ("id",)), message)
    return False


class _Repeated(Exception):
    """A key twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        raise _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return value


def _float(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise _Refused(token)
    return value


def _integer(token: str) -> int:
    try:
        return int(token)
    except ValueError:  # beyond Python's limit of 4,300 digits
        raise _Refused(token) from None


def _constant(token: str) -> float:
    raise _Refused(token)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_integer, parse_constant=_constant)
