"""How far a text agrees with references: pure functions on one text, which rewards and evaluation share."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .text import UNSPACED, check_choice, words_of

ARTICLES = ("a", "an", "the")
# Those of sacrebleu's tokenizers that need no further package and no download.
TOKENIZERS = ("13a", "char", "intl", "none", "zh")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_SQUAD_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def lcs_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common subsequence.

    Source:
        Hyyrö 2004, "Bit-parallel LCS-length computation revisited": one row of the table is one integer, so a pair of
        responses costs microseconds.
    """
    places: dict[Any, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for item in b:
        matched = row & places.get(item, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


def rouge_l_score(text: str, references: Sequence[str]) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, in [0, 1]; of several references the best counts.

    Source:
        Lin 2004, "ROUGE: a package for automatic evaluation of summaries", sec. 3.1, with beta = 1 as in Google's
        ``rouge_score``. Words are those of :func:`words_of`, without stemming: unlike there, letters other than a-z
        count, and a script without spaces goes letter by letter.
    """
    words = words_of(text)
    best = 0.0
    for reference in references:
        wanted = words_of(reference)
        if words and wanted:
            # 2 P R / (P + R) with P = lcs / len(words) and R = lcs / len(wanted)
            best = max(best, 2 * lcs_length(words, wanted) / (len(words) + len(wanted)))
    return best


def squad_words(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: lower case, without punctuation and articles.

    Differs from SQuAD's script in three ways: punctuation of every script is removed, not of ASCII alone; a script
    without spaces goes letter by letter (so an F1 of Chinese answers is more than 0 or 1); and articles stay where
    nothing else would, or the answer "A" of a multiple choice would equal the empty response.

    Source:
        Rajpurkar et al. 2018, ``evaluate-v2.0.py``, ``normalize_answer``.
    """
    plain = "".join(
        c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P")
    )
    words = _SQUAD_WORD.findall(plain)
    return [word for word in words if word not in ARTICLES] or words


def token_f1_score(text: str, references: Sequence[str]) -> float:
    """F1 of the words that a response shares with a reference, in [0, 1]; of several references the best counts.

    Where one of the two has no words, 1 if the other has none either, else 0 (as SQuAD 2.0).
    """
    words = Counter(squad_words(text))
    best = 0.0
    for reference in references:
        wanted = Counter(squad_words(reference))
        if not words or not wanted:
            best = max(best, float(words == wanted))
        else:
            best = max(best, 2 * (words & wanted).total() / (words.total() + wanted.total()))
    return best


def choose_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's tokenizer for these references.

    "13a", the usual one, splits at spaces: a sentence without any would be one word, right or wrong as a whole. Where
    most letters are of a script without spaces it is therefore "zh" (Chinese alone) or "char".
    """
    letters = [c for reference in references for c in reference if c.isalpha()]
    unspaced = [c for c in letters if re.match(f"[{UNSPACED}]", c)]
    if 2 * len(unspaced) <= len(letters):
        return "13a"
    return "zh" if all(map(_HAN.match, unspaced)) else "char"


@functools.cache
def bleu_metric(tokenize: str, *, of_sentences: bool) -> Any:
    """sacrebleu's BLEU-4 with its default (exponential) smoothing.

    Args:
        tokenize: One of :data:`TOKENIZERS`.
        of_sentences: Leave out the orders for which the response is too short, as one does for single sentences.

    Raises:
        ImportError: If sacrebleu is missing.
        ValueError: If there is no such tokenizer.
    """
    check_choice("bleu: tokenize", tokenize, TOKENIZERS)
    # force: no warnings about texts that look tokenised; a small model may well write "the end ."
    return import_sacrebleu("bleu").BLEU(tokenize=tokenize, effective_order=of_sentences, force=True)


@functools.cache
def chrf_metric(word_order: int = 0) -> Any:
    """sacrebleu's chrF, or chrF++ with ``word_order=2``.

    Raises:
        ImportError: If sacrebleu is missing.
    """
    return import_sacrebleu("chrf").CHRF(word_order=word_order)


def import_sacrebleu(what: str) -> Any:
    """``sacrebleu.metrics``, which comes with the extra "metrics".

    Raises:
        ImportError: Saying how to install it.
    """
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise ImportError(f"{what} needs sacrebleu ({error}): pip install rlhf_gym[metrics]") from None
    return sacrebleu.metrics


def references_of(value: Any, where: str, *, blank: bool = False) -> list[str]:
    """The references in one cell of a column: a string, or several in a list.

    Args:
        value: The cell.
        where: The cell in words, for the error.
        blank: Whether a reference may be empty.

    Raises:
        ValueError: For anything else, a list of none, or a blank string where it may not be.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(r, str) for r in found):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
        raise ValueError(f"{where} must be a string or a list of strings, not an empty one, got {shown}")
    if not blank and not all(r.strip() for r in found):
        raise ValueError(f"{where} must not be blank; use None (null) where there is none")
    return list(found)
