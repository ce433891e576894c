"""Rewards that compare a response with references from a column of the prompts: BLEU, chrF, ROUGE-L, exact match, F1."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .inputs import BATCH_NAMES
from .overlap import (
    bleu_metric,
    choose_tokenizer,
    chrf_metric,
    import_sacrebleu,
    references_of,
    rouge_l_score,
    squad_words,
    token_f1_score,
)

ReferenceReward = Callable[..., list[float | None]]


def bleu(column: str = "reference", *, tokenize: str | None = None) -> ReferenceReward:
    """BLEU-4 of each response, in [0, 1], by sacrebleu: exponential smoothing, and no order that it is too short for.

    Args:
        column: Where the references are: in each row a string, a list of strings, or None where there is none (the
            reward does not apply then). BLEU takes all of them into account.
        tokenize: sacrebleu's "13a", "char", "intl", "none" or "zh". None takes "13a", or for references in a script
            without spaces "zh" or "char".

    Raises:
        ImportError: If sacrebleu is missing (``pip install rlhf_gym[metrics]``).
        ValueError: If ``column`` cannot name a parameter, or there is no such tokenizer.

    Source:
        Papineni et al. 2002; Post 2018, "A call for clarity in reporting BLEU scores". sacrebleu's own scores are 100
        times these. The mean over responses is not the BLEU of the corpus, which ``rlhf-gym evaluate`` reports.

    Example:
        >>> bleu()(["the cat sat", ""], ["the cat sat", ["a dog", "a cat"]])
        [1.0, 0.0]
    """
    import_sacrebleu("bleu")  # now, not after the first rollout
    if tokenize is not None:
        bleu_metric(tokenize, of_sentences=True)

    def score(text: str, references: list[str]) -> float:
        metric = bleu_metric(tokenize or choose_tokenizer(references), of_sentences=True)
        return min(1.0, metric.sentence_score(text, references).score / 100)  # never a rounding error above 1

    return against_column("bleu", column, score)


def chrf(column: str = "reference", *, word_order: int = 0) -> ReferenceReward:
    """chrF of each response, in [0, 1], by sacrebleu: F2 of character n-grams up to 6; needs no tokenizer.

    Args:
        column: As in :func:`bleu`; of several references the best counts.
        word_order: 2 adds word n-grams up to 2, which makes it chrF++.

    Raises:
        ImportError: If sacrebleu is missing (``pip install rlhf_gym[metrics]``).
        ValueError: If ``column`` cannot name a parameter, or ``word_order`` is not 0, 1 or 2.

    Source:
        Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation"; 2017 for chrF++.
    """
    if isinstance(word_order, bool) or word_order not in (0, 1, 2):
        raise ValueError(f"chrf: word_order must be 0, 1 or 2, got {word_order!r}")
    metric = chrf_metric(word_order)
    return against_column("chrf", column, lambda text, references: metric.sentence_score(text, references).score / 100)


def rouge_l(column: str = "reference") -> ReferenceReward:
    """ROUGE-L of each response: F1 of the longest common subsequence of words, in [0, 1].

    Args:
        column: As in :func:`bleu`; of several references the best counts.

    Raises:
        ValueError: If ``column`` cannot name a parameter.

    Source:
        See :func:`rlhf_gym.rewards.overlap.rouge_l_score`.

    Example:
        >>> rouge_l()(["police killed the gunman"], ["police kill the gunman"])  # three of four words, in order
        [0.75]
    """
    return against_column("rouge_l", column, rouge_l_score)


def exact_match(column: str = "answer", *, normalize: bool = True) -> ReferenceReward:
    """1 if the response is one of the answers, else 0.

    Args:
        column: As in :func:`bleu`, but an answer may be empty.
        normalize: Without regard to case, punctuation, articles and white space, as SQuAD does; False compares the texts
            as they are but for white space around them.

    Raises:
        ValueError: If ``column`` cannot name a parameter.

    Source:
        See :func:`rlhf_gym.rewards.overlap.squad_words`.

    Example:
        >>> exact_match()(["The Seine.", "Seine river"], [["Seine", "River Seine"], "Seine"])
        [1.0, 0.0]
    """

    def score(text: str, references: list[str]) -> float:
        form = squad_words if normalize else str.strip
        return float(any(form(text) == form(reference) for reference in references))

    return against_column("exact_match", column, score, blank=True)


def token_f1(column: str = "answer") -> ReferenceReward:
    """F1 of the words that the response shares with the answer, after SQuAD's normalisation, in [0, 1].

    Args:
        column: As in :func:`bleu`, but an answer may be empty; of several answers the best counts.

    Raises:
        ValueError: If ``column`` cannot name a parameter.

    Source:
        See :func:`rlhf_gym.rewards.overlap.token_f1_score`.

    Example:
        >>> token_f1()(["the river Seine"], ["Seine"])  # precision 1/2, recall 1
        [0.6666666666666666]
    """
    return against_column("token_f1", column, token_f1_score, blank=True)


def against_column(
    name: str,
    column: str,
    score: Callable[[str, Any], float],
    *,
    blank: bool = False,
    read: Callable[[Any, str], Any] | None = None,
) -> ReferenceReward:
    """A batch reward whose signature is ``(completions, <column>)``: the environment passes and checks the column by name.

    Args:
        name: Its name in the ledger.
        column: Name of the column.
        score: From a response and what its cell holds to a number.
        blank: Whether a reference may be empty.
        read: From a cell and its name in words to what ``score`` takes; None reads references.

    Raises:
        ValueError: If ``column`` cannot name a parameter.
    """
    if not isinstance(column, str) or not column.isidentifier() or column in (*BATCH_NAMES, "prompt"):
        raise ValueError(
            f"{name}: column must be a name that Python allows for a parameter, other than prompt, "
            f"{', '.join(BATCH_NAMES)}, got {column!r}"
        )
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(p, either) for p in ("completions", column)])

    def scores(*args: Any, **kwargs: Any) -> list[float | None]:
        completions, cells = signature.bind(*args, **kwargs).args
        return [
            None if cell is None else score(text, read_cell(cell, f"row {row}: the column {column!r}"))
            for row, (text, cell) in enumerate(zip(completions, cells, strict=True))
        ]

    def read_cell(cell: Any, where: str) -> Any:
        return references_of(cell, where, blank=blank) if read is None else read(cell, where)

    scores.__signature__ = signature  # type: ignore[attr-defined]
    scores.__name__ = scores.__qualname__ = name
    return scores
