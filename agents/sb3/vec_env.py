"""A native Gymnasium vector environment as a Stable-Baselines3 ``VecEnv``.

The two contracts differ in when an episode restarts. SB3 wants the first observation of the next episode back from the
step that ended the last one, and the last observation in ``info["terminal_observation"]``; Gymnasium leaves it to the
environment's autoreset mode. The adapter gives SB3's stream from all three modes, bit for bit the stream of
``DummyVecEnv([lambda: Monitor(env), ...])`` over the same environments, with one batched call per step.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import Wrapper
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

# In same-step mode an info of a vector environment is about the new episode, except for these keys, which describe the
# action just taken in every mode.
_TRANSITION_KEYS = ("ref_logprob",)


class GymVectorToSB3(VecEnv):
    """Presents ``envs`` to Stable-Baselines3, as ``DummyVecEnv`` presents a list of scalar environments.

    Integer observations stay integers. ``info["episode"]`` is written as ``Monitor`` writes it, so SB3's logger and
    ``evaluate_policy`` need no wrapper. Tensors (``output="torch"``) become arrays, as SB3's buffers want them.

    In next-step and disabled mode the finished rows are reset at once through ``options={"reset_mask": ...}``. An
    environment that does not know that option resets every row; the adapter sees it, reports the rows so lost as
    truncated, and from then on lets the environment reset by itself: the step it spends on that appears as an episode
    of one step whose temporal-difference error is 0 (reward 0, truncated, and it ends where it began).

    Args:
        envs: Any ``gymnasium.vector.VectorEnv`` whose ``metadata["autoreset_mode"]`` is set.

    Raises:
        TypeError: If ``envs`` is not a vector environment, or does not say which autoreset mode it has.

    Example:
        >>> import gymnasium as gym
        >>> from stable_baselines3 import PPO
        >>> PPO("MlpPolicy", GymVectorToSB3(gym.make_vec("CartPole-v1", 4, "sync"))).learn(1000)  # doctest: +SKIP
    """

    def __init__(self, envs: VectorEnv) -> None:
        if not isinstance(envs, VectorEnv):
            raise TypeError(
                f"envs must be a gymnasium.vector.VectorEnv, got {type(envs).__name__}; make one with gym.make_vec"
            )
        mode = envs.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise TypeError(f"envs.metadata['autoreset_mode'] must be a gymnasium.vector.AutoresetMode, got {mode!r}")
        self.envs = envs
        self._mode = mode
        self._ignores_reset_mask = False
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._own_resets: dict[int, Any] = {}  # rows whose next step is their own reset -> their last observation
        self._started = time.time()
        self._actions: Any = None
        self._torch_device: torch.device | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Starts all rows anew with the seeds and options set since the last reset, and returns the observations."""
        seeds = self._seeds
        seed = None if seeds[0] is None else int(seeds[0])  # Gymnasium's convention is SB3's: row i gets seed + i
        options = self._options
        groups: list[tuple[dict[str, Any], np.ndarray | None]]
        if all(each == options[0] for each in options):
            groups = [(options[0], None)]
        else:  # a list of options, one per row: one masked reset for each distinct one
            distinct = [each for i, each in enumerate(options) if each not in options[:i]]
            groups = [(each, np.array([other == each for other in options])) for each in distinct]
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for group, mask in groups:
            given = dict(group) if mask is None else {**group, "reset_mask": mask}
            obs, info = self.envs.reset(seed=seed, options=given or None)
            rows = range(self.num_envs) if mask is None else np.flatnonzero(mask)
            split = _split_infos(info, self.num_envs)
            for i in rows:
                infos[i] = split[i]
        self.reset_infos = infos
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0
        self._lengths[:] = 0
        self._own_resets = {}
        return self._arrays(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions, shape (num_envs, ...), for ``step_wait``."""
        # An environment whose observations are tensors may want its actions as tensors on the same device.
        self._actions = actions if self._torch_device is None else torch.as_tensor(actions, device=self._torch_device)

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Steps all rows; finished ones come back with the first observation of their next episode."""
        obs, rewards, terminations, truncations, info = self.envs.step(self._actions)
        obs = self._arrays(obs)
        rewards = np.asarray(_to_numpy(rewards), dtype=np.float64)
        terminations = np.asarray(_to_numpy(terminations), dtype=bool)
        truncations = np.array(_to_numpy(truncations), dtype=bool)
        infos = _split_infos(info, self.num_envs)
        dones = terminations | truncations
        self._returns += rewards
        self._lengths += 1

        if self._mode is AutoresetMode.SAME_STEP:
            terminal = self._take_final(info, infos, np.flatnonzero(dones).tolist())
        else:
            terminal = {i: _copy_row(obs, i) for i in np.flatnonzero(dones).tolist()}
            if self._ignores_reset_mask:
                truncations[list(self._own_resets)] = True
                self._own_resets = self._close_own_resets(infos, terminal)
            elif dones.any():
                obs, lost = self._reset_rows(dones, obs)
                terminal |= lost
                truncations[list(lost)] = True
        for each, truncated in zip(infos, (truncations & ~terminations).tolist(), strict=True):
            each["TimeLimit.truncated"] = truncated
        for i, last in terminal.items():
            infos[i]["terminal_observation"] = last
            infos[i]["episode"] = {
                "r": round(float(self._returns[i]), 6),
                "l": int(self._lengths[i]),
                "t": round(time.time() - self._started, 6),
            }
        dones = terminations | truncations
        self._returns[dones] = 0
        self._lengths[dones] = 0
        return obs, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Closes the environment."""
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The rows' pictures, when the environment was made with ``render_mode="rgb_array"``."""
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"images need render_mode='rgb_array', the environment has {self.render_mode!r}", stacklevel=2
            )
            return [None] * self.num_envs
        frames = self.envs.render()
        return list(frames) if frames is not None else [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute once per row: the sub-environment's where there are such, else the one that all rows share."""
        holder = self._find(attr_name)
        if holder is not None:
            return [getattr(holder, attr_name) for _ in self._get_indices(indices)]
        values = self._call_each(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute for all rows; a native vector environment has one value for all."""
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"set_attr({attr_name!r}, indices={indices!r}): all rows share one attribute; leave indices out"
            )
        if self._find(attr_name) is None and hasattr(self.envs.unwrapped, "set_attr"):
            self.envs.unwrapped.set_attr(attr_name, value)
        else:
            setattr(self._find(attr_name) or self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of the batch once and gives each row its own row of the result.

        ``action_masks()``, for instance, answers (num_envs, n). A result that is no batch goes to every row.
        """
        holder = self._find(method_name)
        if holder is None:
            result = self._call_each(method_name, *method_args, **method_kwargs)
        else:
            result = _to_numpy(getattr(holder, method_name)(*method_args, **method_kwargs))
        batched = (
            isinstance(result, (np.ndarray, list, tuple)) and np.ndim(result) != 0 and len(result) == self.num_envs
        )
        return [result[i] if batched else result for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for ``Monitor``, whose ``info["episode"]`` is written here, and for wrappers around the batch."""
        found = issubclass(wrapper_class, Monitor) or any(isinstance(env, wrapper_class) for env in self._chain())
        return [found for _ in self._get_indices(indices)]

    def _chain(self) -> list[VectorEnv]:
        """The environment and what it wraps, outermost first: vector wrappers pass no attributes through."""
        chain = [self.envs]
        while hasattr(chain[-1], "env"):
            chain.append(chain[-1].env)
        return chain

    def _find(self, name: str) -> Any:
        return next((env for env in self._chain() if hasattr(env, name)), None)

    def _call_each(self, name: str, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """Row by row, where the batch is made of scalar environments (``SyncVectorEnv``, ``AsyncVectorEnv``)."""
        if not hasattr(self.envs.unwrapped, "call"):
            raise AttributeError(f"{type(self.envs.unwrapped).__name__} has no attribute {name!r}")
        return self.envs.unwrapped.call(name, *args, **kwargs)

    def _arrays(self, obs: Any) -> Any:
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        if isinstance(first, torch.Tensor):
            self._torch_device = first.device
        return _to_numpy(obs)

    def _take_final(self, info: dict, infos: list[dict], rows: list[int]) -> dict[int, Any]:
        """Same-step mode: gives ended rows their last observation and info; the rest is about the new episode."""
        terminal = {}
        final_obs = _to_numpy(info.get("final_obs"))
        for i in rows:
            terminal[i] = _copy_row(final_obs, i)
            final_info = infos[i].pop("final_info", {})
            self.reset_infos[i] = {key: value for key, value in infos[i].items() if key not in _TRANSITION_KEYS}
            infos[i] = {key: infos[i][key] for key in _TRANSITION_KEYS if key in infos[i]} | final_info
        return terminal

    def _reset_rows(self, rows: np.ndarray, before: Any) -> tuple[Any, dict[int, Any]]:
        """Resets the finished rows only.

        Returns:
            The observations, and the last observation of every unfinished row that the environment reset as well.
        """
        obs, info = self.envs.reset(options={"reset_mask": rows.copy()})
        obs = self._arrays(obs)
        moved = np.flatnonzero(_changed_rows(obs, before) & ~rows).tolist()
        if moved:
            name = type(self.envs.unwrapped).__name__
            if self._mode is AutoresetMode.DISABLED:
                raise ValueError(
                    f"{name} has autoreset disabled but ignores options['reset_mask'], so ended rows cannot be reset"
                )
            warnings.warn(f"{name} ignores options['reset_mask']; one step after each episode is lost", stacklevel=3)
            self._ignores_reset_mask = True
        split = _split_infos(info, self.num_envs)
        for i in [*np.flatnonzero(rows), *moved]:
            self.reset_infos[i] = split[i]
        return obs, {i: _copy_row(before, i) for i in moved}

    def _close_own_resets(self, infos: list[dict], terminal: dict[int, Any]) -> dict[int, Any]:
        """Makes the step in which a row reset itself an episode without a lesson; returns the rows that are next."""
        for i, last in self._own_resets.items():
            self.reset_infos[i] = infos[i]
            infos[i] = {"terminal_observation": last}
        return {i: copy.deepcopy(last) for i, last in terminal.items()}


def as_vec_env(envs: VectorEnv | gym.Env) -> VecEnv:
    """A Gymnasium environment, vector or single, for Stable-Baselines3."""
    return GymVectorToSB3(envs) if isinstance(envs, VectorEnv) else DummyVecEnv([lambda: Monitor(envs)])


def _to_numpy(value: Any) -> Any:
    """Tensors, also inside a dict, as arrays on the CPU; anything else as it is."""
    if isinstance(value, dict):
        return {key: _to_numpy(each) for key, each in value.items()}
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _copy_row(batch: Any, row: int) -> Any:
    """One row of a batch of observations, sharing no memory with it; also from an object array of observations."""
    if isinstance(batch, dict):
        return {key: _copy_row(value, row) for key, value in batch.items()}
    one = batch[row]
    return {key: np.array(value) for key, value in one.items()} if isinstance(one, dict) else np.array(one)


def _changed_rows(one: Any, other: Any) -> np.ndarray:
    """Which rows differ between two batches of observations. Shape (N,), bool."""
    if isinstance(one, dict):
        return np.logical_or.reduce([_changed_rows(one[key], other[key]) for key in one])
    return (one != other).reshape(len(one), -1).any(1)


def _split_infos(info: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays with masks (``_key``) as one dict per row, numbers as Python's."""
    infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for key, value in info.items():
        if key == "final_obs" or (key.startswith("_") and key[1:] in info):
            continue
        mask = info.get(f"_{key}")
        rows = range(num_envs) if mask is None else np.flatnonzero(_to_numpy(mask)).tolist()
        if isinstance(value, dict):
            value = _split_infos(value, num_envs)
        value = _to_numpy(value)
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype != object:
            value = value.tolist()
            for i in rows:
                infos[i][key] = value[i]
            continue
        for i in rows:
            one = value[i]
            infos[i][key] = (
                one.item() if isinstance(one, np.generic) else np.array(one) if isinstance(one, np.ndarray) else one
            )
    return infos
