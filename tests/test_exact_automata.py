"""Automaton rewards against the plain functions that they stand for, on every short text."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from rlhf_gym.envs.scalar import TextGenerationEnv
from rlhf_gym.exact import (
    Automaton,
    combine,
    keywords,
    length_window,
    matches,
    ngram_from_table,
    repetitions,
    solve,
    word_scores,
)
from rlhf_gym.rewards import RewardError, RewardInputs, as_reward

WORDS = ("a", "b", "c")
LM = ngram_from_table({"": {"a": 0.3, "b": 0.3, "c": 0.2, ".": 0.2}}, eos=".")
IDS = LM.tokenizer.get_vocab()
TEXTS = [words for n in range(5) for words in itertools.product(WORDS, repeat=n)]


def scores(reward, texts=TEXTS, ended=True) -> np.ndarray:
    """Scores of the texts, ended by EOS or not."""
    ids = [[IDS[word] for word in words] + ([IDS["."]] if ended else []) for words in texts]
    inputs = RewardInputs([""] * len(ids), [" ".join(t) for t in texts], [[0]] * len(ids), ids)
    bound = as_reward(reward, language_model=LM)
    total = bound.score(inputs).total
    if bound.dense:  # paid word by word, the same in every prefix
        tokens = bound.token_rewards(inputs)
        assert [len(row) for row in tokens] == [len(row) for row in ids]
        shorter = RewardInputs(["", ""], ["", ""], [[0], [0]], [ids[-1][:2], ids[-1][:1]])
        for row, length in zip(bound.token_rewards(shorter), (2, 1), strict=True):
            np.testing.assert_array_equal(row, tokens[-1][:length])
    return total


@pytest.mark.parametrize(
    ("automaton", "function"),
    [
        (keywords(["a", "c"]), lambda t: float("a" in t or "c" in t)),
        (keywords("b"), lambda t: float("b" in t)),
        (keywords(["a", "c"], every=True), lambda t: float("a" in t and "c" in t)),
        (word_scores({"a": 1.0, "b": -0.5}), lambda t: t.count("a") - 0.5 * t.count("b")),
        (word_scores({"a": 0.1, "b": 0.2}, cap=0.3), lambda t: min(0.3, 0.1 * t.count("a") + 0.2 * t.count("b"))),
        (repetitions(), lambda t: float(sum(x == y for x, y in itertools.pairwise(t)))),
        (length_window(2, 3), lambda t: float(2 <= len(t) <= 3)),
        (length_window(0, 0), lambda t: float(not t)),
        (combine(min, keywords("a"), length_window(2, 2)), lambda t: float("a" in t and len(t) == 2)),
        (Automaton(0, lambda n, w: 1 - n, final=lambda n, ended: float(n == 0)), lambda t: float(len(t) % 2 == 0)),
    ],
)
def test_equal_to_the_plain_function(automaton, function):
    np.testing.assert_allclose(scores(automaton), [function(t) for t in TEXTS], atol=1e-12)
    np.testing.assert_allclose(scores(automaton, TEXTS[1:], ended=False), [function(t) for t in TEXTS[1:]], atol=1e-12)


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        "a b",
        "a*",
        "(a b)*",
        "a+ b?",
        "(a | b) .* c",
        ". . .",
        "(a|b c)* a?",
        ".* a .*",
        "",
        "(a* b*)* c",
        "((a))+",
    ],
)
def test_patterns_against_re(pattern):
    """The words are letters, so Python's own regular expressions say what must come out."""
    compiled = re.compile(pattern.replace(" ", ""))
    expected = [float(compiled.fullmatch("".join(t)) is not None) for t in TEXTS]
    np.testing.assert_array_equal(scores(matches(pattern)), expected)


def test_patterns_are_finite_and_can_hold_operators():
    lm = ngram_from_table({"": {"(": 0.4, ")": 0.3, "c++": 0.2, ".": 0.1}}, eos=None)
    reward = as_reward(matches(r"(\( \) | c\+\+)* \."), language_model=lm)
    ids = lm.tokenizer("( ) c++ ( ) .")["input_ids"]
    assert reward.score(RewardInputs(["", ""], ["", ""], [[0], [0]], [ids, ids[:-1]])).total.tolist() == [1.0, 0.0]
    env = TextGenerationEnv(model=LM, reward=matches("((a | b)* c (a | b)+)* .?"), max_response_tokens=40)
    solve(env, 0.5)
    assert len(env.reward.table.states) < 20  # a naive derivative grows with each word
    for bad, why in (("(a", "closes"), ("a)", "opens"), ("* a", "before"), ("a \\", "backslash")):
        with pytest.raises(ValueError, match=why):
            matches(bad)


def test_end_of_text_is_no_word_and_final_knows_it():
    seen: list[str] = []

    def step(state, word):
        seen.append(word)
        return state

    reward = Automaton(0, step, final=lambda state, ended: 2.0 if ended else -1.0)
    assert scores(reward, [("a", "b")], ended=True).tolist() == [2.0]
    assert scores(reward, [("a", "b")], ended=False).tolist() == [-1.0]
    assert set(seen) == {"a", "b"}


def test_sums_are_weighted_dicts():
    reward = {keywords("a"): 2.0, word_scores({"b": 1.0}): -0.5}
    np.testing.assert_allclose(scores(reward), [2.0 * ("a" in t) - 0.5 * t.count("b") for t in TEXTS])
    env = TextGenerationEnv(model=LM, reward=reward, max_response_tokens=6)
    assert solve(env, 0.5).graph.num_states == 1 + 5 * 2  # whether "a" was there; the dense part needs no memory


def test_dense_and_final_rewards_in_an_environment():
    """Word rewards as they fall due, the final one with the last token, whether EOS or the limit ended it."""
    reward = Automaton(
        0, lambda n, word: n + 1, token_reward=lambda n, word: 10.0 * n, final=lambda n, ended: 1.0 if ended else 0.5
    )
    env = TextGenerationEnv(model=LM, reward=reward, max_response_tokens=3)
    for words, expected in (("aba", [0.0, 10.0, 20.5]), ("ab.", [0.0, 10.0, 1.0]), (".", [1.0])):
        env.reset(seed=0)
        assert [env.step(IDS[word])[1] for word in words] == pytest.approx(expected)
        ids = np.array([[IDS[word] for word in words]])
        whole = env.evaluate_responses([env.prompts[0].ids], ids, np.ones_like(ids, dtype=bool))
        assert whole.rewards[0].tolist() == pytest.approx(expected)


def test_refusals():
    def fails(state, word):
        raise KeyError(word)

    with pytest.raises(RewardError, match=r"automaton 'x': step\(0, 'a'\) failed: KeyError"):
        scores(Automaton(0, fails, final=lambda s, e: 0.0, name="x"), [("a",)])
    with pytest.raises(RewardError, match="unhashable"):
        scores(Automaton((), lambda s, w: [w], final=lambda s, e: 0.0), [("a",)])
    with pytest.raises(RewardError, match="must be finite, got nan"):
        scores(Automaton(0, lambda s, w: s, final=lambda s, e: float("nan")), [("a",)])
    with pytest.raises(RewardError, match="does not know the words"):
        keywords("a").score(RewardInputs([""], [""], [[0]], [[0]]))
    with pytest.raises(ValueError, match="pays nothing"):
        Automaton(0, lambda s, w: s)
    with pytest.raises(ValueError, match="with a cap"):
        word_scores({"a": -1.0}, cap=2.0)
    with pytest.raises(ValueError, match="at the end only"):
        combine(min, word_scores({"a": 1.0}))
    with pytest.raises(ValueError, match="0 <= low <= high"):
        length_window(3, 2)


def test_too_much_memory_is_refused(monkeypatch):
    """A state that holds the whole response is no small state: one error, not an hour of swapping."""
    monkeypatch.setattr("rlhf_gym.exact.automaton.MAX_STATES", 1000)
    everything = Automaton((), lambda seen, word: (*seen, word), final=lambda seen, ended: float(len(set(seen)) == 3))
    env = TextGenerationEnv(model=LM, reward=everything, max_response_tokens=12)
    with pytest.raises(RewardError, match="more than 1,000 states"):
        solve(env, 0.1)
