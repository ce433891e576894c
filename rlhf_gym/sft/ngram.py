"""The baseline that a language model has to beat: counting. An n-gram model of the same tokens, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .examples import Example

Counts = dict[tuple[int, ...], dict[int, int]]


class Ngram:
    """Interpolated Kneser-Ney: the next token given the last ``order - 1``, smoothed by what follows fewer of them.

    p(w | h) = max(c(h, w) - D, 0) / c(h) + D T(h) / c(h) p(w | h'), where h' is h without its oldest token, T(h) the number
    of different tokens after h, and p(w | no context) ends in the uniform distribution. In the longest contexts c counts
    occurrences, in shorter ones the different tokens before: what follows many contexts is likely in a new one.

    Args:
        examples: What to count: the learnt tokens, each after what its example has before it.
        vocab_size: V.
        order: n, at least 1.
        discount: D, in (0, 1).

    Source:
        Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2.7, with one
        fixed discount.
    """

    def __init__(self, examples: Sequence[Example], vocab_size: int, *, order: int = 4, discount: float = 0.75):
        if order < 1 or not 0 < discount < 1:
            raise ValueError(f"order must be at least 1 and discount in (0, 1), got {order} and {discount}")
        self.vocab_size, self.order, self.discount = vocab_size, order, discount
        self._counts: list[Counts] = [{} for _ in range(order)]
        for example in examples:
            for t in range(example.num_context, len(example.ids)):
                self._count(example.ids[max(0, t - order + 1) : t], example.ids[t])

    def _count(self, context: tuple[int, ...], token: int) -> None:
        for length in range(len(context), -1, -1):
            row = self._counts[length].setdefault(context[len(context) - length :], {})
            row[token] = row.get(token, 0) + 1
            if row[token] > 1:
                return  # seen after this context before: nothing new for shorter ones

    def probability(self, context: Sequence[int], token: int) -> float:
        """p(token | context), of which the last ``order - 1`` tokens matter; above 0, and 1 in sum over the vocabulary."""
        context = tuple(context)[max(0, len(context) - self.order + 1) :]
        p = 1.0 / self.vocab_size
        for length in range(len(context) + 1):
            row = self._counts[length].get(context[len(context) - length :])
            if row is None:
                break
            total = sum(row.values())
            p = (max(row.get(token, 0) - self.discount, 0.0) + self.discount * len(row) * p) / total
        return p

    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        """The same numbers as `Trainer.evaluate` has of a model."""
        total = -sum(
            math.log(self.probability(example.ids[max(0, t - self.order + 1) : t], example.ids[t]))
            for example in examples
            for t in range(example.num_context, len(example.ids))
        )
        return measures(total, examples)


def measures(nats: float, examples: Sequence[Example]) -> dict[str, float]:
    """What is told of examples whose learnt tokens have -log p of ``nats`` in sum, see `Trainer.evaluate`."""
    loss = nats / sum(example.num_tokens for example in examples)
    num_bytes = sum(example.num_bytes for example in examples)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # float64 ends there
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.nan,
    }
