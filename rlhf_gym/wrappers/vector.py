"""The wrappers of this package for vector environments, under the same names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rlhf_gym.lm.engine import inference
from rlhf_gym.lm.forward import forward_at

from .hidden_state import hidden_space, hidden_states, text_process
from .top_k import Ranks


class HiddenStateObservation(VectorWrapper):
    """Observe what the reference's LM head reads at each row's last token, (N, d) float32.

    See :class:`rlhf_gym.wrappers.HiddenStateObservation`. All autoreset modes and both kinds of ``output``.
    """

    def __init__(self, env: VectorEnv):
        super().__init__(env)
        self.process = text_process(env)
        self.single_observation_space = hidden_space(env, env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the environment's."""
        _, info = self.env.reset(seed=seed, options=options)
        return self._out(hidden_states(self.process)), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's; in same-step mode ``final_obs`` holds hidden states too."""
        _, rewards, terminations, truncations, info = self.env.step(actions)
        if "final_obs" in info:
            info = info | {"final_obs": self._final(info["final_obs"], info["_final_obs"])}
        return self._out(hidden_states(self.process)), rewards, terminations, truncations, info

    def _final(self, final: Any, ended: Any) -> Any:
        """The rows have begun anew, so their engine knows nothing of these texts: one plain forward of the reference."""
        rows = torch.as_tensor(ended).nonzero()[:, 0]
        if isinstance(final, dict):  # tensors, batched
            ids, masks = final["input_ids"][rows], final["attention_mask"][rows]
        else:
            ids, masks = (
                torch.as_tensor(np.stack([final[row][key] for row in rows.tolist()]), device=self.process.device)
                for key in ("input_ids", "attention_mask")
            )
        model, last = self.process.language_model.model, masks.long().sum(1) - 1
        with inference(model):
            at = ids[:, : int(last.max()) + 1], torch.arange(len(ids), device=ids.device)[None], last[None]
            hidden = forward_at(model, *at, use_cache=False)[1][0].float()
        hidden = hidden[:, : self.single_observation_space.shape[0]]
        if isinstance(final, dict):
            return hidden.new_zeros(self.num_envs, hidden.shape[1]).index_copy(0, rows.to(hidden.device), hidden)
        out = np.full(self.num_envs, None, dtype=object)
        for row, one in zip(rows.tolist(), hidden.cpu().numpy(), strict=True):
            out[row] = one.copy()
        return out

    def _out(self, x: Tensor) -> Any:
        return to_output(self.env, x)


class TopKAction(VectorWrapper):
    """Choose among the k tokens that the reference finds likeliest in each row.

    See :class:`rlhf_gym.wrappers.TopKAction`.
    """

    def __init__(self, env: VectorEnv, k: int | None = None, forbidden: str = "error"):
        super().__init__(env)
        self.ranks = Ranks(text_process(env), k, forbidden)
        self.single_action_space = spaces.Discrete(self.ranks.k)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the environment's."""
        observations, info = self.env.reset(seed=seed, options=options)
        return observations, self._with_masks(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append the tokens that the actions (N,) stand for.

        Raises:
            ValueError: For an action out of range or forbidden, and as the environment's. Nothing has changed then.
        """
        tokens = to_output(self.env, self.ranks.choose(actions))
        observations, rewards, terminations, truncations, info = self.env.step(tokens)
        return observations, rewards, terminations, truncations, self._with_masks(info)

    def action_tokens(self) -> Any:
        """The token of each action, (N, k) int64; anything in rows that have ended."""
        return to_output(self.env, self.ranks.ranked()[0])

    def action_masks(self) -> Any:
        """True where an action may be chosen, (N, k) bool."""
        return to_output(self.env, self.ranks.ranked()[1])

    def announce_logprobs(self, logprobs: Any) -> None:
        """Tell log pi of the next actions, (N,) in nats; or of all actions, (N, k)."""
        self.unwrapped.announce_logprobs(self.ranks.announced(logprobs))

    @property
    def needs_all_logprobs(self) -> bool:
        """Whether an announcement must hold the log-probs of all actions."""
        return self.ranks.share_tokens

    def _with_masks(self, info: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" not in info:
            return info
        if self.ranks.share_tokens:
            return {key: value for key, value in info.items() if key not in ("action_mask", "_action_mask")}
        return info | {"action_mask": to_output(self.env, self.ranks.ranked()[1].to(torch.int8))}


def to_output(env: Any, x: Tensor) -> Any:
    """A tensor as the environment gives its own: a copy, numpy or torch."""
    return x.clone() if env.unwrapped.output == "torch" else x.cpu().numpy().copy()
