"""The audit of Stable-Baselines3's agents: what it reads out of the rollout buffer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from test_audit import history, perturbed, task

from rlhf_gym.agents import TRPO
from rlhf_gym.agents.sb3.audit import buffer_batch
from rlhf_gym.exact import evaluate


def test_the_buffer_as_a_batch():
    """One row, four steps: the end of an episode, a whole one of two tokens, and the beginning of another."""
    ids = np.zeros((4, 1, 4), np.int64)
    ids[:, 0] = [[1, 5, 6, 0], [1, 0, 0, 0], [1, 7, 0, 0], [2, 0, 0, 0]]
    buffer = SimpleNamespace(
        device="cpu",
        episode_starts=np.array([[0], [1], [0], [1]], np.float32),
        observations={"input_ids": ids, "attention_mask": (ids > 0).astype(np.int8)},
        actions=np.array([[[9]], [[7]], [[9]], [[8]]], np.float32),
        log_probs=np.array([[-1.0], [-2.0], [-3.0], [-4.0]], np.float32),
    )
    refs, scores = np.full((4, 1), -2.5, np.float32), np.array([[5.0], [np.nan], [6.0], [np.nan]], np.float32)
    batch = buffer_batch(buffer, refs, scores, max_response_tokens=3)
    assert batch.ids.tolist() == [[1, 5, 6, 9], [1, 7, 9, 0], [2, 8, 0, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1, 1]
    assert batch.response_ids.tolist() == [[9, 0], [7, 9], [8, 0]]
    assert batch.response_mask.tolist() == [[True, False], [True, True], [True, False]]
    assert batch.kl.tolist() == [[1.5, 0], [0.5, -0.5], [-1.5, 0]]
    assert batch.scores.isnan().tolist() == [True, False, True] and batch.scores[1] == 6
    # One that began later might not have ended in time, had it gone on: its score would be chosen by its length.
    assert buffer_batch(buffer, refs, scores, max_response_tokens=4).scores.isnan().all()
    refs[1] = np.nan
    assert buffer_batch(buffer, refs, scores, 3).ids.tolist() == [[1, 5, 6, 9], [2, 8, 0, 0]]


@pytest.mark.parametrize("name", ["Brackets", "Difficulty"])
def test_sb3_agents_are_audited_alike(name):
    envs = task(name, 128)
    agent = perturbed(TRPO(envs, policy="tabular", seed=0, audit_interval=1, target_kl=1e-9))
    exact = evaluate(agent, envs).kl
    seen = history(agent, 4)
    for m in seen:
        assert abs(m["audit/kl_sampled"] - m["audit/kl_exact"]) < 4 * m["audit/kl_difference_se"]
        assert m["audit/logprob_mismatch"] < 1e-5 and m["audit/ref_logprob_mismatch"] < 1e-5
        assert m["audit/certificate_variance"] > 0
    # A ratio of sums over the rollout; in the first one nothing stands for the beginnings of what its end cuts off.
    assert np.mean([m["audit/kl_exact"] for m in seen[1:]]) == pytest.approx(exact, rel=0.1)
