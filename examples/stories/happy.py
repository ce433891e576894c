"""A reward in plain Python: happy words per ten words, each counted once, less what the story repeats.

A story shorter than 40 words is counted as one of 40: without that rule the policy finds out that the quickest way to a high
share is to stop after three happy words.
"""

from __future__ import annotations

import re

HAPPY = frozenset(
    "happy happily glad joy joyful smile smiled smiling laugh laughed laughing fun funny play played playing love loved lovely nice kind good great "
    "best friend friends hug hugged proud excited wonderful beautiful pretty sunny warm yummy sweet safe cheerful thank thanks enjoyed liked".split()
)


def happy_words(completions: list[str]) -> list[float]:
    """10 * (distinct happy words / max(words, 40)) * (1 - share of word pairs that stood before). Between 0 and 10."""
    return [score(text) for text in completions]


def score(text: str) -> float:
    """Score of one story."""
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 2:
        return 0.0
    pairs = list(zip(words, words[1:], strict=False))
    return 10.0 * len(HAPPY & set(words)) / max(len(words), 40) * len(set(pairs)) / len(pairs)
