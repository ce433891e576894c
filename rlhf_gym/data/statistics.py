"""What a file holds, in numbers: lengths, repeats, and what chosen and rejected responses differ in."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_gym.intervals import Estimate, mean_estimate, share_estimate
from rlhf_gym.rewards.text import words_of

from .duplicates import SIMILARITY, find_duplicates
from .formats import IMPLICIT_PREFERENCE
from .load import Dataset
from .records import TEXTS, Labelled, Preference, Rating, Record
from .split import prompt_key

Count = Callable[[Sequence[str]], Sequence[int]]
"""From texts to their lengths."""


@dataclass(frozen=True)
class Lengths:
    """How long one of the texts is."""

    mean: float
    median: float
    percentile_95: float
    maximum: int
    empty: int
    """Texts without a character."""


@dataclass(frozen=True)
class Statistics:
    """All that `describe` counts. What does not apply is None."""

    rows: int
    prompts: int
    """Different ones, without regard to case and white space."""
    annotators: int | None
    lengths: dict[str, Lengths]
    """By field, in the unit that was asked for."""
    duplicates: dict[str, int]
    """By reason."""
    both_ways: int
    """Pairs judged both ways, or responses labelled good and bad: people differ, or one of the two is wrong."""
    ties: int | None = None
    chosen_longer: Estimate | None = None
    """Share of pairs whose chosen response is the longer one; equal lengths and ties left out."""
    length_difference: Estimate | None = None
    """Chosen minus rejected."""
    chosen_left: Estimate | None = None
    """Share of pairs whose chosen response stood on the left, where it is known."""
    cut_words: int | None = None
    """Implicit prompts that end inside of a word, which is then divided between prompt and response."""
    labels: dict[str, int] | None = None
    ratings: dict[str, Estimate] | None = None
    """Mean by criterion."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return dataclasses.asdict(self)


def count_words(texts: Sequence[str]) -> list[int]:
    """Words of each text; in scripts without spaces each letter counts as one."""
    return [len(words_of(text)) for text in texts]


def describe(
    data: Dataset, count: Count = count_words, *, near: bool = True, similarity: float = SIMILARITY
) -> Statistics:
    """Count what a file holds.

    Args:
        data: What `read_dataset` gave.
        count: How to measure lengths.
        near: Look for near duplicates as well.
        similarity: As in `find_duplicates`.
    """
    records = data.records
    implicit = data.format is not None and data.format.name == IMPLICIT_PREFERENCE
    keys: dict[str, int] = {}
    prompt_index = np.array(
        [keys.setdefault(prompt_key(r, implicit=implicit), len(keys)) for r in records], dtype=np.int64
    )
    fields = [name for name in TEXTS if records and hasattr(records[0], name)]
    lengths = {name: np.array(count([getattr(r, name) for r in records]), dtype=np.int64) for name in fields}
    reasons = Counter(d.reason for d in find_duplicates(records, near=near, similarity=similarity))
    special: dict[str, Any] = {}
    if preferences := [r for r in records if isinstance(r, Preference)]:
        special = _of_preferences(preferences, lengths, prompt_index, implicit and not data.format.conversational)
    elif labelled := [r for r in records if isinstance(r, Labelled)]:
        special = _of_labels(labelled)
    elif ratings := [r for r in records if isinstance(r, Rating)]:
        special = _of_ratings(ratings, prompt_index)
    annotators = {getattr(r, "annotator", None) for r in records} - {None}
    return Statistics(
        rows=len(records),
        prompts=len(keys),
        annotators=len(annotators) or None,
        lengths={name: _lengths(lengths[name], [getattr(r, name) for r in records]) for name in fields},
        duplicates=dict(sorted(reasons.items())),
        both_ways=_judged_both_ways(records),
        **special,
    )


def _lengths(lengths: np.ndarray, texts: Sequence[str]) -> Lengths:
    median, high = np.quantile(lengths, [0.5, 0.95])
    empty = sum(not text for text in texts)
    return Lengths(float(lengths.mean()), float(median), float(high), int(lengths.max()), empty)


def _of_preferences(
    pairs: Sequence[Preference], lengths: dict[str, np.ndarray], prompt_index: np.ndarray, implicit: bool
) -> dict[str, Any]:
    decided = np.array([not pair.tie for pair in pairs])
    difference = np.where(decided, lengths["chosen"] - lengths["rejected"], np.nan)
    longer = np.where(np.isnan(difference) | (difference == 0), np.nan, difference > 0)
    left = np.array([np.nan if pair.position is None or pair.tie else pair.position == "left" for pair in pairs])
    return {
        "ties": int((~decided).sum()),
        "chosen_longer": _known(share_estimate, longer, prompt_index),
        "length_difference": _known(mean_estimate, difference, prompt_index),
        "chosen_left": _known(share_estimate, left, prompt_index),
        "cut_words": sum(map(_is_cut, pairs)) if implicit else None,
    }


def _of_ratings(ratings: Sequence[Rating], prompt_index: np.ndarray) -> dict[str, Any]:
    criteria = np.array([rating.criterion or "" for rating in ratings])
    values = np.array([rating.rating for rating in ratings])
    names = sorted(set(criteria.tolist()))
    return {
        "ratings": {name: mean_estimate(values[criteria == name], prompt_index[criteria == name]) for name in names}
    }


def _of_labels(labelled: Sequence[Labelled]) -> dict[str, Any]:
    return {"labels": dict(Counter(json.dumps(one.label, ensure_ascii=False) for one in labelled).most_common())}


def _known(
    estimate: Callable[[np.ndarray, np.ndarray], Estimate], values: np.ndarray, prompt_index: np.ndarray
) -> Estimate | None:
    return None if np.isnan(values).all() else estimate(values, prompt_index)


def _is_cut(record: Preference) -> bool:
    before, after = record.prompt[-1:], (record.chosen[:1], record.rejected[:1])
    return before.isalnum() and any(character.isalnum() for character in after)


def _judged_both_ways(records: Sequence[Record]) -> int:
    said: dict[Hashable, set[Hashable]] = defaultdict(set)
    for record in records:
        if isinstance(record, Preference) and not record.tie and record.chosen != record.rejected:
            said[record.prompt, frozenset((record.chosen, record.rejected))].add(record.chosen)
        elif isinstance(record, Labelled) and isinstance(record.label, bool):
            said[record.prompt, record.completion].add(record.label)
    return sum(len(answers) > 1 for answers in said.values())
