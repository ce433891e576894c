"""What fine-tuning, reward models and feedback share: one judgement or one example, frozen, in plain text.

Whatever format a file has, a row of it becomes one of these five. ``as_row`` is the way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PromptOnly:
    """A prompt without a response."""

    prompt: str
    id: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """A response to learn from. A text without a prompt (language modelling) has the prompt ""."""

    prompt: str
    completion: str
    annotator: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Preference:
    """Of two responses to a prompt, one is better."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    """By how much, in the units of the reward; None when nobody said."""
    tie: bool = False
    """Judged equally good; then which of the two is called chosen means nothing."""
    position: Literal["left", "right"] | None = None
    """Where the chosen one was shown; None when unknown."""
    annotator: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Labelled:
    """A response and its class."""

    prompt: str
    completion: str
    label: bool | int | str
    """True for a good response and False for a bad one (unpaired preference), or the class by number or name."""
    annotator: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Rating:
    """A response and a number that says how good it is."""

    prompt: str
    completion: str
    rating: float
    criterion: str | None = None
    """What was rated, for instance "helpful"; None when there is one scale only."""
    annotator: str | None = None
    id: str | None = None


Record = PromptOnly | Demonstration | Preference | Labelled | Rating
TEXTS = ("prompt", "chosen", "rejected", "completion")
"""Fields that hold the texts; the others say what was judged, and by whom."""


def texts_of(record: Record) -> tuple[str, ...]:
    """Its prompt and responses, in the order of its fields."""
    return tuple(getattr(record, name) for name in TEXTS if hasattr(record, name))


def judgement_of(record: Record) -> tuple[Any, ...]:
    """All that is no text, without the id: two judgements of the same texts are the same if this is.

    The types belong to it: to Python, True and 1 are equal.
    """
    names = [field.name for field in dataclasses.fields(record) if field.name not in (*TEXTS, "id")]
    return tuple((type(value).__name__, value) for value in (getattr(record, name) for name in names))


def as_row(record: Record) -> dict[str, Any]:
    """The row of a file, in TRL's columns; what is unknown is left out.

    Example:
        >>> as_row(Preference("The sky is", " blue.", " green.", annotator="ann"))
        {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.', 'annotator': 'ann'}
    """
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    row = {name: value for name, value in values.items() if value is not None}
    if not values.get("tie"):
        row.pop("tie", None)
    return row


def as_demonstrations(records: Iterable[Record]) -> list[Demonstration]:
    """The responses worth learning from: demonstrations, chosen ones that are not tied, and those labelled True.

    Raises:
        TypeError: If a record says nothing about which response is good.
    """
    found = []
    for record in records:
        if isinstance(record, Demonstration):
            found.append(record)
        elif isinstance(record, Preference):
            if not record.tie:
                found.append(Demonstration(record.prompt, record.chosen, record.annotator, record.id))
        elif isinstance(record, Labelled) and isinstance(record.label, bool):
            if record.label:
                found.append(Demonstration(record.prompt, record.completion, record.annotator, record.id))
        else:
            raise TypeError(f"records must be demonstrations, preferences or good/bad labels, got {record!r:.80}")
    return found


def as_labelled(preferences: Iterable[Preference]) -> list[Labelled]:
    """Both responses of each pair, labelled True and False, without ties and ids.

    Source:
        TRL's ``unpair_preference_dataset``, which puts all chosen ones first; here the two of a pair stay together.
    """
    return [
        Labelled(pair.prompt, text, label, pair.annotator)
        for pair in preferences
        if not pair.tie
        for text, label in ((pair.chosen, True), (pair.rejected, False))
    ]
