"""GRPO's expected gradient by states: against the listing of all responses, and by hand where one token decides."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents.grpo import GRPOConfig
from rlhf_gym.benchmarks import fixed_points, grpo_by_states, predictions
from rlhf_gym.benchmarks.fixed_points import Estimator, follow, make_task, measure
from rlhf_gym.benchmarks.grpo_by_states import expected_gradient, make_states

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BETA = 0.3
GRPO = Estimator(
    "GRPO", advantages="group", group_size=8, baseline="group_mean", divide_by_std=True, mode="sequence_mean",
    kl_loss=("k3", "token"),
)  # fmt: skip


def make_env(name):
    task, _, rest = name.partition(" ")
    return gym.make(f"rlhf_gym/{task}-v0", **(json.loads(rest) if rest else {}))


@cache
def states(name, kl_coef=BETA):
    return make_states(make_env(name), kl_coef, GRPOConfig())


def random_policy(task, seed=0):
    return torch.randn(task.reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["WoAiNi", "Brackets", 'Recall {"max_response_tokens": 5}'])
def test_gradient_is_that_of_all_responses(name):
    """There they are all in one batch, and the loss is the agent's own, differentiated."""
    policy = random_policy(states(name))
    listed = make_task(make_env(name), BETA)
    found, actions = expected_gradient(states(name), policy)
    expected, expected_actions = fixed_points.expected_gradient(listed, policy, GRPO)
    assert (found - expected).abs().max() < 1e-12 * max(1.0, expected.abs().max())
    assert (actions - expected_actions).abs().max() < 1e-12
    other, _ = fixed_points.expected_gradient(listed, policy, replace(GRPO, kl_loss=("k2", "token")))
    assert (other / other.norm() - found / found.norm()).norm() > 0.01


@pytest.mark.parametrize(
    ("name", "regret"),
    [("WoAiNi", 0.008), ('Brackets {"max_response_tokens": 8}', 0.114), ('Recall {"max_response_tokens": 6, "num_states": 3}', 0.048)],
)  # fmt: skip
def test_fixed_points_of_the_small_tasks(name, regret):
    """Row "GRPO as published" of the table in docs/exact.md."""
    task = states(name)
    found = follow(partial(expected_gradient, task), torch.zeros_like(task.reference))
    assert found.converged
    assert measure(task, found.residual).regret == pytest.approx(regret, abs=5e-4)


def group_advantage(own, chance, n=8):
    """Mean advantage of a response that is right (1) or not (0), the others being right with that chance."""
    total = 0.0
    for k in range(n):
        mean = (own + k) / n
        std = math.sqrt(n / (n - 1) * mean * (1 - mean))
        total += math.comb(n - 1, k) * chance**k * (1 - chance) ** (n - 1 - k) * (own - mean) / (std + 1e-4)
    return total


def success_by_hand(rate, kl_coef):
    """Difficulty: the first word is right or not, and a response has two tokens unless the first is the end.

    With c = 1 - pi_ref / pi the gradient vanishes where (kl_coef c - A) / length is the same for all words, so that
    pi = kl_coef pi_ref / (kl_coef - A - length * that), for each success rate; and the rate is the sum over its own.
    """
    other = (1 - rate) / 5  # easy, fair, hard, rare and the end
    reference, length = np.array([rate, *[other] * 5]), np.array([2, 2, 2, 2, 2, 1])

    def policy(chance):
        advantages = np.array([group_advantage(1, chance), *[group_advantage(0, chance)] * 5])
        room = lambda constant: kl_coef - advantages - length * constant  # noqa: E731
        most = ((kl_coef - advantages) / length).min()
        constant = brentq(lambda c: (kl_coef * reference / room(c)).sum() - 1, most - 100, most - 1e-9, xtol=1e-14)
        return kl_coef * reference / room(constant)

    return brentq(lambda chance: policy(chance)[0] - chance, 1e-6, 1 - 1e-6, xtol=1e-12)


@pytest.mark.parametrize("kl_coef", [0.1, 0.3])
def test_difficulty_by_hand(kl_coef):
    expected = np.mean([success_by_hand(rate, kl_coef) for rate in (0.9, 0.5, 0.1, 0.01)])
    found = predictions.predict("Difficulty", kl_coef)
    assert found["converged"] and found["grpo"]["score"] == pytest.approx(expected, abs=1e-6)


def test_drawn_groups_are_like_all_groups(monkeypatch):
    every = states("Goodhart").prompts[0]
    monkeypatch.setattr(grpo_by_states, "MAX_GROUPS", 0)
    some = make_states(make_env("Goodhart"), BETA, GRPOConfig()).prompts[0]
    assert every.is_exact and not some.is_exact
    assert every.scores.tolist() == some.scores.tolist() == [0, 1, 2, 3, 4, 5, 6]
    chances = np.array([0.05, 0.1, 0.2, 0.3, 0.2, 0.1, 0.05])
    assert some.advantages(chances) == pytest.approx(every.advantages(chances), abs=2e-3)
    # The advantages of a group add up to nothing, and so does their mean over the policy's responses.
    assert chances @ every.advantages(chances) == pytest.approx(0, abs=1e-12)


def test_only_grpo_as_published():
    for config in (
        {"loss_mode": "constant"},
        {"kl_placement": "reward"},
        {"num_minibatches": 2},
        {"dynamic_sampling": True},
    ):
        with pytest.raises(ValueError, match="config must be GRPO as published, in one step per rollout, got"):
            make_states(make_env("WoAiNi"), BETA, GRPOConfig(**config))


def test_the_command_prints_and_writes(tmp_path, capsys):
    out = tmp_path / "x.json"
    arguments = ["--tasks", "Difficulty", "--results", str(RESULTS / "exact"), "--longer", str(RESULTS / "exact_grpo")]
    assert predictions.main([*arguments, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| Difficulty, .3 | .5963 | .5804 ± .0037 |  | .9148 | .9148 ± .0006 |" in table
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert [cell["kl_coef"] for cell in cells] == [0.1, 0.3] and cells[0]["reached"]["q-learning"]["seeds"] == 10
