"""Rows that are there twice, to the letter or nearly.

Nearly: each text of one row (prompt, and each response) has a Jaccard similarity of at least ``similarity`` with the same
text of the other, over pairs of neighbouring words (punctuation marks count as words), all numbers in them are the same,
and so is the judgement. Numbers, because "12 + 30" and "12 + 31" are two exercises; the judgement, because two people who
judge the same pair have judged twice.

The search misses nothing and draws nothing: it is a similarity join by prefixes. With its words sorted from rare to
common, two texts that similar must share one of their first few; only rows that do are compared.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_gym.rewards.text import UNSPACED

from .records import Preference, Record, judgement_of, texts_of

SIMILARITY = 0.8
# A pair of words that so many rows begin their search with tells nothing; looking them all up would make it quadratic.
MAX_ROWS_PER_PAIR = 1000
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


@dataclass(frozen=True, order=True)
class Duplicate:
    """A row that adds nothing."""

    index: int
    """Its position."""
    of: int
    """The position of the earlier row that it repeats; its own when its two responses are the same."""
    similarity: float
    """The lowest of its texts; 1 when it is the same to the letter."""
    reason: str
    """"exact", "near", or "same response twice"."""


def find_duplicates(records: Sequence[Record], *, near: bool = True, similarity: float = SIMILARITY) -> list[Duplicate]:
    """Rows to leave out so that none repeats another; the first of several stays.

    Exact duplicates are the same but for white space and the way accents are encoded (Unicode NFC).

    Args:
        records: N rows, all of one kind.
        near: Look for near duplicates as well.
        similarity: Least Jaccard similarity of each text of near duplicates, in (0, 1].

    Returns:
        At most one entry for each row, by position.

    Raises:
        ValueError: If ``similarity`` is not in (0, 1].

    Source:
        Chaudhuri, Ganti and Kaushik 2006 and Bayardo, Ma and Srikant 2007 ("Scaling up all pairs similarity search") for
        the prefixes; Xiao et al. 2008 ("Efficient similarity joins for near duplicate detection") for the places in
        them. Misses a near duplicate only where more than 1,000 rows share each of the pairs that it is looked up by.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be above 0 and at most 1, got {similarity:g}")
    found: list[Duplicate] = []
    first: dict[Hashable, int] = {}
    others: list[int] = []
    for i, record in enumerate(records):
        texts = tuple(_same_letters(text) for text in texts_of(record))
        j = first.setdefault((texts, judgement_of(record)), i)
        if isinstance(record, Preference) and texts[1] == texts[2]:
            found.append(Duplicate(i, i, 1.0, "same response twice"))
        elif j != i:
            found.append(Duplicate(i, j, 1.0, "exact"))
        else:
            others.append(i)
    if near and len(others) > 1:
        found += _near([records[i] for i in others], others, similarity)
    return sorted(found)


def _same_letters(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _near(records: Sequence[Record], index: Sequence[int], similarity: float) -> list[Duplicate]:
    """Near duplicates among rows that differ; ``index`` are their positions."""
    vocabulary: dict[str, int] = {}
    tokens = [
        [
            [vocabulary.setdefault(word, len(vocabulary)) for word in _TOKEN.findall(text.casefold())]
            for text in texts_of(record)
        ]
        for record in records
    ]
    numbers = {token for word, token in vocabulary.items() if any(map(str.isdigit, word))}
    # What must be the same to the letter.
    same = [
        (judgement_of(record), tuple(tuple(t for t in text if t in numbers) for text in texts))
        for record, texts in zip(records, tokens, strict=True)
    ]
    fields = [_pairs([texts[k] for texts in tokens], len(vocabulary)) for k in range(len(tokens[0]))]
    # Any text will do for the search; the one with the rarest words compares the fewest rows.
    searched = min(fields, key=lambda field: _work(field, similarity))

    found: list[Duplicate] = []
    rows_with: dict[int, list[tuple[int, int]]] = defaultdict(list)  # pair -> (row, its place there)
    for i, pairs in enumerate(searched):
        prefix = pairs[: _prefix(len(pairs), similarity)].tolist()
        for j in _candidates(prefix, len(pairs), rows_with, searched, similarity):
            score = min(_jaccard(field[i], field[j], similarity) for field in fields) if same[i] == same[j] else 0.0
            if score >= similarity:
                found.append(Duplicate(index[i], index[j], score, "near"))
                break
        else:
            for place, pair in enumerate(prefix):
                if len(rows_with[pair]) < MAX_ROWS_PER_PAIR:
                    rows_with[pair].append((i, place))
    return found


def _candidates(
    prefix: Sequence[int],
    length: int,
    rows_with: dict[int, list[tuple[int, int]]],
    searched: Sequence[np.ndarray],
    similarity: float,
) -> list[int]:
    """The rows that share one of the first pairs and may be as similar, by position.

    Before the first pair that two rows share they share nothing, so they have at most what follows in common.
    """
    seen: set[int] = set()
    found = []
    for place, pair in enumerate(prefix):
        for j, there in rows_with[pair]:
            if j in seen:
                continue
            seen.add(j)
            other = len(searched[j])
            if min(length - place, other - there) >= similarity / (1 + similarity) * (length + other) - 1e-9:
                found.append(j)
    return sorted(found)


def _pairs(texts: Sequence[Sequence[int]], num_words: int) -> list[np.ndarray]:
    """The pairs of neighbouring words of each text, as numbers from rare to common, each once. A text of one word is that
    word, and one of none has a number of its own, so that two such texts are alike."""
    coded = []
    for text in texts:
        words = np.array(text, dtype=np.int64) + 1
        pairs = words[:-1] * (num_words + 1) + words[1:] if len(words) > 1 else (words if len(words) else np.zeros(1))
        coded.append(np.unique(pairs.astype(np.int64)))
    ends = np.cumsum([len(pairs) for pairs in coded])
    _, place, count = np.unique(np.concatenate(coded), return_inverse=True, return_counts=True)
    rank = np.empty(len(count), dtype=np.int64)
    rank[np.argsort(count, kind="stable")] = np.arange(len(count))
    return [np.sort(ranks) for ranks in np.split(rank[place.reshape(-1)], ends[:-1])]


def _prefix(length: int, similarity: float) -> int:
    """How many of a text's rarest pairs must be looked up: without them fewer are left than a similar text has in common."""
    return length - math.ceil(similarity * length - 1e-9) + 1


def _work(field: Sequence[np.ndarray], similarity: float) -> int:
    """Comparisons that a search by this text makes, roughly."""
    # Of two texts equally long, one whose first shared pair comes later than this is never a candidate.
    least = 2 * similarity / (1 + similarity)
    counts = np.unique(np.concatenate([p[: _prefix(len(p), least)] for p in field]), return_counts=True)[1]
    return int((counts.astype(np.int64) ** 2).sum())


def _jaccard(a: np.ndarray, b: np.ndarray, least: float) -> float:
    """Similarity of two sets of numbers, each sorted and without repeats; 0 at once when their sizes rule out ``least``."""
    if min(len(a), len(b)) < least * max(len(a), len(b)) - 1e-9:
        return 0.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
