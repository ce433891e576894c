"""What is judged and what people say of it: items, and six kinds of verdicts on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_NAME = 200
STRENGTHS = (1, 2, 3)
RATINGS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Item:
    """A prompt and the responses to it that are judged."""

    prompt: str
    responses: tuple[str, ...]
    checkpoint: str | None = None
    """The policy that the responses are from."""
    sampling: Mapping[str, Any] | None = None
    """How they were sampled, for instance {"temperature": 0.7, "seed": 3}; anything that JSON holds."""
    gold: int | None = None
    """The response known to be best, by which annotators are checked; None where nobody knows."""
    id: str = ""
    """Left out: a digest of the prompt and the responses, so that the same item added twice is one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "responses", tuple(self.responses))
        text_of("prompt", self.prompt)
        if not self.responses:
            raise ValueError("responses must hold at least one text, got none")
        for response in self.responses:
            text_of("a response", response)
        if self.gold is not None:
            _response("gold", self.gold, self)
        if not self.id:
            content = json.dumps([self.prompt, *self.responses]).encode()
            object.__setattr__(self, "id", hashlib.sha256(content).hexdigest()[:16])
        text_of("id", self.id, MAX_NAME)


@dataclass(frozen=True)
class Comparison:
    """Which of the two responses shown is better."""

    choice: int | Literal["tie", "both bad"]
    """The better response, by its place in the item (not on the screen)."""
    strength: int | None = None
    """1 slightly, 2 clearly, 3 much better; None where nobody asked, or neither is."""


@dataclass(frozen=True)
class Score:
    """How good a response is by one criterion."""

    response: int
    criterion: str
    rating: int
    """1 to 5."""


@dataclass(frozen=True)
class Correction:
    """A response as it should have been."""

    response: int
    text: str


@dataclass(frozen=True)
class Flag:
    """A response that is unsafe."""

    response: int
    reason: str = ""


@dataclass(frozen=True)
class Skip:
    """Nothing to say of the responses shown."""

    reason: str = ""


@dataclass(frozen=True)
class Undo:
    """An earlier judgement of the same annotator no longer stands."""

    cancels: str
    """Its key."""


Verdict = Comparison | Score | Correction | Flag | Skip | Undo
KINDS: dict[str, type[Verdict]] = {
    "comparison": Comparison,
    "rating": Score,
    "correction": Correction,
    "flag": Flag,
    "skip": Skip,
    "undo": Undo,
}


@dataclass(frozen=True)
class Judgement:
    """One thing that one person said of one item."""

    key: str
    """Of the sender's making, another for each judgement: sent twice, it is stored once (idempotency key)."""
    annotator: str
    item: str
    """The id of the item."""
    verdict: Verdict
    shown: tuple[int, ...] = ()
    """The responses that were on the screen, from left to right. A comparison needs two."""
    seconds: float | None = None
    """Time taken."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", tuple(self.shown))

    @property
    def kind(self) -> str:
        return next(kind for kind, verdict in KINDS.items() if isinstance(self.verdict, verdict))

    @property
    def topic(self) -> tuple[Any, ...]:
        """What it is about: of two judgements with the same topic the later one stands."""
        verdict = self.verdict
        about: Any = None
        if isinstance(verdict, (Comparison, Skip)):
            about = tuple(sorted(self.shown))
        elif isinstance(verdict, Score):
            about = (verdict.response, verdict.criterion)
        elif isinstance(verdict, (Correction, Flag)):
            about = verdict.response
        elif isinstance(verdict, Undo):
            about = verdict.cancels
        return self.annotator, self.item, self.kind, about


def check(judgement: Judgement, item: Item) -> None:
    """Refuse a judgement that makes no sense for its item.

    Raises:
        ValueError: Says which field, what it must be, and what it is.
    """
    verdict, shown = judgement.verdict, judgement.shown
    text_of("key", judgement.key, MAX_NAME)
    text_of("annotator", judgement.annotator, MAX_NAME)
    if judgement.annotator != judgement.annotator.strip():
        raise ValueError(f"annotator must not begin or end with white space, got {judgement.annotator!r}")
    for response in shown:
        _response("shown", response, item)
    if len(set(shown)) != len(shown):
        raise ValueError(f"shown must name each response once, got {shown}")
    seconds = judgement.seconds
    if seconds is not None and not (_is_number(seconds) and math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be a number >= 0 or None, got {seconds!r}")
    if isinstance(verdict, Comparison):
        _check_comparison(verdict, shown)
    elif isinstance(verdict, (Score, Correction, Flag)):
        _response("response", verdict.response, item)
    if isinstance(verdict, Score):
        text_of("criterion", verdict.criterion, MAX_NAME)
        _one_of("rating", verdict.rating, RATINGS)
    elif isinstance(verdict, Correction):
        text_of("text", verdict.text)
        if verdict.text == item.responses[verdict.response]:
            raise ValueError("text must differ from the response that it corrects; use a rating to say it is fine")
    elif isinstance(verdict, (Flag, Skip)):
        text_of("reason", verdict.reason)


def same_but_for_the_clock(one: Judgement, other: Judgement) -> bool:
    """Whether two judgements say the same; a second attempt to send one takes longer."""
    return dataclasses.replace(one, seconds=None) == dataclasses.replace(other, seconds=None)


def text_of(name: str, value: Any, longest: int | None = None) -> None:
    """Refuse what is no text, what UTF-8 cannot hold, and, where it is a name, the empty and the long.

    Raises:
        ValueError: If it is one of these.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which no UTF-8 text can: {value!r:.80}") from None
    if longest is not None and not 0 < len(value) <= longest:
        raise ValueError(f"{name} must have 1 to {longest} characters, got {len(value)}")


def _check_comparison(verdict: Comparison, shown: tuple[int, ...]) -> None:
    if len(shown) != 2:
        raise ValueError(f"shown must name the left and the right response of a comparison, got {shown}")
    if verdict.choice not in ("tie", "both bad") and not (_is_integer(verdict.choice) and verdict.choice in shown):
        raise ValueError(f"choice must be {shown[0]}, {shown[1]}, 'tie' or 'both bad', got {verdict.choice!r}")
    if verdict.strength is not None:
        _one_of("strength", verdict.strength, STRENGTHS)
        if isinstance(verdict.choice, str):
            raise ValueError(f"strength must be None when choice is {verdict.choice!r}, got {verdict.strength}")


def _response(name: str, value: Any, item: Item) -> None:
    if not (_is_integer(value) and 0 <= value < len(item.responses)):
        raise ValueError(f"{name} must be a response of the item, 0 to {len(item.responses) - 1}, got {value!r}")


def _one_of(name: str, value: Any, allowed: tuple[int, ...]) -> None:
    if not (_is_integer(value) and value in allowed):
        raise ValueError(f"{name} must be an integer from {allowed[0]} to {allowed[-1]}, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
