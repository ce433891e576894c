"""Ready rewards that read the text, and the wrappers, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from rlhf_gym.rewards import (
    RewardInputs,
    as_reward,
    clip,
    keyword,
    length,
    length_penalty,
    normalize,
    regex,
    repetition,
    scale,
    sentiment,
)
from rlhf_gym.rewards.lexicon import NEGATIVE, POSITIVE

POLARITY = Path(__file__).parents[1].parent / "shared/assets/data/sentence_polarity/all.jsonl"


def score(reward, *texts, ids=None):
    return as_reward(reward).score(inputs_of(*texts, ids=ids)).total.tolist()


def inputs_of(*texts, ids=None):
    n = len(texts)
    return RewardInputs(["p"] * n, list(texts), [[1]] * n, ids or [[5] * (len(t.split()) + 1) for t in texts], {})


@pytest.mark.parametrize(
    ("words", "count", "text", "expected"),
    [
        (["great"], "any", "A GREAT day", 1),
        (["great"], "any", "greatly", 0),
        ("great", "any", "so great!", 1),
        (["c++", ".net"], "distinct", "C++ and .NET", 1),
        (["c++"], "any", "c++11", 0),
        (["good", "bad"], "distinct", "good good", 0.5),
        (["good", "bad"], "occurrences", "good, bad, good", 3),
        (["good", "very good"], "occurrences", "very  good", 1),  # the longer phrase, across any white space
        (["very good"], "share", "a very good day", 0.5),
        (["good"], "share", "", 0),
        (["isn't"], "share", "it isn't", 0.5),
        (["爱"], "share", "我爱你。", 1 / 3),  # a script without spaces
        (["gpt"], "any", "我爱gpt吗", 1),
    ],
)
def test_keyword(words, count, text, expected):
    assert score(keyword(words, count=count), text) == [pytest.approx(expected, abs=1e-12)]


def test_regex():
    form = regex(r"<answer>-?\d+</answer>", full_match=True)
    assert score(form, "<answer>-4</answer>\n", "so <answer>4</answer>", "4") == [1, 0, 0]
    assert score(regex(r"\d"), "so 4", "four") == [1, 0]
    assert score(regex(re.compile("YES", re.I)), "yes", "no") == [1, 0]


def test_length():
    ids = [[1, 2, 3], [4]]
    assert score("length", "one two", "x", ids=ids) == [3, 1]
    assert score(length(2), "one two", "x", ids=ids) == [-1, -1]
    assert score(length(unit="words"), "one two", "don't!", ids=ids) == [2, 1]
    assert score(length(unit="characters"), "one two", "x", ids=ids) == [7, 1]


def test_repetition():
    # bigrams: a-b, b-a, a-b, b-a: two of four were said before
    assert score("repetition", "a b a b a", "a b c d", "a", "") == [-0.5, 0, 0, 0]
    assert score(repetition(1), "a a a a", "A, a!") == [-0.75, -0.5]
    assert score(repetition(3), "a a a a") == [-0.5]  # two trigrams, one distinct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A great film!", 1),
        ("An awful film.", -1),
        ("Good and bad", 0),
        ("The table is brown.", 0),
        ("", 0),
        ("not a good film", -1),
        ("it isn’t bad", 1),  # the typographic apostrophe, too
        ("It is not a very good film", -1),
        ("never in all my years good", 1),  # out of the negator's reach of three words
        ("not, good", 1),  # a comma ends it
        ("not for me but good", 1),
        ("not only good", 1),
        ("good good bad", 1 / 3),
        ("enjoyable", 1),  # enjoy*
        ("GREAT", 1),
    ],
)
def test_sentiment(text, expected):
    assert score("sentiment", text) == [pytest.approx(expected, abs=1e-12)]


def test_sentiment_lexicon_is_consistent():
    assert not POSITIVE & NEGATIVE
    for word in POSITIVE | NEGATIVE:
        assert re.fullmatch(r"[a-z-]+\*?", word), word
        assert score("sentiment", word.rstrip("*")) == [1.0 if word in POSITIVE else -1.0], word


@pytest.mark.skipif(not POLARITY.exists(), reason="real data not present")
def test_sentiment_on_real_sentences(monkeypatch):
    rows = [json.loads(line) for line in POLARITY.read_text(encoding="utf-8").splitlines()]
    labels = np.array([row["label"] for row in rows])

    def coverage_and_accuracy():
        scores = np.array(sentiment()([row["text"] for row in rows]))
        decided = scores != 0
        return decided.mean(), ((scores > 0) == labels)[decided].mean()

    coverage, accuracy = coverage_and_accuracy()
    assert coverage > 0.6 and accuracy > 0.74  # 0.5 would be chance
    monkeypatch.setattr("rlhf_gym.rewards.lexicon.NEGATION_REACH", 0)
    assert coverage_and_accuracy()[1] < accuracy - 0.005  # negation is worth something


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keyword([]), r"words must be one or more strings"),
        (lambda: keyword(["a", " "]), r"words must be one or more strings"),
        (lambda: keyword(["a"], count="all"), "count must be one of 'any', .* got 'all'"),
        (lambda: regex("("), "pattern must be a regular expression, got '\\('"),
        (lambda: length(-1), "target must be None or a finite number >= 0, got -1"),
        (lambda: length(unit="bytes"), "unit must be one of 'tokens', 'words', 'characters', got 'bytes'"),
        (lambda: repetition(0), "ngram must be an integer >= 1, got 0"),
        (lambda: clip("length"), "give low, high or both"),
        (lambda: clip("length", 2, 1), "low must be <= high, got 2 and 1"),
        (lambda: clip("length", math.nan), "low must be a finite number, got nan"),
        (lambda: scale("length", "2"), "factor must be a finite number, got '2'"),
        (lambda: normalize("length", epsilon=0), "epsilon must be > 0, got 0"),
        (lambda: length_penalty("length", -1), "coef and free_tokens must be >= 0, got -1"),
        (lambda: clip(clip("length", 0), 1), "two reward terms are named 'clip'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- wrappers


def test_clip_shows_its_correction():
    scores = clip(length(), 2, 3).score(inputs_of("", "a", "a b c d"))
    assert scores.total.tolist() == [2, 2, 3]
    assert scores.terms["length"].tolist() == [1, 2, 5] and scores.terms["clip"].tolist() == [1, 0, -2]
    assert score(clip("length", high=2), "a b c") == [2] and score(clip("length", low=9), "a b c") == [9]


def test_a_clipped_score_is_exact_whatever_was_clipped():
    huge = clip(lambda text: 1e20, -1, 1)
    for reward, expected in (
        (huge, 1),
        ({huge: 1.0, "length": 0.5}, 3),
        (length_penalty(huge, 0.125), 0.5),
        (scale(huge, 3), 3),
    ):
        assert score(reward, "a b c") == [pytest.approx(expected, rel=1e-15)]  # 4 tokens
    assert score(clip(lambda text: 7.1, high=0.3), "a") == [0.3]


def test_scale_and_length_penalty():
    scores = scale({"length": 2.0, "repetition": 1.0}, -0.5).score(inputs_of("a a a"))
    assert scores.terms["length"].tolist() == [-4.0] and scores.terms["repetition"].tolist() == [0.25]
    scores = length_penalty(lambda text: 1.0, 0.1, free_tokens=2).score(inputs_of("", "a", "a b c d e"))
    np.testing.assert_allclose(scores.total, [1, 1, 1 - 0.4], rtol=0, atol=1e-12)
    assert length_penalty("length", 0.1).names == ("length", "length_penalty")


def test_normalize_keeps_running_moments():
    reward = normalize(lambda text: float(text))
    first = reward.score(inputs_of("1000001", "1000003")).total
    np.testing.assert_allclose(first, [-1, 1], atol=1e-7)
    second = reward.score(inputs_of("1000005")).total  # mean of 1, 3, 5 is 3, variance 8/3
    np.testing.assert_allclose(second, [2 / math.sqrt(8 / 3)], atol=1e-7)
    assert normalize(lambda text: 2.0).score(inputs_of("a", "b")).total.tolist() == [0, 0]  # no spread, no NaN


def test_failed_score_leaves_the_moments_as_they_were():
    reward = normalize(lambda text: float(text))
    reward.score(inputs_of("1", "3"))
    with pytest.raises(ValueError, match="nan"):
        reward.score(inputs_of("100", "nan"))
    np.testing.assert_allclose(reward.score(inputs_of("5")).total, [2 / math.sqrt(8 / 3)], atol=1e-7)


def test_wrapped_dense_rewards():
    def per_token(completion_ids):
        return [[float(t) for t in ids] for ids in completion_ids]

    per_token.dense = True
    inputs = inputs_of("x", ids=[[1, 2, 3]])
    clipped = clip({per_token: 2.0}, high=10)
    assert clipped.dense and [r.tolist() for r in clipped.token_rewards(inputs)] == [[2.0, 4.0, 6.0]]
    assert clipped.score(inputs).total.tolist() == [10.0] and clipped.score(inputs).terms["clip"].tolist() == [-2.0]
    assert [r.tolist() for r in scale(per_token, 3).token_rewards(inputs)] == [[3.0, 6.0, 9.0]]
    with pytest.raises(ValueError, match="only whole scores can be normalised"):
        normalize(per_token)


def test_wrappers_pass_on_what_the_environment_asks():
    def needs(completions, label):
        return [0.0] * len(completions)

    for wrapped in (clip(needs, 0), scale(needs, 2), normalize(needs), length_penalty(needs, 1)):
        assert wrapped.columns_needed == ("label",) and not wrapped.needs_language_model
        assert not wrapped.dense and as_reward(wrapped) is wrapped


def test_columns_are_checked_through_wrappers_and_sums():
    doubtful = as_reward(lambda label: 0.0)
    for wrapped in (doubtful, clip(doubtful, 0), {"length": 1.0, "it": (length_penalty(doubtful, 1), 2.0)}):
        as_reward(wrapped).check_columns(["source"])
        with pytest.raises(ValueError, match="'label' would receive the response"):
            as_reward(wrapped).check_columns(["source", "label"])
