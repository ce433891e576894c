"""The adapter gives Stable-Baselines3 the stream that its own DummyVecEnv gives over the same environments."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from rlhf_gym.agents.sb3 import GymVectorToSB3

MODES = list(AutoresetMode)


class Counter(gym.Env):
    """Counts to a goal drawn at reset; integer Dict observations, infos on every kind of step."""

    render_mode = None

    def __init__(self):
        self.observation_space = gym.spaces.Dict(
            {"ids": gym.spaces.Box(0, 1000, (2,), np.int64), "mask": gym.spaces.Box(0, 1, (2,), np.int8)}
        )
        self.action_space = gym.spaces.Discrete(3)

    def _obs(self):
        return {"ids": np.array([self.count, self.goal]), "mask": np.array([1, self.count % 2], dtype=np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.goal = 0, int(self.np_random.integers(2, 6)) + (options or {}).get("extra", 0)
        return self._obs(), {"goal": self.goal}

    def step(self, action):
        self.count += int(action)
        ended, cut = self.count >= self.goal, self.count == self.goal - 1 and action == 2
        info = {"goal": self.goal, "action": int(action), "row": np.array([self.count, 1.5])}
        if ended:
            info |= {"score": float(self.count), "text": f"counted to {self.count}"}
        return self._obs(), 0.25 * action, ended, cut and not ended, info

    def action_masks(self):
        return np.array([True, self.count % 2 == 0, True])


def vector(make, num_envs, mode):
    return SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


def dummy(make, num_envs):
    return DummyVecEnv([lambda: Monitor(make())] * num_envs)


def assert_same(one, other, where):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key != "t":  # seconds since the start
                assert_same(one[key], other[key], (*where, key))
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(one, other, err_msg=str(where))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, (*where, i))
    else:
        assert one == other, where


def assert_same_stream(ours, theirs, num_steps=120, seed=3):
    rng = np.random.default_rng(0)
    for env in (ours, theirs):
        env.seed(seed)
    assert_same(ours.reset(), theirs.reset(), ("reset",))
    assert_same(ours.reset_infos, theirs.reset_infos, ("reset_infos",))
    num_ended = 0
    for t in range(num_steps):
        actions = rng.integers(ours.action_space.n, size=ours.num_envs)
        mine, other = ours.step(actions), theirs.step(actions)
        for name, a, b in zip(("obs", "rewards", "dones", "infos"), mine, other, strict=True):
            assert_same(a, b, (t, name))
        assert_same(ours.reset_infos, theirs.reset_infos, (t, "reset_infos"))
        num_ended += int(mine[2].sum())
    assert num_ended > ours.num_envs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make", [Counter, lambda: gym.make("CartPole-v1", max_episode_steps=12)], ids=["dict", "cartpole"]
)
def test_stream_is_that_of_dummy_vec_env(make, mode):
    assert_same_stream(GymVectorToSB3(vector(make, 3, mode)), dummy(make, 3))


def test_native_vector_env_of_one_row():
    native = gym.make_vec("CartPole-v1", num_envs=1, vectorization_mode="vector_entry_point")
    # The native one computes on arrays, the scalar one on Python floats: the same up to rounding.
    ours, theirs = GymVectorToSB3(native), dummy(lambda: gym.make("CartPole-v1"), 1)
    for env in (ours, theirs):
        env.seed(7)
    np.testing.assert_allclose(ours.reset(), theirs.reset(), rtol=1e-5)
    for action in np.random.default_rng(1).integers(2, size=100):
        mine, other = ours.step(np.array([action])), theirs.step(np.array([action]))
        assert mine[2] == other[2] and mine[1] == other[1]
        if not mine[2]:
            np.testing.assert_allclose(mine[0], other[0], rtol=1e-3, atol=1e-5)
        else:
            np.testing.assert_allclose(
                mine[3][0]["terminal_observation"], other[3][0]["terminal_observation"], rtol=1e-3, atol=1e-5
            )
            assert mine[3][0]["episode"]["l"] == other[3][0]["episode"]["l"]
            break
    else:
        pytest.fail("no episode ended")


def test_env_that_ignores_reset_mask_loses_nothing_silently():
    """CartPole's native vector env resets all rows when asked for some, and spends a step on each autoreset."""
    ours = GymVectorToSB3(gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode="vector_entry_point"))
    ours.seed(0)
    obs, rng = ours.reset(), np.random.default_rng(0)
    before = own = first = 0
    with pytest.warns(UserWarning, match="reset_mask"):
        while not first:
            before, (obs, _, dones, infos) = obs, ours.step(rng.integers(2, size=4))
            first = int(dones.sum())
    assert first == 4, "rows that the environment reset too are reported as ended"
    truncated = [info["TimeLimit.truncated"] for info in infos]
    assert sum(truncated) >= 1 and not all(truncated)
    assert (np.abs(obs) <= 0.05).all(), "every row is at a start"
    for _ in range(200):
        before, (obs, rewards, dones, infos) = obs, ours.step(rng.integers(2, size=4))
        for i in np.flatnonzero(dones):
            if "episode" in infos[i]:
                assert rewards[i] == 1 and infos[i]["episode"]["r"] == infos[i]["episode"]["l"]
                np.testing.assert_array_equal(infos[i]["terminal_observation"], obs[i])
            else:  # the environment's own reset: reward 0 and V(end) bootstrapped from the state it began in
                own += 1
                assert rewards[i] == 0 and infos[i]["TimeLimit.truncated"]
                np.testing.assert_array_equal(infos[i]["terminal_observation"], before[i])
                assert (np.abs(obs[i]) <= 0.05).all()
    assert own > 4


@pytest.mark.parametrize("mode", MODES)
def test_terminal_observations_are_copies(mode):
    ours = GymVectorToSB3(vector(Counter, 2, mode))
    ours.seed(0)
    ours.reset()
    kept = []
    for _ in range(30):
        obs, _, dones, infos = ours.step(np.array([2, 1]))
        kept += [
            (infos[i]["terminal_observation"], {k: v.copy() for k, v in infos[i]["terminal_observation"].items()})
            for i in np.flatnonzero(dones)
        ]
        for value in obs.values():
            value[:] = 0  # what the caller does to its observations must reach nobody
    assert len(kept) > 5
    for one, copied in kept:
        assert one["ids"][0] > 0
        assert_same(one, copied, ())


def test_seeds_and_options_are_used_once_by_the_next_reset():
    ours, theirs = GymVectorToSB3(vector(Counter, 3, AutoresetMode.NEXT_STEP)), dummy(Counter, 3)
    for options in ({"extra": 100}, [{"extra": 100}, {}, {"extra": 300}]):
        for env in (ours, theirs):
            env.seed(5)
            env.set_options(options)
        assert_same(ours.reset(), theirs.reset(), (options,))
        assert_same(ours.reset_infos, theirs.reset_infos, (options,))
        assert (ours.reset()["ids"][:, 1] < 100).all()
        theirs.reset()


def test_attributes_and_methods():
    ours = GymVectorToSB3(vector(Counter, 3, AutoresetMode.SAME_STEP))
    ours.seed(0)
    ours.reset()
    ours.step(np.array([0, 1, 0]))
    masks = ours.env_method("action_masks")
    np.testing.assert_array_equal(np.stack(masks)[:, 1], [True, False, True])
    assert not ours.env_method("action_masks", indices=1)[0][1]
    assert ours.get_attr("count") == [0, 1, 0] and ours.get_attr("count", indices=[1]) == [1]
    assert ours.get_attr("num_envs", indices=0) == [3]
    ours.set_attr("count", 7)
    assert ours.get_attr("count") == [7, 7, 7]
    assert ours.has_attr("action_masks") and not ours.has_attr("nonsense")
    assert ours.env_is_wrapped(Monitor) == [True] * 3
    assert ours.env_is_wrapped(gym.wrappers.TimeLimit, indices=0) == [False]
    with pytest.raises(ValueError, match="indices"):
        ours.set_attr("count", 1, indices=[0])


class TensorEnv(VectorEnv):
    """What an environment with output="torch" gives: tensors everywhere, same-step, final_obs as one batch."""

    def __init__(self):
        self.num_envs, self.render_mode = 2, None
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Dict({"ids": gym.spaces.Box(0, 99, (1,), np.int64)})
        self.single_action_space = gym.spaces.Discrete(5)
        self.observation_space = batch_space(self.single_observation_space, 2)
        self.action_space = batch_space(self.single_action_space, 2)

    def reset(self, *, seed=None, options=None):
        self.state = torch.zeros(2, 1, dtype=torch.long)
        return {"ids": self.state.clone()}, {"prompt_index": torch.tensor([4, 5])}

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        self.state += actions[:, None]
        final, done = {"ids": self.state.clone()}, self.state[:, 0] >= 4
        self.state[done] = 0
        info = {"ref_logprob": torch.tensor([-1.0, -2.0]), "prompt_index": torch.tensor([8, 9])}
        if done.any():
            info |= {
                "final_obs": final,
                "_final_obs": done,
                "_final_info": done,
                "final_info": {"score": final["ids"][:, 0] * 1.0, "_score": done},
            }
        return {"ids": self.state.clone()}, torch.ones(2), done, torch.zeros(2, dtype=torch.bool), info


def test_tensors_become_arrays_and_same_step_infos_go_to_their_episodes():
    ours = GymVectorToSB3(TensorEnv())
    assert ours.reset()["ids"].dtype == np.int64
    ours.step(np.array([1, 3]))
    obs, rewards, dones, infos = ours.step(np.array([1, 2]))
    assert rewards.dtype == np.float32 and dones.tolist() == [False, True]
    assert obs["ids"].tolist() == [[2], [0]] and infos[1]["terminal_observation"]["ids"].tolist() == [5]
    assert infos[0] == {"ref_logprob": -1.0, "prompt_index": 8, "TimeLimit.truncated": False}
    assert infos[1]["ref_logprob"] == -2.0 and infos[1]["score"] == 5.0 and "prompt_index" not in infos[1]
    assert infos[1]["episode"]["r"] == 2.0 and infos[1]["episode"]["l"] == 2
    assert ours.reset_infos[1] == {"prompt_index": 9}


def test_wrong_arguments():
    with pytest.raises(TypeError, match="gym.make_vec"):
        GymVectorToSB3(gym.make("CartPole-v1"))
    broken = TensorEnv()
    broken.metadata = {}
    with pytest.raises(TypeError, match="autoreset_mode"):
        GymVectorToSB3(broken)
