"""Buffers that keep ids in few bytes: how many, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, DictRolloutBuffer
from test_sb3_policy import task

from rlhf_gym.agents import DQN, QRDQN, TRPO
from rlhf_gym.agents.sb3 import (
    A2C,
    SB3PPO,
    CompactMaskableRolloutBuffer,
    CompactReplayBuffer,
    CompactRolloutBuffer,
    MaskablePPO,
)
from rlhf_gym.envs.vector import TextGenerationVectorEnv

T, N, L = 6, 3, 5  # steps, rows, tokens of a text


def text_space(vocab_size):
    ids = spaces.Box(0, vocab_size - 1, (L,), np.int64)
    return spaces.Dict(input_ids=ids, attention_mask=spaces.Box(0, 1, (L,), np.int8))


def rollout_buffer(cls, vocab_size):
    """A full one; the largest id is in it."""
    actions = spaces.Discrete(2 if issubclass(cls, MaskableDictRolloutBuffer) else vocab_size)
    buffer = cls(T, text_space(vocab_size), actions, device="cpu", n_envs=N)
    rng = np.random.default_rng(0)
    for _ in range(T):
        obs = {"input_ids": rng.integers(0, vocab_size, (N, L)), "attention_mask": rng.integers(0, 2, (N, L), np.int8)}
        obs["input_ids"][0, 0] = vocab_size - 1
        rewards = rng.normal(size=N)
        buffer.add(obs, rng.integers(0, 2, N), rewards, np.zeros(N), *torch.tensor(rng.normal(size=(2, N))))
    return buffer


@pytest.mark.parametrize(
    ("vocab_size", "num_bytes"), [(12, 1), (256, 1), (257, 2), (50257, 2), (65536, 2), (65537, 4), (151_936, 4)]
)
def test_bytes_per_id(vocab_size, num_bytes):
    rollout = CompactRolloutBuffer(T, text_space(vocab_size), spaces.Discrete(vocab_size), n_envs=N)
    replay = CompactReplayBuffer(T * N, text_space(vocab_size), spaces.Discrete(vocab_size), n_envs=N)
    for array in (rollout.observations, replay.observations, replay.next_observations):
        assert array["input_ids"].nbytes == T * N * L * num_bytes
        assert array["attention_mask"].nbytes == T * N * L
    stock = DictRolloutBuffer(T, text_space(vocab_size), spaces.Discrete(vocab_size), n_envs=N)
    assert stock.observations["input_ids"].nbytes == T * N * L * 8


@pytest.mark.parametrize("vocab_size", [12, 256, 65536, 65537])
@pytest.mark.parametrize(
    ("compact", "stock"),
    [(CompactRolloutBuffer, DictRolloutBuffer), (CompactMaskableRolloutBuffer, MaskableDictRolloutBuffer)],
)
def test_minibatches_are_those_of_the_buffer_underneath(compact, stock, vocab_size):
    batches = []
    for cls in (compact, stock):
        np.random.seed(0)
        batches.append(list(rollout_buffer(cls, vocab_size).get(batch_size=7)))
    for one, other in zip(*batches, strict=True):
        assert one.observations["input_ids"].dtype == torch.int64
        assert one.observations["input_ids"].max() == vocab_size - 1
        assert_equal_samples(one, other)


@pytest.mark.parametrize("vocab_size", [12, 65536, 65537])
def test_replayed_transitions_are_those_of_the_buffer_underneath(vocab_size):
    samples = []
    for cls in (CompactReplayBuffer, DictReplayBuffer):
        buffer, rng = (
            cls(T * N, text_space(vocab_size), spaces.Discrete(vocab_size), "cpu", N),
            np.random.default_rng(0),
        )
        for _ in range(T + 2):  # the oldest are overwritten
            before, after = (
                {"input_ids": rng.integers(0, vocab_size, (N, L)), "attention_mask": np.ones((N, L), np.int8)}
                for _ in range(2)
            )
            after["input_ids"][:, 0] = vocab_size - 1
            actions = rng.integers(0, vocab_size, N)
            buffer.add(before, after, actions, rng.normal(size=N), np.zeros(N), [{} for _ in range(N)])
        np.random.seed(0)
        samples.append(buffer.sample(20))
    assert (samples[0].next_observations["input_ids"][:, 0] == vocab_size - 1).all()
    assert_equal_samples(*samples)


def test_a_space_that_gains_nothing_is_kept():
    space = spaces.Dict(input_ids=spaces.Box(-1, 300, (L,), np.int16), attention_mask=spaces.Box(0, 1, (L,), np.int8))
    buffer = CompactRolloutBuffer(T, space, spaces.Discrete(300), n_envs=N)
    assert buffer.observations["input_ids"].dtype == np.int16


@pytest.mark.parametrize("cls", [SB3PPO, TRPO, A2C, MaskablePPO, DQN, QRDQN])
def test_agents_learn_the_same_from_them(cls):
    agents = []
    for kind in (cls, type(cls.__name__, (cls,), {"buffer_class": None})):
        changes = {"top_k": 5} if cls is MaskablePPO else {}
        envs = TextGenerationVectorEnv(4, **task(kl_coef=0.1, **changes))
        agents.append(kind(envs, seed=1).learn(100))
    buffers = [getattr(a.algorithm, "rollout_buffer", None) or a.algorithm.replay_buffer for a in agents]
    assert [buffer.observations["input_ids"].dtype for buffer in buffers] == [np.uint8, np.int64]
    np.testing.assert_array_equal(*(buffer.observations["input_ids"] for buffer in buffers))
    one, other = (agent.algorithm.policy.state_dict() for agent in agents)
    assert all(torch.equal(one[name], other[name]) for name in other)


def assert_equal_samples(one, other):
    assert type(one) is type(other)
    for name, expected in other._asdict().items():
        found = getattr(one, name)
        pairs = [(found[key], expected[key]) for key in expected] if isinstance(expected, dict) else [(found, expected)]
        for x, y in pairs:
            if y is not None:
                assert x.dtype == y.dtype and torch.equal(x, y), name
