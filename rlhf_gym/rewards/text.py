"""Rewards that read the text alone: keyword, regex, length, repetition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Thai, Lao, Burmese, Khmer, Japanese, Chinese: scripts without spaces. Each of their letters counts as a word, or a
# sentence would be one.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W{UNSPACED}]"
_WORD = re.compile(rf"{_LETTER}+(?:['’]{_LETTER}+)*|[{UNSPACED}]")

BatchReward = Callable[..., list[float]]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation: "Don't!" is one word, "don't"; "我爱你。" is three."""
    return _WORD.findall(text.lower())


def keyword(words: str | Sequence[str], *, count: str = "any") -> BatchReward:
    """Whether, or how often, a response uses certain words. Case does not matter; only whole words count.

    Args:
        words: Words or phrases ("thank you").
        count: What to return. "any": 1 if at least one occurs, else 0. "distinct": the share of the listed words that
            occur, in [0, 1]. "occurrences": how often they occur in all. "share": the share of the response's words
            that belong to them, in [0, 1].

    Raises:
        ValueError: If there are no words, one is empty, or ``count`` is none of these.

    Example:
        >>> keyword(["great", "good"], count="share")(["Good, great, GREAT fun!", "greatly"])
        [0.75, 0.0]
    """
    listed = [words] if isinstance(words, str) else list(words)
    if not listed or not all(isinstance(word, str) and word.strip() for word in listed):
        raise ValueError(f"keyword: words must be one or more strings that are not empty, got {words!r}")
    check_choice("keyword: count", count, ("any", "distinct", "occurrences", "share"))
    unique = list(dict.fromkeys(" ".join(word.lower().split()) for word in listed))
    pattern = re.compile(
        "|".join(map(_whole_word, sorted(unique, key=len, reverse=True)))
    )  # the longest phrase is tried first

    def score(text: str) -> float:
        found = [" ".join(match.split()) for match in pattern.findall(text.lower())]
        if count == "any":
            return float(bool(found))
        if count == "distinct":
            return len(set(found)) / len(unique)
        if count == "occurrences":
            return float(len(found))
        return sum(max(1, len(words_of(match))) for match in found) / max(1, len(words_of(text)))

    return _batched("keyword", score)


def _whole_word(word: str) -> str:
    """Pattern of a word or phrase, as whole words where its script has spaces."""
    # Look-arounds in place of \b, which needs a letter at its side: "c++" ends in none.
    unspaced = re.compile(f"[{UNSPACED}]")
    before = "" if unspaced.match(word[0]) else f"(?<!{_LETTER})"
    after = "" if unspaced.match(word[-1]) else f"(?!{_LETTER})"
    return before + r"\s+".join(map(re.escape, word.split())) + after


def regex(pattern: str | re.Pattern[str], *, full_match: bool = False) -> BatchReward:
    """1 if a regular expression matches, else 0: for output formats.

    Args:
        pattern: Python regular expression, or a compiled one with its flags.
        full_match: The whole response must match, without regard to white space around it; otherwise a match anywhere
            will do.

    Raises:
        ValueError: If the pattern is not a valid regular expression.

    Example:
        >>> regex(r"<answer>-?\\d+</answer>", full_match=True)(["<answer>42</answer>", "42"])
        [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"regex: pattern must be a regular expression, got {pattern!r} ({error})") from None
    if full_match:
        return _batched("regex", lambda text: float(compiled.fullmatch(text.strip()) is not None))
    return _batched("regex", lambda text: float(compiled.search(text) is not None))


def length(target: float | None = None, *, unit: str = "tokens") -> BatchReward:
    """Length of the response, or minus its distance from a target.

    Args:
        target: None scores the length n itself. A number scores -abs(n - target), best 0.
        unit: "tokens" (of the policy, EOS included), "words" or "characters".

    Raises:
        ValueError: If ``target`` is negative or not finite, or ``unit`` is none of these.

    Example:
        >>> length(3, unit="words")(["one two three", "one"], [[5, 6, 7, 0], [5, 0]])
        [0.0, -2.0]
    """
    check_choice("length: unit", unit, ("tokens", "words", "characters"))
    if target is not None and not 0 <= target < float("inf"):
        raise ValueError(f"length: target must be None or a finite number >= 0, got {target}")

    def score(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        lengths = [
            len(ids) if unit == "tokens" else len(words_of(text)) if unit == "words" else len(text)
            for text, ids in zip(completions, completion_ids, strict=True)
        ]
        return [float(n) if target is None else 0.0 - abs(n - target) for n in lengths]

    score.__name__ = "length"
    return score


def repetition(ngram: int = 2) -> BatchReward:
    """Minus the share of the response's word n-grams that it has said before: 0 without repetition, near -1 for a loop.

    -(1 - distinct n-grams / n-grams); 0 for a response too short to repeat one.

    Args:
        ngram: Words per n-gram, >= 1.

    Raises:
        ValueError: If ``ngram`` is not an integer >= 1.

    Source:
        rep-n of Welleck et al. 2020, "Neural text generation with unlikelihood training", sec. 6, over words in place
        of tokens.

    Example:
        >>> repetition()(["so very very very good"])  # so-very, very-very, very-very, very-good
        [-0.25]
    """
    if isinstance(ngram, bool) or not isinstance(ngram, int) or ngram < 1:
        raise ValueError(f"repetition: ngram must be an integer >= 1, got {ngram!r}")

    def score(text: str) -> float:
        words = words_of(text)
        ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
        return (len(set(ngrams)) - len(ngrams)) / len(ngrams) if ngrams else 0.0

    return _batched("repetition", score)


def _batched(name: str, score: Callable[[str], float]) -> BatchReward:
    def scores(completions: list[str]) -> list[float]:
        return [score(text) for text in completions]

    scores.__name__ = scores.__qualname__ = name
    return scores


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {value!r}")
