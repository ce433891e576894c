"""What is to be judged: read from a file of prompts with responses, or made of the samples of a run."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_gym.data import Problems, Row, read_jsonl
from rlhf_gym.data.locate import column_of_value

from .judgements import Item

SAMPLES = {"before": "samples_before.jsonl", "after": "samples_after.jsonl"}
SAMPLING = ("temperature", "top_k", "top_p", "max_response_tokens", "seed")
MAX_CHARACTERS = 50_000
"""Of a response; what is longer nobody reads on a page."""


class Source(NamedTuple):
    """Items, and what decides which comes first."""

    items: list[Item]
    numbers: dict[str, float]
    """By the id of the item, for instance how far an ensemble disagrees; empty: nothing was asked for."""


def read_items(path: str | Path, order_by: str | None = None) -> Source:
    """Read rows ``{"prompt": text, "responses": [text, ...]}``.

    A row may also have ``id``, ``gold`` (place of the response known to be best, from 0), ``checkpoint`` (a text) and
    ``sampling`` (an object); other columns are left alone.

    Args:
        path: A JSONL file.
        order_by: A column with a number in each row.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a row has a problem; says the line and the column.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "sky.jsonl")
        ...     _ = file.write_text('{"prompt": "The sky is", "responses": [" blue.", " green."], "gap": 0.2}')
        ...     source = read_items(file, order_by="gap")
        >>> source.items[0].responses, list(source.numbers.values())
        ((' blue.', ' green.'), [0.2])
    """
    rows, problems = read_jsonl(path)
    items: dict[str, Item] = {}
    numbers: dict[str, float] = {}
    for row in rows:
        faults = list(_faults(row.value, order_by))
        for place, message in faults:
            problems.add(row.line, column_of_value(row.text, place), message)
        item = None if faults else _item(row, problems)
        if item is None:
            continue
        if item.id in items:
            problems.add(row.line, 1, "this prompt with these responses stands in an earlier row; remove one of them")
        items[item.id] = item
        if order_by is not None:
            numbers[item.id] = float(row.value[order_by])
    problems.raise_if_any(num_shown=10, lister=None)
    return Source(list(items.values()), numbers)


def items_of_run(directory: str | Path, order_by: str | None = None) -> Source:
    """Make items of the samples of a run: to each prompt what the model said before and after the training.

    The i-th response to a prompt before goes with the i-th after; pairs of the same text are left out. Without the file of
    one of the two, all responses to a prompt make one item.

    Args:
        directory: A run directory with ``samples_before.jsonl`` or ``samples_after.jsonl``.
        order_by: A column of the samples, for instance ``score``; that of an item is the largest of its samples.

    Raises:
        FileNotFoundError: If there are no samples.
        DataError: If they cannot be read, or have no such column.
        ValueError: If no two of them differ.
    """
    directory = Path(directory).expanduser()
    files = {when: directory / name for when, name in SAMPLES.items() if (directory / name).is_file()}
    if not files:
        raise FileNotFoundError(
            f"{str(directory)!r} holds no {' or '.join(SAMPLES.values())}; give the directory of a run"
        )
    samples = {when: _read_samples(file, order_by) for when, file in files.items()}
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    if len(samples) == 2:
        for prompt, before in samples["before"].items():
            groups += [(prompt, list(pair)) for pair in zip(before, samples["after"].get(prompt, []), strict=False)]
    else:
        groups = list(next(iter(samples.values())).items())
    checkpoint, sampling = f"{directory.resolve().name}: {' and '.join(samples)}", _sampling(directory)
    items: dict[str, Item] = {}
    numbers: dict[str, float] = {}
    for prompt, group in groups:
        texts = [sample["response"] for sample in group]
        if len(set(texts)) > 1:
            item = Item(prompt, tuple(texts), checkpoint, sampling)
            items[item.id] = item
            if order_by is not None:
                numbers[item.id] = max(float(sample[order_by]) for sample in group)
    if not items:
        raise ValueError(f"the samples of {str(directory)!r} have no two different responses to one prompt")
    return Source(list(items.values()), numbers)


def _faults(row: Mapping[str, Any], order_by: str | None) -> list[tuple[tuple[str | int, ...], str]]:
    found: list[tuple[tuple[str | int, ...], str]] = []
    if not isinstance(row.get("prompt"), str):
        found.append((("prompt",), '"prompt" must be a text; write a conversation as one'))
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses:
        found.append((("responses",), '"responses" must be a list of at least one text'))
    else:
        for place, response in enumerate(responses):
            if not isinstance(response, str):
                found.append((("responses", place), "a response must be a text"))
            elif len(response) > MAX_CHARACTERS:
                message = f"a response must have at most {MAX_CHARACTERS:,} characters, got {len(response):,}"
                found.append((("responses", place), message))
    for name, kind, wanted in (("checkpoint", str, "a text"), ("sampling", dict, "an object")):
        if not isinstance(row.get(name), (kind, type(None))):
            found.append(((name,), f'"{name}" must be {wanted}'))
    if order_by is not None and not _is_number(row.get(order_by)):
        found.append(((order_by,), f'"{order_by}" must be a number, since the order is by it'))
    return found


def _item(row: Row, problems: Problems) -> Item | None:
    value = row.value
    try:
        name = "" if value.get("id") is None else str(value["id"])
        others = (value.get("checkpoint"), value.get("sampling"), value.get("gold"))
        return Item(value["prompt"], tuple(value["responses"]), *others, name)
    except ValueError as error:
        problems.add(row.line, column_of_value(row.text, ("gold",)), str(error))
        return None


def _read_samples(file: Path, order_by: str | None) -> dict[str, list[dict[str, Any]]]:
    """Rows by their prompt, in the order of the file."""
    rows, problems = read_jsonl(file)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for name in ("prompt", "response"):
            if not isinstance(row.value.get(name), str):
                problems.add(row.line, column_of_value(row.text, (name,)), f'"{name}" must be a text')
        if order_by is not None and not _is_number(row.value.get(order_by)):
            problems.add(row.line, column_of_value(row.text, (order_by,)), f'"{order_by}" must be a number')
        found[str(row.value.get("prompt"))].append(row.value)
    problems.raise_if_any(num_shown=10, lister=None)
    return found


def _sampling(directory: Path) -> dict[str, Any] | None:
    """How a run samples, as far as its ``config.json`` says."""
    try:
        options = json.loads((directory / "config.json").read_text(encoding="utf-8"))["options"]
        return {name: options[name] for name in SAMPLING if options.get(name) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
