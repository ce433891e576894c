"""Metrics of texts: overlap with references, diversity, repetition and fluency, each with a 95 % interval over prompts.

With a number of its own for each response in the place of ``prompt_index`` it is an interval over responses.

All are in [0, 1] but perplexity. Words are those of ``rlhf_gym.rewards.text.words_of``: lower case, without punctuation,
letter by letter in scripts without spaces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_gym.intervals import Estimate, bootstrap_estimate, jackknife_estimate, mean_estimate
from rlhf_gym.rewards.overlap import bleu_metric, choose_tokenizer, chrf_metric, rouge_l_score
from rlhf_gym.rewards.text import repetition, words_of

SELF_BLEU_RESPONSES = 500
MAX_ORDER = 4


def reference_overlap(
    texts: Sequence[str], references: Sequence[Sequence[str]], prompt_index: np.ndarray, *, seed: int = 0
) -> dict[str, Estimate]:
    """BLEU and chrF of the corpus where sacrebleu is installed, and the mean ROUGE-L.

    BLEU is sacrebleu's corpus BLEU-4 with its tokenizer "13a" ("zh" or "char" where most letters of the references are of
    a script without spaces), chrF its corpus chrF; both in [0, 1] here, with bootstrap intervals.

    Args:
        texts: N responses.
        references: One or more for each response.
        prompt_index: Which prompt each response answers. Shape (N,), integers.
        seed: Seed of the bootstrap.
    """
    found = {}
    if texts:
        every = [reference for group in references for reference in group]
        try:
            metrics = {
                "bleu": bleu_metric(choose_tokenizer(every), of_sentences=False),
                "chrf": chrf_metric(),
            }
        except ImportError:
            metrics = {}
        for name, metric in metrics.items():
            found[name] = _corpus_estimate(metric, texts, references, prompt_index, seed)
    rouge = [rouge_l_score(text, group) for text, group in zip(texts, references, strict=True)]
    return found | {"rouge_l": mean_estimate(np.array(rouge, dtype=np.float64), prompt_index)}


def _corpus_estimate(
    metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]], prompt_index: np.ndarray, seed: int
) -> Estimate:
    """A corpus score of sacrebleu, with responses drawn by prompt: its own bootstrap draws each by itself."""
    # sacrebleu takes one stream per place among the references, None where a response has fewer.
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(max(map(len, references)))]
    sums = np.array(metric._extract_corpus_statistics(list(texts), streams), dtype=np.int64)
    return bootstrap_estimate(
        lambda total: metric._compute_score_from_stats(total.tolist()).score / 100, sums, prompt_index, seed=seed
    )


def diversity(texts: Sequence[str], prompt_index: np.ndarray, *, seed: int = 0) -> dict[str, Estimate]:
    """``distinct_1`` to ``distinct_3``, ``self_bleu``, and ``repeated_bigrams`` within each response.

    Only ``repeated_bigrams`` is a mean over responses; the others fall or rise with the number of responses, so compare
    them at the same number. Self-BLEU is that of 500 responses, drawn by ``seed``, where there are more.

    Args:
        texts: N responses.
        prompt_index: Which prompt each response answers. Shape (N,), integers.
        seed: Seed of the draw.
    """
    found = {f"distinct_{n}": jackknife_estimate(distinct_n(texts, n), prompt_index) for n in (1, 2, 3)}
    drawn = np.arange(len(texts))
    if len(texts) > SELF_BLEU_RESPONSES:
        drawn = np.sort(np.random.default_rng(seed).choice(len(texts), SELF_BLEU_RESPONSES, replace=False))
    found["self_bleu"] = jackknife_estimate(self_bleu([texts[i] for i in drawn.tolist()]), prompt_index[drawn])
    repeated = -np.array(repetition(ngram=2)(completions=list(texts)), dtype=np.float64) + 0.0
    return found | {"repeated_bigrams": mean_estimate(repeated, prompt_index)}


def distinct_n(texts: Sequence[str], n: int) -> Callable[[np.ndarray], float]:
    """Distinct-n of any part of the responses: their different word n-grams over all their word n-grams, pooled.

    Args:
        texts: N responses.
        n: Words per n-gram.

    Returns:
        A function from the responses to count, shape (N,) bool, to the share; NaN where they have no n-gram.

    Source:
        Li et al. 2016, "A diversity-promoting objective function for neural conversation models", sec. 5.
    """
    document, gram, count = _ngrams([words_of(text) for text in texts], n)

    def share(keep: np.ndarray) -> float:
        kept = keep[document]
        total = int(count[kept].sum())
        return len(np.unique(gram[kept])) / total if total else math.nan

    return share


def self_bleu(texts: Sequence[str]) -> Callable[[np.ndarray], float]:
    """Self-BLEU of any part of the responses: the mean BLEU-4 of each with all the others as its references.

    1 when all are alike. BLEU is sacrebleu's of a sentence (exponential smoothing, orders that the response is too short
    for left out) over words; an empty response counts 1 if another one is empty, too, else 0. Costs no more than one
    pass: of an n-gram's counts in the other responses only the largest matters, so the two largest of all are enough.

    Args:
        texts: N responses.

    Returns:
        A function from the responses to count, shape (N,) bool, to the mean; NaN where there are fewer than two.

    Source:
        Zhu et al. 2018, "Texygen", sec. 2.3.
    """
    words = [words_of(text) for text in texts]
    lengths = np.array([len(w) for w in words], dtype=np.int64)
    tables = [_ngrams(words, n) for n in range(1, MAX_ORDER + 1)]

    def mean(keep: np.ndarray) -> float:
        if keep.sum() < 2:
            return math.nan
        matches = np.stack([_matches_in_others(*table, keep) for table in tables], axis=1)
        total = np.maximum(lengths[:, None] - np.arange(MAX_ORDER), 0)
        scores = _sentence_bleu(matches[keep], total[keep], _closest_other(lengths[keep]))
        empty = lengths[keep] == 0
        scores[empty] = float(empty.sum() > 1)
        return float(scores.mean())

    return mean


def perplexity_estimate(
    logprobs: np.ndarray, num_tokens: np.ndarray, prompt_index: np.ndarray, *, seed: int = 0
) -> Estimate:
    """Perplexity of all responses under a language model: exp of minus the mean log-probability of their tokens.

    Each *token* counts once; an empty response has none. The interval is the bootstrap's.

    Args:
        logprobs: log p of each response given its prompt, nats. Shape (N,), float64.
        num_tokens: Its tokens under that model. Shape (N,), integers.
        prompt_index: Which prompt each response answers. Shape (N,), integers.
        seed: Seed of the bootstrap.
    """

    def statistic(sums: np.ndarray) -> float:
        return float(np.exp(-sums[0] / sums[1])) if sums[1] else math.nan

    return bootstrap_estimate(statistic, np.stack([logprobs, num_tokens], axis=1), prompt_index, seed=seed)


def _ngrams(documents: Sequence[Sequence[str]], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each n-gram occurs in each document: arrays (document, n-gram, count), sorted by n-gram, then count."""
    ids: dict[tuple[str, ...], int] = {}
    rows = [
        (document, ids.setdefault(gram, len(ids)), count)
        for document, words in enumerate(documents)
        for gram, count in Counter(zip(*(words[i:] for i in range(n)), strict=False)).items()
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    table = table[np.lexsort((table[:, 2], table[:, 1]))]
    return table[:, 0], table[:, 1], table[:, 2]


def _matches_in_others(document: np.ndarray, gram: np.ndarray, count: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Clipped matches of each document against the other kept ones. Shape (N,), int64, 0 for those not kept."""
    kept = keep[document]
    document, gram, count = document[kept], gram[kept], count[kept]
    # The last row of an n-gram has its largest count; the row before it the largest among the others of that document.
    last = np.append(gram[1:] != gram[:-1], True) if len(gram) else np.zeros(0, dtype=bool)
    largest = count[last][np.cumsum(last) - last]
    second = np.where(np.append(False, gram[1:] == gram[:-1])[: len(gram)], np.append(0, count[:-1])[: len(gram)], 0)
    others = np.where(last, second, largest)
    return np.bincount(document, np.minimum(count, others), minlength=len(keep)).astype(np.int64)


def _closest_other(lengths: np.ndarray) -> np.ndarray:
    """Of all other lengths the one closest to each, the shorter of two. Shape (N,), int64; N >= 2."""
    order = np.argsort(lengths, kind="stable")
    ranked = lengths[order]
    below = np.append(ranked[0] - 2 * (ranked[-1] + 1), ranked[:-1])  # farther than any
    above = np.append(ranked[1:], 3 * (ranked[-1] + 1))
    closest = np.empty_like(lengths)
    closest[order] = np.where(ranked - below <= above - ranked, below, above)
    return closest


def _sentence_bleu(matches: np.ndarray, total: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """BLEU of sentences as sacrebleu computes it with ``effective_order``; matches and totals (N, 4). Shape (N,), float64."""
    # A precision of 0 becomes 1 / (2^k total) for the k-th such order.
    halvings = np.cumsum((matches == 0) & (total > 0), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(matches > 0, matches, 0.5**halvings) / total
        log_precision = np.where(total > 0, np.log(precision), 0.0).sum(1) / np.maximum(1, (total > 0).sum(1))
        length = total[:, 0]
        log_brevity = np.minimum(0.0, 1 - reference_length / length)
        scores = np.exp(log_precision + log_brevity)
    return np.where(matches.any(1), scores, 0.0)
