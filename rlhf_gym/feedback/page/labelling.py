"""The work that annotators share: what each is asked next, and what they have said."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rlhf_gym.feedback.judgements import Item, Judgement, Undo
from rlhf_gym.feedback.store import FeedbackStore

from .questions import Question, draw, in_order, is_gold, questions_of
from .settings import PageSettings
from .tally import Tally

LEASE_S = 600.0
"""How long a question that is on somebody's screen is kept from others."""


class Progress(NamedTuple):
    """How far one annotator is."""

    answered: int
    """Questions answered or skipped."""
    left: int
    """Questions that still want this annotator, without those whose answer is known."""


class Labelling:
    """Hands out questions and takes in judgements. All methods may be called from any thread.

    Args:
        store: Where items and judgements are.
        settings: How questions are asked.
        items: Those that are asked about; they are added to the store. None: all that the store has, also those that other
            programs add later.
        numbers: By the id of an item: larger ones are asked first. Empty: in random order.
        clock: Seconds, for leases.
    """

    def __init__(
        self,
        store: FeedbackStore,
        settings: PageSettings,
        items: Sequence[Item] | None = None,
        numbers: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.settings, self._numbers, self._clock = store, settings, dict(numbers or {}), clock
        self._lock = threading.RLock()
        self._follows_store = items is None
        self._items: dict[str, Item] = {}
        self._wanted: dict[Question, int] = {}
        self._gold: list[Question] = []
        self._open: dict[Question, None] = {}
        self._given: dict[str, tuple[Question, float]] = {}
        self._tally, self._version = Tally(), -1
        self._add_items(store.add_items(items or ()))
        with self._lock:
            self._catch_up()

    @property
    def num_questions(self) -> int:
        """Without those whose answer is known."""
        return len(self._wanted)

    @property
    def items(self) -> list[str]:
        """Ids of the items that are asked about."""
        with self._lock:
            return list(self._items)

    def item(self, item_id: str) -> Item:
        """One item of the store.

        Raises:
            KeyError: If there is none with this id.
        """
        return self._items.get(item_id) or self.store.item(item_id)

    def next(self, annotator: str) -> Question | None:
        """The question for an annotator: the same one until it is answered. None: nothing is left."""
        with self._lock:
            self._catch_up()
            question = self._current(annotator) or self._choose(annotator)
            if question is None:
                self._given.pop(annotator, None)
            else:
                self._given[annotator] = question, self._clock()
            return question

    def record(self, judgements: Sequence[Judgement]) -> None:
        """Store what was sent at once, and return when it is on disk; see `FeedbackStore.record_all`."""
        self.store.record_all(judgements)
        with self._lock:
            self._catch_up()

    def last_submission(self, annotator: str) -> list[Judgement]:
        """What stands of what the annotator sent last; empty: nothing."""
        with self._lock:
            return self._tally.submission(annotator)

    def undo(self, annotator: str, submission: str) -> None:
        """Cancel all that was sent at once, and ask it again. One that is undone already stays so."""
        with self._lock:
            cancelled = self._tally.submission(annotator, submission)
            if not cancelled:
                return
            self.record([Judgement(_undo_key(said.key), annotator, said.item, Undo(said.key)) for said in cancelled])
            question = Question(cancelled[0].item, tuple(sorted(cancelled[0].shown)))
            if question.item in self._items and question.responses:
                self._given[annotator] = question, self._clock()

    def progress(self, annotator: str) -> Progress:
        """How far an annotator is."""
        with self._lock:
            mine = [question for question in self._tally.seen.get(annotator, ()) if question.item in self._items]
            return Progress(len(mine), len(self._open) - sum(question in self._open for question in mine))

    def num_judged(self) -> tuple[int, int]:
        """Questions that enough people have judged, and those that some have, but not enough."""
        with self._lock:
            self._catch_up()
            part = sum(1 for question in self._open if self._tally.judged.get(question))
            return len(self._wanted) - len(self._open), part

    def _current(self, annotator: str) -> Question | None:
        question, at = self._given.get(annotator, (None, 0.0))
        if question is None or question in self._tally.seen.get(annotator, ()):
            return None
        # Whoever comes back late may find that others were asked instead.
        over = self._clock() - at >= LEASE_S and question in self._wanted and question not in self._open
        return None if over else question

    def _choose(self, annotator: str) -> Question | None:
        seen = self._tally.seen.get(annotator, {})
        turn = sum(question.item in self._items for question in seen)
        seed, now = self.settings.seed, self._clock()
        gold = [question for question in self._gold if question not in seen]
        # Not at fixed places: nobody must be able to guess which ones are checks.
        if gold and (draw("gold", seed, annotator, turn).random() < self.settings.gold_rate or not self._wanted):
            return draw("which gold", seed, annotator, turn).choice(gold)
        held = Counter(
            question for name, (question, at) in self._given.items() if name != annotator and now - at < LEASE_S
        )
        for question in self._open:
            if question not in seen and self._missing(question) > held[question]:
                return question
        return None

    def _missing(self, question: Question) -> int:
        return self._wanted[question] - len(self._tally.judged.get(question, ()))

    def _catch_up(self) -> None:
        """Take in what this and other programs have written since."""
        version = self.store.changes_by_others()
        if version == self._version:
            return self._count_new_events()
        self._version = version
        if self._follows_store and self.store.counts()[0] != len(self._items):
            self._add_items(item for item in self.store.items() if item.id not in self._items)
        self._count_new_events()
        if self.store.counts()[1] != self._tally.num_events:  # somebody was forgotten
            self._tally, self._open = Tally(), dict.fromkeys(self._wanted)
            self._count_new_events()

    def _count_new_events(self) -> None:
        for event in self.store.events(after=self._tally.last):
            question = self._tally.add(event)
            if question in self._wanted:
                self._open_or_close(question)

    def _open_or_close(self, question: Question) -> None:
        if self._missing(question) <= 0:
            self._open.pop(question, None)
        elif question not in self._open:  # undone: back to its place
            self._open = {each: None for each in self._wanted if each in self._open or each == question}

    def _add_items(self, items: Iterable[Item]) -> None:
        new = {item.id: item for item in items}
        self._items |= new
        questions = [question for item in new.values() for question in questions_of(item, self.settings.seed)]
        self._gold += [question for question in questions if is_gold(question, new[question.item])]
        ordinary = [question for question in questions if not is_gold(question, new[question.item])]
        whole, part = math.floor(self.settings.overlap), self.settings.overlap % 1
        for question in in_order(ordinary, self._numbers, self.settings.seed):
            doubled = part > 0 and draw("overlap", self.settings.seed, *question).random() < part
            self._wanted[question] = whole + doubled
            if self._missing(question) > 0:
                self._open[question] = None


def _undo_key(key: str) -> str:
    """One and the same for each judgement: undone twice at the same moment, it is undone once."""
    return "undo-" + hashlib.sha256(key.encode()).hexdigest()[:32]
