"""Ready automata: keywords, word scores, repetitions, length, patterns, and combinations of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .automaton import Automaton
from .pattern import derivative, nullable, parse


def keywords(words: Sequence[str], *, every: bool = False, name: str = "keywords") -> Automaton:
    """1 if one of the words occurs (``every``: if all of them do), else 0.

    Raises:
        ValueError: If there are no words.
    """
    wanted = frozenset([words] if isinstance(words, str) else words)
    if not wanted:
        raise ValueError("keywords: words must hold at least one word")
    if every:
        return Automaton(
            frozenset(),
            lambda seen, word: seen | {word} if word in wanted else seen,
            final=lambda seen, ended: float(seen == wanted),
            name=name,
        )
    return Automaton(False, lambda seen, word: seen or word in wanted, final=lambda seen, ended: float(seen), name=name)


def word_scores(scores: Mapping[str, float], *, cap: float | None = None, name: str = "word_scores") -> Automaton:
    """The sum of the words' scores (0 for a word that is not listed), paid word by word.

    Args:
        scores: Score of each word.
        cap: The most that the sum can come to; words are paid until it is reached. It needs scores >= 0.
        name: Its term in the ledger.

    Raises:
        ValueError: If a cap meets a negative score: whether the sum went beyond it would then depend on the order.
    """
    listed = dict(scores)
    if cap is None:
        return Automaton(
            (), lambda state, word: state, token_reward=lambda state, word: listed.get(word, 0.0), name=name
        )
    if min(listed.values(), default=0.0) < 0 or cap < 0:
        raise ValueError(f"word_scores: with a cap all scores and the cap must be >= 0, got {listed} and cap={cap}")

    def add(total: float, word: str) -> float:
        return min(cap, round(total + listed.get(word, 0.0), 9))  # rounded: .1 + .2 and .3 are one state

    return Automaton(0.0, add, token_reward=lambda total, word: add(total, word) - total, name=name)


def repetitions(name: str = "repetitions") -> Automaton:
    """The number of words that repeat the word before them, paid word by word."""
    return Automaton(None, lambda last, word: word, token_reward=lambda last, word: float(last == word), name=name)


def length_window(low: int, high: int, *, name: str = "length_window") -> Automaton:
    """1 if the response has from ``low`` to ``high`` words (EOS is none), else 0.

    Raises:
        ValueError: Unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"length_window: it must be 0 <= low <= high, got {low} and {high}")
    return Automaton(0, lambda n, word: min(n + 1, high + 1), final=lambda n, ended: float(low <= n <= high), name=name)


def matches(pattern: str, *, name: str = "matches") -> Automaton:
    """1 if the whole response matches a regular expression over words, else 0.

    Words stand as they are, side by side; ``( ) | * + ?`` mean what they always do and ``.`` is any word. A backslash
    makes an operator part of a word.

    Raises:
        ValueError: If the pattern cannot be read.

    Example:
        >>> polite = matches("(please | kindly) .* thanks?")
    """
    return Automaton(parse(pattern), derivative, final=lambda rest, ended: float(nullable(rest)), name=name)


def combine(function: Callable[..., float], *automata: Automaton, name: str = "combine") -> Automaton:
    """``function`` of the scores of several automata, paid at the end: ``combine(min, a, b)`` is 1 if both are.

    Weighted sums need nothing of the kind: ``reward={a: 1.0, b: -0.5}``.

    Raises:
        ValueError: If there are none, or one pays word by word: its score is not a function of its last state.
    """
    if not automata or any(each.dense for each in automata):
        raise ValueError("combine takes one or more automata that pay at the end only (final, no token_reward)")
    finals: list[Callable[[Any, bool], float]] = [each.final for each in automata if each.final is not None]
    return Automaton(
        tuple(each.initial for each in automata),
        lambda states, word: tuple(each.step(state, word) for each, state in zip(automata, states, strict=True)),
        final=lambda states, ended: function(
            *(final(state, ended) for final, state in zip(finals, states, strict=True))
        ),
        name=name,
    )
