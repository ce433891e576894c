"""Questions: which responses of an item are asked about, and in which order they stand on the screen.

All of it follows from the seed, so a page that is loaded again, or a server that is started again, shows the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rlhf_gym.feedback.judgements import Comparison, Item, Judgement, Skip


class Question(NamedTuple):
    """What is asked of a person at once."""

    item: str
    """Its id."""
    responses: tuple[int, ...]
    """The two to be compared, in rising order; or the one to be rated."""


def draw(*of: object) -> random.Random:
    """A source of randomness for one purpose; another for each other purpose."""
    return random.Random("\x1f".join(map(str, of)))


def questions_of(item: Item, seed: int) -> list[Question]:
    """The questions that an item makes.

    Of two responses there is one question. Of k > 2 there are k: each is compared with its two neighbours in a circle of
    random order, so that all are judged equally often and all are connected, at a cost that grows with k and not with its
    square. Of an item whose best response is known only pairs with that one are asked. The same text twice counts once.

    Args:
        item: The item.
        seed: Of the circle.
    """
    places: dict[str, int] = {}
    for place, text in enumerate(item.responses):
        places.setdefault(text, place)
    circle = list(places.values())
    if len(circle) <= 2:
        return [Question(item.id, tuple(circle))]
    draw("circle", seed, item.id).shuffle(circle)
    pairs = [tuple(sorted(pair)) for pair in zip(circle, circle[1:] + circle[:1], strict=True)]
    if item.gold is not None:
        pairs = [pair for pair in pairs if places[item.responses[item.gold]] in pair]
    return [Question(item.id, pair) for pair in sorted(pairs)]


def is_gold(question: Question, item: Item) -> bool:
    """Whether the right answer is known: then it is there to check annotators, and everybody may get it."""
    return item.gold is not None and len(question.responses) == 2


def shown(question: Question, annotator: str, seed: int) -> tuple[int, ...]:
    """The responses from left to right: drawn for each annotator and question."""
    turned = draw("side", seed, annotator, *question).random() < 0.5
    return question.responses[::-1] if turned else question.responses


def in_order(questions: Iterable[Question], numbers: Mapping[str, float], seed: int) -> list[Question]:
    """In random order; with numbers those with a larger one first.

    Args:
        questions: The questions.
        numbers: By the id of the item, for instance how far an ensemble disagrees on it; one that is missing comes last.
        seed: Of the order.
    """
    found = sorted(questions)  # the order in which items were added means nothing
    draw("order", seed).shuffle(found)
    return sorted(found, key=lambda question: -numbers.get(question.item, -float("inf")))


def question_of(judgement: Judgement) -> Question | None:
    """What a judgement is an answer to; None when it does not say what was shown."""
    return Question(judgement.item, tuple(sorted(judgement.shown))) if judgement.shown else None


def answers(judgement: Judgement) -> bool:
    """Whether a judgement is what a question asks for: a comparison of two, anything but a skip of one."""
    said = judgement.verdict
    return isinstance(said, Comparison) if len(judgement.shown) == 2 else not isinstance(said, Skip)
