"""What an algorithm of Stable-Baselines3 needs to go on where it was: generators, optimiser, replay buffer, counters."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

# Where an algorithm counts. Those that it does not have are left out.
_COUNTERS = ("num_timesteps", "_n_updates", "_n_calls", "_episode_num", "exploration_rate")


def get_generators() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), np.random.get_state()


@contextlib.contextmanager
def own_generators(state: tuple[Tensor, Any] | None) -> Iterator[None]:
    """Inside, the global generators that SB3 draws from are in the given state; afterwards the caller's are back."""
    # Python's own generator is seeded by SB3 too, but nothing here draws from it: it is only put back.
    outside, outside_python = get_generators(), random.getstate()
    try:
        if state is not None:
            torch.set_rng_state(state[0])
            np.random.set_state(state[1])
        yield
    finally:
        torch.set_rng_state(outside[0])
        np.random.set_state(outside[1])
        random.setstate(outside_python)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's tensors, for safetensors, and its numbers, for JSON."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().clone().contiguous()
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": saved["param_groups"], "state": numbers}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers["state"].items()}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": numbers["param_groups"]})


def counters(algorithm: BaseAlgorithm) -> dict[str, float]:
    """How far an algorithm has come, for JSON."""
    return {name: getattr(algorithm, name) for name in _COUNTERS if hasattr(algorithm, name)}


def set_counters(algorithm: BaseAlgorithm, values: dict[str, float]) -> None:
    """Puts back what `counters` gave."""
    for name, value in values.items():
        setattr(algorithm, name, value)


_BUFFER_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def replay_state(buffer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a replay buffer holds, for safetensors, and its numbers, for JSON."""
    size = buffer.buffer_size if buffer.full else buffer.pos
    tensors = {name: torch.from_numpy(array[:size].copy()) for name, array in _arrays(buffer).items()}
    return tensors, {"pos": buffer.pos, "full": buffer.full}


def load_replay_state(buffer: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Puts back what `replay_state` gave, into a buffer of the same size."""
    for name, array in _arrays(buffer).items():
        array[: len(tensors[name])] = tensors[name].numpy()
    buffer.pos, buffer.full = numbers["pos"], numbers["full"]


def _arrays(buffer: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name in _BUFFER_ARRAYS:
        held = getattr(buffer, name)
        found |= {f"{name}.{key}": array for key, array in held.items()} if isinstance(held, dict) else {name: held}
    return found
