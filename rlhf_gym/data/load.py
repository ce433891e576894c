"""From a file, or rows in memory, to records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import extract_prompt, plain, templated
from .formats import (
    IMPLICIT_PREFERENCE,
    RECORDS,
    Format,
    NoFormat,
    recognise,
    text_columns,
    value_problems,
)
from .jsonl import Row, has_own_id, read_jsonl
from .locate import column_of_value
from .problems import LIMIT, DataError, Problems
from .records import Record


@dataclass(frozen=True)
class Dataset:
    """The rows of a file that can be used, and what is wrong with the others."""

    format: Format | None
    """That of most rows; None when no row has one."""
    rows: list[Row]
    """As they stand in the file."""
    records: list[Record]
    """The same rows, in the same order, in the common form."""
    problems: Problems


def read_dataset(
    source: str | Path | Iterable[Mapping[str, Any]], tokenizer: Any = None, *, limit: int = LIMIT
) -> Dataset:
    """Read what can be read, and say what is wrong with the rest.

    All rows must have one format; it is that of most of them.

    Args:
        source: A JSONL file, or rows in memory (dicts, a ``datasets.Dataset``).
        tokenizer: One whose chat template turns conversations into texts. Without it they become lines ``role: content``,
            which is enough to count and compare, and nothing to train on.
        limit: Problems to list; further ones are counted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are conversations and the tokenizer has no chat template.
    """
    if isinstance(source, (str, Path)):
        rows, problems = read_jsonl(source, limit=limit)
    else:
        rows, problems = _rows_in_memory(source, limit)
    formats: dict[int, Format] = {}
    for row in rows:
        try:
            formats[row.line] = recognise(row.value)
        except NoFormat as error:
            problems.add(row.line, 1, str(error))
    counts = Counter(formats.values())
    common = counts.most_common(1)[0][0] if counts else None
    kept: list[Row] = []
    records: list[Record] = []
    for row in rows:
        form = formats.get(row.line)
        if form is None:
            continue
        faults = value_problems(row.value, form)
        if form != common:
            faults = [((), f"this row is {form}, but most are {common}; a file holds one format")]
        for path, message in faults:
            problems.add(row.line, column_of_value(row.text, path), message)
        if faults:
            continue
        try:
            records.append(as_record(row.value, form, tokenizer))
            kept.append(row)
        except ValueError as error:
            if form.conversational and not getattr(tokenizer, "chat_template", None):
                raise  # the same for every row
            problems.add(row.line, 1, str(error))
    return Dataset(common, kept, records, problems)


def load_records(source: str | Path | Iterable[Mapping[str, Any]], *kinds: type, tokenizer: Any = None) -> list[Any]:
    """The records of a file without any problem.

    Args:
        source: As in `read_dataset`.
        *kinds: The kinds that will do, for instance `Preference`; any when left out.
        tokenizer: Needed for conversations, with a chat template. The texts then hold its special tokens: tokenize them
            with ``add_special_tokens=False``.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If any row has a problem, or they are of another kind.
        ValueError: If there are conversations and no tokenizer with a chat template.
    """
    data = read_dataset(source, tokenizer)
    data.problems.raise_if_any()
    if kinds and RECORDS[data.format.name] not in kinds:
        fitting = " or ".join(repr(name) for name, kind in RECORDS.items() if kind in kinds)
        raise DataError(f"{data.problems.file} is {data.format}; here the format must be {fitting}")
    if data.format.conversational and tokenizer is None:
        raise ValueError(f"{data.problems.file} holds conversations: give a tokenizer with a chat template")
    return data.records


def as_record(row: Mapping[str, Any], form: Format, tokenizer: Any = None) -> Record:
    """One row in the common form.

    Args:
        row: A row without problems.
        form: Its format.
        tokenizer: As in `read_dataset`.

    Raises:
        ValueError: If the tokenizer's chat template is missing or refuses the conversation.
    """
    texts = {name: row[name] for name in text_columns(row, form)}
    if form.name == IMPLICIT_PREFERENCE:
        texts = dict(zip(("prompt", "chosen", "rejected"), extract_prompt(row["chosen"], row["rejected"]), strict=True))
    if form.conversational and tokenizer is None:
        texts = plain(texts)
    elif form.conversational:
        extra = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
        texts = templated(texts | extra, tokenizer)
    if "text" in texts:
        texts = {"prompt": "", "completion": texts["text"]}
    kind = RECORDS[form.name]
    others = {name: row[name] for name in kind.__dataclass_fields__ if name not in texts and row.get(name) is not None}
    for name in ("annotator", "id"):
        if name in others:
            others[name] = str(others[name])
    for name in ("margin", "rating"):
        if name in others:
            others[name] = float(others[name])
    return kind(**texts, **others)


def _rows_in_memory(source: Iterable[Mapping[str, Any]], limit: int) -> tuple[list[Row], Problems]:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(f"data must be a JSONL file or rows (dicts), got {type(source).__name__}")
    problems = Problems("the rows given", limit)
    rows = []
    ids: dict[str, int] = {}
    for number, value in enumerate(source, start=1):
        if not isinstance(value, Mapping):
            problems.add(number, 1, f"a row must be a dict, got {type(value).__name__}")
        elif has_own_id(dict(value), "", number, ids, problems):
            rows.append(Row(number, "", dict(value)))
    if not rows and not problems.total:
        problems.add(1, 1, "there are no rows; at least one is needed")
    return rows, problems
