"""Several rewards as one, by hand-made scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_gym.rewards import RewardInputs, as_reward
from rlhf_gym.rewards.ensemble import Disagreement, combine, disagreement, ensemble

SCORES = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
TEXTS = RewardInputs(["p", "q"], ["a b", "a b c"], [[0]] * 2, [[1]] * 2, {"wanted": [5.0, 7.0]})


def words(text: str) -> float:
    return float(len(text.split()))


def wanted(completions, wanted):
    return wanted


def dense(completion_ids):
    return [[0.0] * len(ids) for ids in completion_ids]


dense.dense = True


def test_rules():
    std = [1.0, math.sqrt(3.0)]  # Bessel's
    np.testing.assert_allclose(combine(SCORES, "mean"), [2, 1])
    np.testing.assert_allclose(combine(SCORES, "min"), [1, 0])
    np.testing.assert_allclose(combine(SCORES, "mean-std", 0.5), [2 - 0.5 * std[0], 1 - 0.5 * std[1]])
    np.testing.assert_allclose(combine(SCORES[:1], "mean-std", 9.0), SCORES[0])  # one member agrees with itself


def test_any_rewards_can_be_members():
    both = ensemble([words, wanted, "length"], rule="mean-std", std_coef=1.0)
    found = as_reward(both).score(TEXTS)
    members = np.array([[2.0, 3.0], [5.0, 7.0], as_reward("length").score(TEXTS).total])
    np.testing.assert_allclose(found.total, members.mean(0) - members.std(0, ddof=1))
    np.testing.assert_allclose(disagreement(both).score(TEXTS).total, members.std(0, ddof=1))
    assert both.columns_needed == ("wanted",) == disagreement(both).columns_needed
    least = ensemble(both, rule="min")
    np.testing.assert_allclose(least.score(TEXTS).total, members.min(0))
    assert least.std_coef == 1.0 and isinstance(disagreement([words]), Disagreement)
    assert as_reward({both: 2.0, words: 1.0}).score(TEXTS).terms.keys() == {"ensemble", "words"}


def test_members_that_wait_for_the_reference():
    waiting = ensemble(["reference_logprob", words])
    assert waiting.needs_language_model and disagreement(waiting).needs_language_model


@pytest.mark.parametrize(
    ("members", "more", "message"),
    [
        ([], {}, "at least one reward"),
        ([dense], {}, "dense pays for each token"),
        ([words], {"rule": "median"}, "rule"),
        ([words], {"std_coef": -1.0}, "std_coef must be >= 0"),
        ([words], {"std_coef": math.nan}, "std_coef must be a finite number"),
        (".", {}, "holds no ensemble.json"),
    ],
)
def test_refused(members, more, message):
    with pytest.raises(ValueError, match=message):
        ensemble(members, **more)
