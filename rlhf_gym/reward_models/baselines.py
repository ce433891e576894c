"""What simple models make of the same judgements: without them no number about a reward model says anything.

* ``linear``: a linear model on the words of a response, weighted by TF-IDF.
* ``n-gram``: the same on single words and pairs of neighbours.
* ``longer``: the longer response is the better one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_gym.rewards.text import words_of

from .examples import Examples
from .linear import LinearFit, fit_linear
from .model import texts_of
from .objectives import Objective

ORDERS = {"linear": 1, "n-gram": 2}
MAX_JUDGEMENTS = 20_000


class TfIdf:
    """Texts as sparse vectors of unit length: (1 + log count) * (1 + log((1 + N) / (1 + texts with the n-gram))).

    Args:
        texts: What it is fitted on; n-grams that occur in one of them alone are left out.
        order: Longest n-gram, in words.
    """

    def __init__(self, texts: Sequence[str], order: int):
        self.order = order
        counts = Counter(gram for text in texts for gram in set(self._grams(text)))
        kept = sorted(gram for gram, count in counts.items() if count > 1)
        self.place = {gram: i for i, gram in enumerate(kept)}
        self.idf = 1 + np.log((1 + len(texts)) / (1 + np.array([counts[gram] for gram in kept], dtype=np.float64)))

    def _grams(self, text: str) -> list[str]:
        words = words_of(text)
        return [" ".join(words[i : i + n]) for n in range(1, self.order + 1) for i in range(len(words) - n + 1)]

    def __call__(self, texts: Sequence[str]) -> Any:
        """Shape (N, number of n-grams), scipy CSR."""
        from scipy.sparse import csr_matrix

        values, columns, ends = [], [], [0]
        for text in texts:
            counts = Counter(self.place[gram] for gram in self._grams(text) if gram in self.place)
            places = sorted(counts)
            weights = (1 + np.log([counts[i] for i in places])) * self.idf[places]
            values.append(weights / max(1e-12, float(np.linalg.norm(weights))))
            columns += places
            ends.append(len(columns))
        data = np.concatenate(values) if values else np.zeros(0)
        return csr_matrix((data, np.array(columns, dtype=np.int64), ends), shape=(len(texts), len(self.place)))


@dataclass(frozen=True)
class Baseline:
    """A fitted linear model of n-grams."""

    vectors: TfIdf
    fit: LinearFit
    with_prompt: bool

    def __call__(self, examples: Examples) -> np.ndarray:
        """Outputs for all responses, one after the other. Shape (T, C)."""
        return self.fit(self.vectors(_read(examples, self.with_prompt)))


def fit_baseline(examples: Examples, objective: Objective, order: int) -> Baseline:
    """Fit n-grams of up to ``order`` words to judgements (the first 20,000), by the loss of the reward model.

    Compared responses have the prompt in common, and a linear model does not see what is common to both.
    """
    examples = examples.where([i < MAX_JUDGEMENTS for i in range(len(examples))])
    with_prompt = examples.kind != "preference"
    texts = _read(examples, with_prompt)
    vectors = TfIdf(texts, order)
    return Baseline(vectors, fit_linear(vectors(texts), examples.items, objective), with_prompt)


def _read(examples: Examples, with_prompt: bool) -> list[str]:
    prompts, responses = texts_of(examples)
    if not with_prompt:
        return responses
    return [f"{prompt} {response}" for prompt, response in zip(prompts, responses, strict=True)]
