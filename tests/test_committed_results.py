"""What the committed results say, against numbers that no agent had a part in."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import rlhf_gym
from rlhf_gym.exact.graph import SCORE
from rlhf_gym.exact.solve import with_future

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "exact" / "results.jsonl"
TASKS = {  # with their KL coefficients, the softer optimum last
    "WoAiNi": (0.1, 0.3), "Brackets": (0.1, 0.3), "Lexicon": (2.0, 1.0), "Recall": (0.1, 0.3),
    "Goodhart": (0.1, 0.3), "Difficulty": (0.1, 0.3),
}  # fmt: skip


@pytest.fixture(scope="module")
def scores():
    found = defaultdict(list)
    for line in RESULTS.read_text().splitlines():
        cell = json.loads(line)
        found[cell["agent"], cell["task"], cell["kl_coef"]].append(cell["metrics"]["normalised"])
    return found


@pytest.mark.parametrize("task", TASKS)
def test_dqn_ends_at_the_best_deterministic_policy(scores, task):
    """score + kl_coef log pi_ref, maximised instead of averaged softly: all that a deterministic policy can get."""
    envs = gym.make_vec(f"rlhf_gym/{task}-v0", num_envs=1)
    for kl_coef in TASKS[task]:
        solution = rlhf_gym.exact.solve(envs, kl_coef=kl_coef)
        graph = solution.graph
        values = [np.zeros_like(layer) for layer in solution.values]
        for t in reversed(range(len(graph.layers))):
            layer = graph.layers[t]
            returns = with_future(graph, t, layer.payoffs[SCORE], values) + kl_coef * layer.ref_logprobs
            values[t] = returns.max(1)
        best = float(values[0][graph.roots].mean())
        gain = solution.objective - solution.reference_objective
        expected = (best - solution.reference_objective) / gain
        for agent in ("dqn", "qrdqn"):
            assert len(scores[agent, task, kl_coef]) == 10
            np.testing.assert_allclose(scores[agent, task, kl_coef], expected, rtol=0, atol=1e-9)
    # Where the optimum is soft, others come nearer to it than any deterministic policy can.
    assert min(scores["ppo", task, TASKS[task][1]]) > expected + 0.02
