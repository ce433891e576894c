"""Who has answered what, kept up to date judgement by judgement."""

from __future__ import annotations

from collections import defaultdict

from rlhf_gym.feedback.judgements import Judgement, Skip, Undo
from rlhf_gym.feedback.store import Event

from .questions import Question, answers, question_of


class Tally:
    """What follows from the events of a store, without reading them all again for every page.

    Attributes:
        num_events: How many it has seen.
        last: Number of the last of them, 0 before.
        judged: To each question the annotators whose answers stand, with the keys of these.
        seen: To each annotator the questions that were answered or skipped, with the keys.
    """

    def __init__(self) -> None:
        self.num_events, self.last = 0, 0
        self.judged: dict[Question, dict[str, set[str]]] = defaultdict(dict)
        self.seen: dict[str, dict[Question, set[str]]] = defaultdict(dict)
        self._standing: dict[str, Judgement] = {}
        self._submissions: dict[str, dict[str, list[str]]] = defaultdict(dict)

    def add(self, event: Event) -> Question | None:
        """Count one more event; returns the question that it concerns."""
        self.num_events, self.last = self.num_events + 1, event.number
        judgement = event.judgement
        if isinstance(judgement.verdict, Undo):
            return self._remove(judgement.verdict.cancels)
        self._standing[judgement.key] = judgement
        self._submissions[judgement.annotator].setdefault(submission_of(judgement.key), []).append(judgement.key)
        question = question_of(judgement)
        if question is not None:
            if answers(judgement):
                self.judged[question].setdefault(judgement.annotator, set()).add(judgement.key)
            if answers(judgement) or isinstance(judgement.verdict, Skip):
                self.seen[judgement.annotator].setdefault(question, set()).add(judgement.key)
        return question

    def submission(self, annotator: str, name: str | None = None) -> list[Judgement]:
        """What of a submission stands; the last one's without a name."""
        known = self._submissions.get(annotator, {})
        if name is None:
            name = next(reversed(known), "")
        return [self._standing[key] for key in known.get(name, ())]

    def _remove(self, key: str) -> Question | None:
        judgement = self._standing.pop(key)
        name, known = submission_of(key), self._submissions[judgement.annotator]
        known[name].remove(key)
        if not known[name]:
            del known[name]
        question = question_of(judgement)
        if question is not None:
            _discard(self.judged[question], judgement.annotator, key)
            _discard(self.seen[judgement.annotator], question, key)
        return question


def submission_of(key: str) -> str:
    """The keys of judgements that were sent at once are one name with endings: ``NAME/ENDING``."""
    return key.rpartition("/")[0] or key


def _discard(keys: dict, name: object, key: str) -> None:
    found = keys.get(name, set())
    found.discard(key)
    if not found:
        keys.pop(name, None)
