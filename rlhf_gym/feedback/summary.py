"""What a store says in numbers: how much was judged, how far people agree, what pulls them, how long they take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_gym.intervals import Estimate, share_estimate

from .agreement import Level, cohen_kappa, krippendorff_alpha, reliability_table
from .judgements import Comparison, Item, Score
from .store import Event, FeedbackStore, standing

MAX_KAPPAS = 6


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on one thing."""

    name: str
    """Of what was judged, or of the two who judged."""
    estimate: Estimate
    num_units: int
    """What at least two of them judged."""


@dataclass(frozen=True)
class Habits:
    """How one annotator, or all of them, compare."""

    annotator: str
    num_comparisons: int
    num_decided: int
    """Without "tie" and "both bad"; the next two are of these."""
    left: Estimate | None
    """Share in which the response shown left won: .5 without a bias, since the order is drawn. None: nothing to count."""
    longer: Estimate | None
    """Share in which the response with more characters won, among those that differ in that."""
    gold: Estimate | None
    """Share of the known best responses that were chosen, where one was shown."""
    median_seconds: float | None
    """Of a submission: all that was sent at once for one item."""


@dataclass(frozen=True)
class Summary:
    """The numbers of a store; all but ``kinds`` are of the judgements that stand."""

    num_items: int
    kinds: dict[str, int]
    """Events of each kind, undos too."""
    num_standing: int
    alphas: list[Agreement]
    """Krippendorff's, of the choices (nominal) and of each criterion's ratings (ordinal)."""
    kappas: list[Agreement]
    """Cohen's, of the choices of two annotators; of the pairs with most units in common."""
    everyone: Habits
    annotators: list[Habits]
    """By name."""


def summarise(store: FeedbackStore, items: Collection[str] | None = None, *, num_resamples: int = 1000) -> Summary:
    """Read a store.

    Args:
        store: The store.
        items: Ids of the items that count; None: all.
        num_resamples: Of the bootstrap that makes the intervals of agreement.
    """
    events = store.events()  # before the items: an item is there before its judgements
    known = {item.id: item for item in store.items() if items is None or item.id in items}
    events = [event for event in events if event.judgement.item in known]
    valid = standing(events)
    choices, ratings = _choices(valid), _ratings(valid)
    alphas = [_alpha("choices", choices, "nominal", num_resamples)]
    alphas += [_alpha(name, said, "ordinal", num_resamples) for name, said in sorted(ratings.items())]
    by_annotator: dict[str, list[Event]] = defaultdict(list)
    for event in valid:
        by_annotator[event.judgement.annotator].append(event)
    return Summary(
        len(known),
        dict(Counter(event.judgement.kind for event in events)),
        len(valid),
        [alpha for alpha in alphas if alpha.num_units],
        _kappas(choices, num_resamples),
        _habits("", valid, known),
        [_habits(name, by_annotator[name], known) for name in sorted(by_annotator)],
    )


Said = tuple[str, Hashable, Any]
"""Annotator, unit, value."""


def _choices(events: Iterable[Event]) -> list[Said]:
    """Comparisons; the values are "first" and "second" by the places in the item, whatever side they were shown on."""
    found: list[Said] = []
    for event in events:
        judgement = event.judgement
        if isinstance(judgement.verdict, Comparison):
            choice, pair = judgement.verdict.choice, tuple(sorted(judgement.shown))
            value = choice if isinstance(choice, str) else "first" if choice == pair[0] else "second"
            found.append((judgement.annotator, (judgement.item, pair), value))
    return found


def _ratings(events: Iterable[Event]) -> dict[str, list[Said]]:
    found: dict[str, list[Said]] = defaultdict(list)
    for event in events:
        said = event.judgement.verdict
        if isinstance(said, Score):
            found[said.criterion].append(
                (event.judgement.annotator, (event.judgement.item, said.response), said.rating)
            )
    return found


def _alpha(name: str, said: Sequence[Said], level: Level, num_resamples: int) -> Agreement:
    values, _, units = reliability_table(said)
    shared = sum(sum(row[unit] is not None for row in values) > 1 for unit in range(len(units)))
    return Agreement(name, krippendorff_alpha(values, level, num_resamples=num_resamples), shared)


def _kappas(choices: Sequence[Said], num_resamples: int) -> list[Agreement]:
    values, annotators, units = reliability_table(choices)
    judged = [{unit for unit in range(len(units)) if row[unit] is not None} for row in values]
    shared = {pair: len(judged[pair[0]] & judged[pair[1]]) for pair in combinations(range(len(annotators)), 2)}
    most = sorted((pair for pair in shared if shared[pair]), key=lambda pair: (-shared[pair], pair))[:MAX_KAPPAS]
    return [
        Agreement(
            f"{annotators[a]}, {annotators[b]}",
            cohen_kappa(values[a], values[b], num_resamples=num_resamples),
            shared[a, b],
        )
        for a, b in most
    ]


def _habits(name: str, events: Sequence[Event], items: dict[str, Item]) -> Habits:
    comparisons = [event.judgement for event in events if isinstance(event.judgement.verdict, Comparison)]
    left: list[tuple[str, bool]] = []
    longer: list[tuple[str, bool]] = []
    gold: list[tuple[str, bool]] = []
    for judgement in comparisons:
        item, choice = items[judgement.item], judgement.verdict.choice  # type: ignore[union-attr]
        shown = [item.responses[place] for place in judgement.shown]
        best = None if item.gold is None else item.responses[item.gold]
        if best in shown and shown[0] != shown[1]:
            gold.append((item.id, isinstance(choice, int) and item.responses[choice] == best))
        if isinstance(choice, int):
            left.append((item.id, choice == judgement.shown[0]))
            if len(shown[0]) != len(shown[1]):
                longer.append((item.id, len(item.responses[choice]) == max(map(len, shown))))
    seconds = {_submission(event): event.judgement.seconds for event in events if event.judgement.seconds is not None}
    median = float(np.median(list(seconds.values()))) if seconds else None
    return Habits(name, len(comparisons), len(left), _share(left), _share(longer), _share(gold), median)


def _submission(event: Event) -> str:
    key = event.judgement.key
    return key.rpartition("/")[0] or key


def _share(happened: Sequence[tuple[str, bool]]) -> Estimate | None:
    """With an interval over items: what several people say of one item is alike."""
    if not happened:
        return None
    place = {item: index for index, item in enumerate(dict.fromkeys(item for item, _ in happened))}
    return share_estimate(np.array([won for _, won in happened]), np.array([place[item] for item, _ in happened]))
