"""The reader of JSON Lines: what it takes, and the line and column of everything that it refuses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_gym.data import DataError, Problems, load_records, read_jsonl, write_jsonl
from rlhf_gym.data.jsonl import MAX_LINE_BYTES
from rlhf_gym.data.locate import column_of_value, positions

ROW = b'{"prompt": "a"}\n'


@pytest.fixture
def read(tmp_path):
    """Rows, and problems as (line, column, message), of a file with these bytes."""

    def call(content: bytes, **arguments):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        rows, problems = read_jsonl(path, **arguments)
        assert problems.file == str(path)
        return rows, [(p.line, p.column, p.message) for p in problems.listed()]

    return call


@pytest.mark.parametrize(
    ("content", "lines", "values"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b"}', [1, 2], ["a", "b"]),  # no newline at the end
        (b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n', [1, 3], ["a", "b"]),  # Windows
        (b'\n  {"prompt": "a"} \n\t\n', [2], ["a"]),
        ('{"prompt": "ä\u2028中\U0001f600"}\n'.encode(), [1], ["ä\u2028中\U0001f600"]),  # U+2028 ends no line
        (b'{"prompt": "\\ud83d\\ude00 \\\\ud83d"}\n', [1], ["\U0001f600 \\ud83d"]),  # a whole pair; no escape at all
        (b'{"prompt": "NaN", "x": {"y": [1.5, -2, null, true]}}\n', [1], ["NaN"]),
        (
            b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": null}\n{"prompt": "c", "id": "2"}\n',
            [1, 2, 3],
            ["a", "b", "c"],
        ),
    ],
)
def test_what_is_fine(read, content, lines, values):
    rows, problems = read(content)
    assert problems == []
    assert [row.line for row in rows] == lines and [row.value["prompt"] for row in rows] == values


@pytest.mark.parametrize(
    ("line", "column", "says"),
    [
        (b'{"prompt": oops}', 12, "not JSON"),
        (b'{"prompt": "a"', 15, "not JSON"),
        (b'{"prompt": "a\tb"}', 14, "not JSON"),  # a raw tab
        (b'{"prompt": "a"} {"prompt": "b"}', 17, "each object needs a line of its own"),
        ('{"ä": "é", "prompt": "\udcff'.encode("utf-8", "surrogateescape"), 23, "byte 0xff is not UTF-8"),
        (b'{"a\xe9": 1}', 4, "byte 0xe9 is not UTF-8"),  # Latin-1
        (b'{"x": "NaN", "y": NaN}', 19, "NaN is no JSON"),
        (b'{"x": [1, -Infinity]}', 11, "-Infinity is no JSON"),
        (b'{"x": 1, "y": 1e999}', 15, "1e999 is too large"),
        (b'{"x": ' + b"9" * 5000 + b"}", 7, "(5000 digits) is too large"),
        (b'{"a": 1, "b": {"a": 2}, "a": 3}', 30, "the key 'a' is in one object twice"),
        (b'{"m": [{"r": 1}, {"r": 2, "r": 3}]}', 32, "the key 'r'"),
        (b'{"prompt": "ab\\ud83d"}', 15, "half of a surrogate pair"),
        (b'{"prompt": "\\ud83d\\ude00\\ude00"}', 25, "half of a surrogate pair"),
        (b'["a"]', 1, "must be an object {...}, got an array"),
        (b'"a"', 1, "got a text"),
        (b"null", 1, "got null"),
        (b"true", 1, "got true or false"),
        (b"7", 1, "got a number"),
        (b'\xef\xbb\xbf{"prompt": "a"}', 1, "byte-order mark in the middle"),
        (b'{"prompt": "a", "id": 1.5}', 23, '"id" must be a text or an integer, got 1.5'),
        (b'{"prompt": "a", "id": true}', 23, "got true"),
        (b'{"prompt": "a", "id": "first"}', 23, "the id 'first' is that of line 1"),
        (b"[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_what_is_refused(read, line, column, says):
    """In the middle of a file: the lines around it are still read."""
    rows, problems = read(b'{"prompt": "a", "id": "first"}\n' + line + b"\r\n" + ROW)
    assert [row.line for row in rows] == [1, 3]
    ((number, found, message),) = problems
    assert (number, found) == (2, column) and says in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08\x00rest\n\n", "gzip"),
        (b"PAR1\x15\x04", "Parquet"),
    ],
)
def test_what_is_no_such_file(read, content, says):
    rows, ((line, column, message),) = read(content)
    assert not rows and (line, column) == (1, 1) and says in message


def test_one_array_over_many_lines(read):
    _, problems = read(json.dumps([{"prompt": "a"}], indent=1).encode())
    assert "this looks like one array" in problems[0][2] and len(problems) > 1


def test_long_lines(read):
    """10 MB are read, one byte more is not, and what comes after is."""
    frame = b'{"prompt": ""}'
    longest = b'{"prompt": "' + b"a" * (MAX_LINE_BYTES - len(frame)) + b'"}'
    rows, problems = read(
        longest + b"\r\n" + longest[:-2] + b'a"}\n' + b" " * 3 * MAX_LINE_BYTES + b"\n" + ROW + longest
    )
    assert [row.line for row in rows] == [1, 4, 5] and len(rows[0].text) == MAX_LINE_BYTES
    assert [(line, column) for line, column, _ in problems] == [(2, 1), (3, 1)]
    assert all("longer than 10,485,760 bytes" in message for *_, message in problems)


def test_problems_are_counted_beyond_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b"x\n" * 7)
    rows, problems = read_jsonl(path, limit=3)
    assert len(rows) == 1 and problems.total == 7 and [p.line for p in problems.listed()] == [2, 3, 4]
    with pytest.raises(
        DataError, match=r"rows.jsonl: line 2, .*line 4, .*; and 4 more, which rlhf-gym data check lists"
    ):
        problems.raise_if_any()
    with pytest.raises(DataError, match="and 4 more"):
        load_records(path)
    Problems("none").raise_if_any()
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        Problems("x", limit=0)


def test_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_jsonl(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3).filter(lambda key: key != "id"), JSON, max_size=3), min_size=1, max_size=4
    )
)
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    write_jsonl(path, rows)
    found, problems = read_jsonl(path)
    assert problems.total == 0 and [row.value for row in found] == rows


@settings(max_examples=100, deadline=None)
@given(JSON, st.booleans(), st.sampled_from([None, (", ", ": "), (" ,  ", " : ")]))
def test_every_value_is_found_where_it_stands(value, ascii_only, separators):
    """JSON read from the column on gives the value: nothing of the walk over the tokens is believed."""
    text = json.dumps(value, ensure_ascii=ascii_only, separators=separators)
    for path, column in positions(text):
        wanted = value
        for step in path:
            wanted = wanted[step]
        assert json.JSONDecoder().raw_decode(text, column - 1)[0] == wanted
    assert column_of_value(text, ("no", "such", "path")) in (1, *(c for p, c in positions(text) if p == ("no",)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_written(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW)
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(path, [{"x": value}])
    assert path.read_bytes() == ROW and len(list(tmp_path.iterdir())) == 1
