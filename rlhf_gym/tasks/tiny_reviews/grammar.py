"""Finite probabilistic grammars whose texts have exact probabilities.

A grammar here has no recursion, so it writes finitely many texts and every left-to-right parse of one is a short walk.
A parse in progress is a *stack*: the symbols still to be written, the next one first. Expanding the first symbol until
it is a word gives the words that may come next, each with the stacks that remain. The forward sum over all stacks that
agree with the words so far is then an exact prefix probability (every stack finishes with probability 1), whatever the
ambiguity of the grammar: stacks that coincide are added up.

Pure Python: importing this module loads neither numpy nor torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    import numpy as np

END = "<eos>"
"""The token that ends a text. It lies under every stack, so that "the text ends here" is a word like any other."""

Stack = tuple[str, ...]


class Grammar:
    """A finite probabilistic context-free grammar over words separated by single spaces.

    Args:
        rules: For each symbol, its right-hand sides with positive weights (normalised here). A right-hand side is a
            string of symbols and words; a name that is not a key of ``rules`` is a word. "" writes nothing.
        start: The symbol that a text is derived from.

    Raises:
        ValueError: If ``start`` has no rule, a weight is not positive and finite, or a symbol can contain itself.

    Example:
        >>> grammar = Grammar({"S": {"a": 1, "A b": 3}, "A": {"a": 1, "": 1}}, "S")
        >>> round(math.exp(grammar.log_prob("a b")), 3), grammar.next_token_probs("a")
        (0.375, {'<eos>': 0.4, 'b': 0.6})
    """

    def __init__(self, rules: Mapping[str, Mapping[str, float]], start: str) -> None:
        if start not in rules:
            raise ValueError(f"start must be one of the rules' symbols, got {start!r}")
        self.start = start
        self.rules: dict[str, list[tuple[float, Stack]]] = {}
        for symbol, alternatives in rules.items():
            if not alternatives or not all(0 < weight < math.inf for weight in alternatives.values()):
                raise ValueError(f"the weights of {symbol!r} must be positive and finite, got {dict(alternatives)}")
            total = math.fsum(alternatives.values())
            self.rules[symbol] = [(weight / total, tuple(rhs.split())) for rhs, weight in alternatives.items()]
        self._cumulative = {symbol: list(accumulate(p for p, _ in alts)) for symbol, alts in self.rules.items()}
        self._arcs_of: dict[Stack, dict[str, dict[Stack, float]]] = {}
        self.max_tokens = self._longest(start, {}, ())
        """Words in the longest text, the end not counted."""

    @property
    def vocabulary(self) -> list[str]:
        """The words that occur in the rules, sorted; without the end."""
        used = {name for alternatives in self.rules.values() for _, rhs in alternatives for name in rhs}
        return sorted(used - self.rules.keys())

    def sample(self, rng: np.random.Generator | random.Random) -> str:
        """Write one text; every random choice is one ``rng.random()``."""
        words, stack = [], [self.start]
        while stack:
            symbol = stack.pop()
            if symbol in self.rules:
                alternatives = self.rules[symbol]
                # The last cumulative sum may round to just below 1: such a draw belongs to the last alternative.
                index = min(bisect_right(self._cumulative[symbol], rng.random()), len(alternatives) - 1)
                stack.extend(reversed(alternatives[index][1]))
            else:
                words.append(symbol)
        return " ".join(words)

    def parses(self, tokens: Iterable[str], start: str | None = None) -> dict[Stack, float]:
        """All stacks that remain after ``tokens``, with the joint probability of the tokens and the stack.

        Args:
            tokens: The first words of a text, or a whole text followed by ``END``.
            start: Derive from this symbol instead of the grammar's start: the probability given a latent choice.

        Returns:
            Stack to probability; the values sum to the probability that a text begins with ``tokens``. Empty when
            none does.
        """
        beliefs: dict[Stack, float] = {(start or self.start, END): 1.0}
        for token in tokens:
            after: dict[Stack, float] = {}
            for stack, probability in beliefs.items():
                for rest, p in self._arcs(stack).get(token, {}).items():
                    after[rest] = after.get(rest, 0.0) + probability * p
            if not after:
                return {}
            beliefs = after
        return beliefs

    def log_prob(self, text: str, start: str | None = None) -> float:
        """Natural log of the probability of the whole text, over all its derivations; -inf when it has none."""
        total = math.fsum(self.parses([*text.split(), END], start).values())
        return math.log(total) if total > 0 else -math.inf

    def next_token_probs(self, prefix: str = "", start: str | None = None) -> dict[str, float]:
        """Exact distribution of the word that follows ``prefix``, ``END`` among them.

        Their product along a text is the text's probability, so this is the distribution that the best possible
        language model of the grammar predicts.

        Raises:
            ValueError: If no text of the grammar begins with ``prefix``.
        """
        beliefs = self.parses(prefix.split(), start)
        total = math.fsum(beliefs.values())
        if not total:
            raise ValueError(f"prefix must be the beginning of a text of the grammar, got {prefix!r}")
        probs: dict[str, float] = {}
        for stack, probability in beliefs.items():
            for token, rests in self._arcs(stack).items():
                probs[token] = probs.get(token, 0.0) + probability / total * math.fsum(rests.values())
        return dict(sorted(probs.items()))

    def perplexity(self, texts: Iterable[str]) -> float:
        """exp of the mean of -log p per token, the end counted as a token: the floor for any language model."""
        num_tokens, total = 0, 0.0
        for text in texts:
            num_tokens += len(text.split()) + 1
            total -= self.log_prob(text)
        return math.exp(total / num_tokens)

    def _arcs(self, stack: Stack) -> dict[str, dict[Stack, float]]:
        """What the stack may write next: word -> stacks that then remain -> probability. Memoised."""
        known = self._arcs_of.get(stack)
        if known is not None:
            return known
        arcs: dict[str, dict[Stack, float]] = {}
        if stack and stack[0] not in self.rules:
            arcs[stack[0]] = {stack[1:]: 1.0}
        elif stack:
            for p, rhs in self.rules[stack[0]]:
                for token, rests in self._arcs(rhs + stack[1:]).items():
                    merged = arcs.setdefault(token, {})
                    for rest, q in rests.items():
                        merged[rest] = merged.get(rest, 0.0) + p * q
        self._arcs_of[stack] = arcs
        return arcs

    def _longest(self, symbol: str, known: dict[str, int], above: tuple[str, ...]) -> int:
        """Words in the longest text of a symbol; refuses recursion, without which every walk here ends."""
        if symbol not in self.rules:
            return 1
        if symbol in above:
            raise ValueError(f"rules must not be recursive, but {symbol!r} can contain itself")
        if symbol not in known:
            known[symbol] = max(
                sum(self._longest(name, known, (*above, symbol)) for name in rhs) for _, rhs in self.rules[symbol]
            )
        return known[symbol]
