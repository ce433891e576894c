"""Buffers of Stable-Baselines3 that keep token ids in as few bytes as the vocabulary needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, DictRolloutBuffer
from torch import Tensor


class CompactIds(BaseBuffer):
    """Mixed into a buffer for text: ids are kept in 1, 2 or 4 bytes (V up to 256, 65,536, more) instead of 8.

    A buffer keeps what the observation space says, and a text is kept whole for each of its tokens: ids are most of a
    buffer. The samples are those of the buffer underneath, in dtype and value.

    Args:
        buffer_size: As the buffer's.
        observation_space: ``Dict(input_ids, ...)``.
        *args: Those of the buffer.
        **kwargs: Those of the buffer.
    """

    observation_space: spaces.Dict

    def __init__(self, buffer_size: int, observation_space: spaces.Dict, *args: Any, **kwargs: Any) -> None:
        ids = observation_space["input_ids"]
        self.ids_dtype = ids.dtype  # of the samples
        low, high = int(ids.low.min()), int(ids.high.max())
        smallest = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
        if smallest.itemsize < ids.dtype.itemsize:
            ids = spaces.Box(low, high, ids.shape, smallest)
        kept = spaces.Dict(**(observation_space.spaces | {"input_ids": ids}))  # keywords keep their order
        super().__init__(buffer_size, kept, *args, **kwargs)

    def to_torch(self, array: np.ndarray, copy: bool = True) -> Tensor:
        """An array of the buffer as a tensor on its device, ids in their own dtype."""
        if array.dtype == self.observation_space["input_ids"].dtype:  # torch can do little with unsigned integers
            array, copy = array.astype(self.ids_dtype), False
        return super().to_torch(array, copy)


class CompactRolloutBuffer(CompactIds, DictRolloutBuffer):
    """For PPO, A2C and TRPO: ``PPO(..., rollout_buffer_class=CompactRolloutBuffer)``."""


class CompactMaskableRolloutBuffer(CompactIds, MaskableDictRolloutBuffer):
    """For MaskablePPO. The masks are as its own: float32."""


class CompactReplayBuffer(CompactIds, DictReplayBuffer):
    """For DQN and QR-DQN: ``DQN(..., replay_buffer_class=CompactReplayBuffer)``."""
