"""One row of text generation behind ``gymnasium.Env``: a batch of one over the same process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

from rlhf_gym.envs.core import STOP_REASONS, TextGenerationProcess
from rlhf_gym.envs.episodes import ResponseRewards, evaluate_responses
from rlhf_gym.envs.options import parse_options
from rlhf_gym.envs.render import render_ansi, render_rgb
from rlhf_gym.envs.settings import TaskSettings, check_argument_names
from rlhf_gym.envs.vector import make_spaces
from rlhf_gym.envs.view import episode_view


class TextGenerationEnv(TaskSettings, gym.Env):
    """Text generation as a Markov decision process, one episode at a time.

    Description, spaces, rewards and information are those of :class:`rlhf_gym.envs.vector.TextGenerationVectorEnv` for
    a single row, with plain Python values in ``info``. Arguments are ``render_mode`` and those of
    :class:`rlhf_gym.envs.core.TextGenerationProcess`. Every model forward serves one row only, so use ``gym.make_vec``
    where speed matters.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 4}

    def __init__(self, *, output: str = "numpy", render_mode: str | None = None, **task: Any):
        if output != "numpy":
            raise ValueError(
                f"output must be 'numpy' for a single environment, got {output!r}; gym.make_vec gives tensors"
            )
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be None or one of {self.metadata['render_modes']}, got {render_mode!r}")
        check_argument_names(task, ("render_mode",))
        self.process = TextGenerationProcess(1, **task)
        self.num_envs, self.output, self.render_mode = 1, output, render_mode
        self.observation_space, self.action_space = make_spaces(self.process)

    @property
    def spec(self) -> EnvSpec | None:
        """How ``gym.make`` made this environment."""
        return self.__dict__.get("_spec")

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            # Wrappers deep-copy the spec with its arguments; the holders copy as themselves, live models would be
            # duplicated.
            holders = {"model": self.process.language_model, "reward": self.process.reward}
            spec.kwargs.update(
                {
                    k: v
                    for k, v in holders.items()
                    if v is not None and not isinstance(spec.kwargs.get(k), (str, type(None)))
                }
            )
        self.__dict__["_spec"] = spec

    # ---- Gymnasium

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; ``options`` may hold ``"prompts"`` (a string, a dict or a list of one) or
        ``"prompt_index"``.

        Raises:
            ValueError: For options of the wrong form; nothing has changed then.
        """
        parsed = parse_options(self.process, options)
        super().reset(seed=seed)
        if seed is not None or self.process._orders[0] is None:
            self.process.seed_row(0, self.np_random)
        self.process.begin([0], parsed.prompts or [self.process.next_prompt(0)])
        if self.render_mode == "human":
            self.render()
        return self._observation(), self._describe_observation()

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Append one token.

        Raises:
            ValueError: For a bad action, a missing announcement, an ended episode or a failing reward; nothing has
                changed then.
        """
        transition = self.process.step(torch.as_tensor(action).reshape(-1))
        info = self._describe_observation()
        if transition.ref_logprobs is not None:
            info["ref_logprob"] = float(transition.ref_logprobs[0])
        if transition.ended_rows:
            scored = transition.scored
            info["score"] = float(scored.totals[0])
            info |= {f"score/{name}": float(term[0]) for name, term in scored.terms.items()}
            info |= {f"metric/{name}": float(metric[0]) for name, metric in scored.metrics.items()}
            if bool(transition.kl.isfinite()):
                info["kl"] = float(transition.kl[0])
            info["stop_reason"] = STOP_REASONS[int(transition.stop_reasons[0])]
            info["prompt"], info["response"] = self.process.row_prompts[0].text, scored.completions[0]
        if self.render_mode == "human":
            self.render()
        return self._observation(), float(transition.rewards[0]), bool(transition.terminated[0]), False, info

    def render(self) -> Any:
        """A string ("ansi") or an array (H, W, 3) uint8 ("rgb_array"); "human" prints and returns None."""
        if self.render_mode is None:
            return None
        view = episode_view(self.process, 0)
        if self.render_mode == "rgb_array":
            return render_rgb(view)
        if self.render_mode == "human":
            print(render_ansi(view), flush=True)
            return None
        return render_ansi(view)

    # ---- beyond Gymnasium (reached through `env.unwrapped`)

    def announce_logprobs(self, logprobs: Any) -> None:
        """Tell log pi of the next action: a number or (1,) in nats, or (1, V) for the exact KL."""
        announced = torch.as_tensor(logprobs)
        self.process.announce_logprobs(announced.reshape(1) if announced.dim() == 0 else announced)

    def action_masks(self) -> np.ndarray:
        """True where a token may be chosen next, (V,) bool; all True when nothing is forbidden."""
        return self.process.action_masks()[0].cpu().numpy().copy()

    def evaluate_responses(
        self,
        prompt_ids: Sequence[Any],
        response_ids: Any,
        response_mask: Any,
        logprobs: Any | None = None,
        prompt_index: Any | None = None,
    ) -> ResponseRewards:
        """Rewards of any number of whole responses; see :func:`rlhf_gym.envs.episodes.evaluate_responses`."""
        return evaluate_responses(self.process, prompt_ids, response_ids, response_mask, logprobs, prompt_index)

    def clone_state(self) -> dict[str, Any]:
        """A copy of everything that the future depends on, KV cache included."""
        return {"process": self.process.clone_state()}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that ``clone_state`` of this environment gave."""
        self.process.restore_state(state["process"])

    # ---- inside

    def _observation(self) -> dict[str, np.ndarray]:
        return {key: value[0].cpu().numpy().copy() for key, value in self.process.observation().items()}

    def _describe_observation(self) -> dict[str, Any]:
        info: dict[str, Any] = {"prompt_index": self.process.row_prompts[0].index}
        if self.process.forbids_tokens:
            info["action_mask"] = self.action_masks().astype(np.int8)
        return info
