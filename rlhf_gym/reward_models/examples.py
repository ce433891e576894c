"""From records to what a reward model learns from: one judgement each, of one response or of several."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_gym.data import (
    DataError,
    Labelled,
    Preference,
    Problems,
    Rating,
    load_records,
    read_jsonl,
    split_of,
)
from rlhf_gym.data.formats import IMPLICIT_PREFERENCE, recognise
from rlhf_gym.data.split import prompt_key
from rlhf_gym.rewards.text import UNSPACED

MAX_LEVELS = 20


@dataclass(frozen=True)
class Ranking:
    """Several responses to a prompt, ranked."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    """Rank of each response, the best has the smallest; equal ranks are ties."""
    annotator: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if len(self.responses) < 2 or len(self.ranks) != len(self.responses):
            raise ValueError(
                f"a ranking must have two or more responses and a rank for each, got {len(self.responses)} responses "
                f"and {len(self.ranks)} ranks"
            )


@dataclass(frozen=True)
class Example:
    """One judgement."""

    prompt: str
    responses: tuple[str, ...]
    """One that is labelled or rated, or several that are compared."""
    ranks: tuple[float, ...] = ()
    """Of compared responses: the best has the smallest, equal ones are tied."""
    target: float = math.nan
    """Of a labelled response: the rating, or the number of its class or level."""
    margin: float | None = None
    annotator: str | None = None
    key: str = ""
    """Prompts with the same key go to the same side of a split."""
    gold: tuple[float, ...] | None = None
    """True scores of the responses, where they are known."""


@dataclass(frozen=True)
class Examples:
    """All judgements of a file, of one kind."""

    kind: str
    """One of `rlhf_gym.reward_models.config.Kind`, not "auto"."""
    items: list[Example]
    classes: tuple[str, ...] = ()
    """Names of the classes, or ordinal levels, in order. Of binary ones the second is the positive one."""

    def __len__(self) -> int:
        return len(self.items)

    def where(self, keep: Sequence[bool] | np.ndarray) -> Examples:
        """The judgements for which ``keep`` is true."""
        return replace(self, items=[item for item, kept in zip(self.items, keep, strict=True) if kept])


class Judgements(NamedTuple):
    """What a file holds to learn from."""

    records: list[Any]
    """`Preference`, `Labelled`, `Rating` or `Ranking`."""
    gold: list[tuple[float, ...] | None]
    """True scores of the responses of each, where the file has them."""
    implicit: bool
    """Whether prompts were taken from what chosen and rejected responses begin with."""


GOLD = {"chosen": (1.0, 0.0), "rejected": (0.0, 1.0), "tie": (0.5, 0.5)}


def load_judgements(path: str | Path, tokenizer: Any = None, criterion: str | None = None) -> Judgements:
    """Read a file: what `rlhf_gym.data.load_records` reads, and rankings (columns prompt, responses, ranks).

    A column "gold" says what is truly so: of a pair "chosen", "rejected" or "tie", of a ranking a number for each
    response, of a label or rating a number.

    Args:
        path: A JSONL file.
        tokenizer: Needed for conversations, with a chat template.
        criterion: Take the ratings by this one and leave the others out.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a row has a problem, or the rows are no judgements, or none is by the criterion.
    """
    path = Path(path).expanduser()
    rows, problems = read_jsonl(path)
    problems.raise_if_any()
    if {"responses", "ranks"} <= set(rows[0].value):
        records, implicit = _rankings(path, rows), False
    else:
        records = load_records(path, Preference, Labelled, Rating, tokenizer=tokenizer)
        implicit = recognise(rows[0].value).name == IMPLICIT_PREFERENCE
    gold = [_gold(path, *pair) for pair in zip(rows, records, strict=True)]
    if criterion is not None:
        known = [getattr(record, "criterion", None) for record in records]
        if criterion not in known:
            there = ", ".join(sorted(set(filter(None, known)))) or "no criterion"
            raise DataError(f"{path} has no rating by {criterion!r}; it has {there}")
        kept = [i for i, own in enumerate(known) if own == criterion]
        records, gold = [records[i] for i in kept], [gold[i] for i in kept]
    return Judgements(records, gold, implicit)


def _gold(path: Path, row: Any, record: Any) -> tuple[float, ...] | None:
    said = row.value.get("gold")
    if said is None:
        return None
    numbers = said if isinstance(said, list) else [said]
    size = len(record.responses) if isinstance(record, Ranking) else 1
    if isinstance(record, Preference):
        if isinstance(said, str) and said in GOLD:
            return GOLD[said]
    elif _list_of(numbers, int, float) and len(numbers) == size:
        return tuple(map(float, numbers))
    wanted = " or ".join(map(repr, GOLD)) if isinstance(record, Preference) else "a number for each response"
    raise DataError(f"{path}, line {row.line}: 'gold' must be {wanted}, got {said!r:.40}")


def _rankings(path: Path, rows: Sequence[Any]) -> list[Ranking]:
    problems, found = Problems(str(path)), []
    for row in rows:
        value = row.value
        responses, ranks = value.get("responses"), value.get("ranks")
        if not isinstance(value.get("prompt"), str) or not _list_of(responses, str):
            problems.add(row.line, 1, "a ranking needs a 'prompt' (a text) and 'responses' (a list of texts)")
        elif not _list_of(ranks, int, float) or len(ranks) != len(responses) or len(ranks) < 2:
            problems.add(
                row.line, 1, "'ranks' must hold a number for each of two or more responses, the best the smallest"
            )
        else:
            annotator = None if value.get("annotator") is None else str(value["annotator"])
            found.append(Ranking(value["prompt"], tuple(responses), tuple(map(float, ranks)), annotator))
    problems.raise_if_any()
    return found


def _list_of(value: Any, *types: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, types) and not isinstance(v, bool) for v in value)


def as_examples(
    records: Iterable[Any],
    *,
    kind: str = "auto",
    positive_label: str | None = None,
    classes: Sequence[str] = (),
    implicit: bool = False,
    gold: Sequence[tuple[float, ...] | None] | None = None,
) -> Examples:
    """Judgements of one kind.

    Args:
        records: `Preference`, `Ranking`, `Labelled` or `Rating`, all alike; `Preference` and `Ranking` may be mixed.
        kind: What they are to be taken for, see `RewardModelConfig`.
        positive_label: Which of two classes is the positive one.
        classes: Of held-out judgements: the classes or levels of those that were trained on. Empty: those that occur.
        implicit: The prompts were taken from what two responses begin with, see `rlhf_gym.data.split.prompt_key`.
        gold: True scores of the responses of each record, see `Judgements`.

    Raises:
        ValueError: If there are none, they are of several kinds or not of the kind asked for, or a class is unknown.
    """
    records = list(records)
    if not records:
        raise ValueError("records must hold at least one judgement, got none")
    if positive_label is not None and not all(isinstance(record, Labelled) for record in records):
        raise ValueError(f"positive_label is for labels, which these are not; got {positive_label!r}, leave it out")
    if all(isinstance(record, (Preference, Ranking)) for record in records):
        _check_kind(kind, "preference")
        items = [_compared(record) for record in records]
        kind, classes = "preference", ()
    elif all(isinstance(record, Rating) for record in records):
        criteria = sorted({str(record.criterion) for record in records})
        if len(criteria) > 1:
            raise ValueError(
                f"records must rate one criterion, got {', '.join(criteria)}; keep the rows of one (--criterion)"
            )
        _check_kind(kind, "regression", "ordinal")
        kind = "ordinal" if kind == "ordinal" else "regression"
        values = [record.rating for record in records]
        if kind == "ordinal":
            classes, values = _numbered([_level(value) for value in values], classes, float)
            if not 2 <= len(classes) <= MAX_LEVELS:
                raise ValueError(
                    f"ordinal ratings must have 2 to {MAX_LEVELS} levels, got {len(classes)}; use kind='regression'"
                )
        items = [_labelled(record, value) for record, value in zip(records, values, strict=True)]
    elif all(isinstance(record, Labelled) for record in records):
        number = any(isinstance(record.label, int) for record in records)
        classes, values = _numbered([str(record.label) for record in records], classes, float if number else str)
        if len(classes) < 2:
            raise ValueError(f"labels must have at least two classes, got {', '.join(classes)} alone")
        if positive_label is not None and positive_label not in classes:
            raise ValueError(f"positive_label must be one of {', '.join(classes)}, got {positive_label!r}")
        _check_kind(kind, "binary" if len(classes) == 2 else "multi-class", "multi-class")
        kind = "multi-class" if kind == "multi-class" or len(classes) > 2 else "binary"
        if kind == "binary" and positive_label == classes[0]:
            classes, values = (classes[1], classes[0]), [1.0 - value for value in values]
        items = [_labelled(record, value) for record, value in zip(records, values, strict=True)]
    else:
        found = ", ".join(sorted({type(record).__name__ for record in records}))
        raise ValueError(f"records must be all preferences and rankings, all ratings or all labels, got {found}")
    keys = [prompt_key(_KeyOf(item), implicit=implicit) for item in items]  # type: ignore[arg-type]
    true = [None] * len(items) if gold is None else gold
    told = zip(items, keys, true, strict=True)
    return Examples(kind, [replace(item, key=key, gold=known) for item, key, known in told], tuple(classes))


class _KeyOf:
    """An example as `prompt_key` reads records: without a prompt, its responses count."""

    def __init__(self, example: Example):
        self.prompt, self.completion = example.prompt, "".join(sorted(example.responses))


def _check_kind(asked: str, *possible: str) -> None:
    if asked not in ("auto", *possible):
        raise ValueError(f"kind must be {' or '.join(map(repr, possible))} for these records, got {asked!r}")


def _compared(record: Preference | Ranking) -> Example:
    if isinstance(record, Ranking):
        return Example(record.prompt, record.responses, record.ranks, annotator=record.annotator)
    return Example(
        record.prompt,
        (record.chosen, record.rejected),
        (0.0, 0.0) if record.tie else (0.0, 1.0),
        margin=record.margin,
        annotator=record.annotator,
    )


def _labelled(record: Labelled | Rating, target: float) -> Example:
    return Example(record.prompt, (record.completion,), target=target, annotator=record.annotator)


def _level(value: float) -> str:
    return f"{value:g}"


def _numbered(names: list[str], classes: Sequence[str], order: Any) -> tuple[tuple[str, ...], list[float]]:
    """The classes in order, and the number of each name among them."""
    if not classes:
        try:
            classes = sorted(set(names), key=order)
        except ValueError:  # truth values, or names among numbers
            classes = sorted(set(names))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"labels must be among those trained on ({', '.join(classes)}), got {unknown[0]!r}")
    return tuple(classes), [float(list(classes).index(name)) for name in names]


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """The judgements to train on and those held out; no prompt is on both sides.

    A prompt stays on its side when judgements are added. At least one is on each.

    Raises:
        ValueError: If there is one prompt only.
    """
    parts = {"held-out": share, "train": 1 - share}
    keys = sorted({item.key for item in examples.items})
    out = {key for key in keys if split_of(key, parts, seed) == "held-out"}
    if len(keys) < 2:
        raise ValueError(
            "records have one prompt only, which cannot be held out; give held-out judgements, or held_out=0"
        )
    if not out or len(out) == len(keys):
        out = set(keys[:1])
    held_out = [item.key in out for item in examples.items]
    return examples.where([not own for own in held_out]), examples.where(held_out)


def choose_join(examples: Examples) -> str:
    """What has to go between prompts and responses: a space, or nothing.

    Files in TRL's form hold the space. Responses that a word-level tokenizer has decoded by themselves do not: then no
    prompt ends and no response begins with white space, and most words at the seam would run together.
    """
    seams = [(i.prompt[-1], r[0]) for i in examples.items for r in i.responses if i.prompt and r]
    if any(before.isspace() or after.isspace() for before, after in seams):
        return ""
    fused = sum(_is_letter(before) and _is_letter(after) for before, after in seams)
    return " " if seams and fused >= len(seams) / 2 else ""


def _is_letter(character: str) -> bool:
    return character.isalnum() and not re.match(f"[{UNSPACED}]", character)
