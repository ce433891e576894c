"""The native batched environment: N rows of text generation behind ``gymnasium.vector.VectorEnv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rlhf_gym.envs.core import STOP_REASONS, TextGenerationProcess, Transition
from rlhf_gym.envs.episodes import ResponseRewards, evaluate_responses
from rlhf_gym.envs.options import ResetOptions, parse_options
from rlhf_gym.envs.render import render_ansi, render_rgb
from rlhf_gym.envs.settings import TaskSettings, check_argument_names
from rlhf_gym.envs.view import episode_view

OUTPUTS = ("numpy", "torch")


class TextGenerationVectorEnv(TaskSettings, VectorEnv):
    """Text generation as a batched Markov decision process.

    ## Description
    A language model's context is the state, a token the action. An episode is one prompt with its response. The score
    of the finished response is paid on its last token; a KL penalty, if any, on every token. The environment holds the
    reference model (with a KV cache per row: a step costs one token's forward for all rows), the prompts and the
    reward; the policy is the agent's.

    ## Observation Space
    ``Dict(input_ids=Box(0, V - 1, (L,), int64), attention_mask=Box(0, 1, (L,), int8))`` per row, ``L =
    max_prompt_tokens + max_response_tokens``, right-padded, so that ``model(**obs)`` is a correct call on any Hugging
    Face causal LM and the logits of the next token stand at ``attention_mask.sum(-1) - 1``.

    ## Action Space
    ``Discrete(V)``: the next token.

    ## Starting State
    The row's next prompt. Row i is seeded ``seed + i`` and visits all prompts in its own shuffled order.
    ``reset(options=...)`` takes ``"prompts"`` (one string or dict per row), ``"prompt_index"`` (an integer, or one per
    row) and ``"reset_mask"`` ((N,) bool: only these rows are reset).

    ## Rewards
    ``score`` on the last token (dense reward terms: as they fall due) ``- kl_coef * (log pi - log pi_ref)`` on every
    token. With ``kl_coef > 0`` the agent calls ``env.unwrapped.announce_logprobs(logprobs)`` before each ``step``.

    ## Episode End
    ``terminated`` at EOS and at ``max_response_tokens``: the horizon is part of the task, and the score is paid either
    way. Never ``truncated``.

    ## Information
    Describing the action just taken: ``ref_logprob``; on the last step of an episode ``score``, ``score/<term>``,
    ``metric/<name>``, ``kl`` (sum over the response, when every step was announced), ``stop_reason`` ("eos" or
    "length"; torch: int8, 1 or 2), and in numpy mode ``prompt`` and ``response``; in same_step mode these stand in
    ``final_info``.
    Describing the returned observation: ``prompt_index`` (-1: given to reset), and ``action_mask`` (int8) when tokens
        are forbidden.

    ## Arguments
    ``output="numpy"`` or ``"torch"`` (every array a tensor on ``device``); ``autoreset_mode="next_step"``,
    ``"same_step"`` or ``"disabled"``; ``render_mode`` None, "ansi", "human" or "rgb_array"; all others are those of
    :class:`rlhf_gym.envs.core.TextGenerationProcess`.

    ## References
    Ziegler et al. 2019, arXiv:1909.08593 (the process and its KL penalty); Ramamurthy et al. 2022, arXiv:2210.01241 (as
    a Gym environment).

    ## Version History
    * v0: first version.
    """

    metadata = {
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        output: str = "numpy",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **task: Any,
    ):
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(map(repr, OUTPUTS))}, got {output!r}")
        self._mode = _autoreset_mode(autoreset_mode)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be None or one of {self.metadata['render_modes']}, got {render_mode!r}")
        check_argument_names(task, ("num_envs", "output", "autoreset_mode", "render_mode"))
        self.process = TextGenerationProcess(num_envs, **task)
        self.num_envs, self.output, self.render_mode = num_envs, output, render_mode
        # On the instance: a class attribute would change the mode of every other environment.
        self.metadata = {**type(self).metadata, "autoreset_mode": self._mode}
        self.single_observation_space, self.single_action_space = make_spaces(self.process)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._pending = torch.zeros(
            num_envs, dtype=torch.bool, device=self.process.device
        )  # rows that the next step resets

    # ---- Gymnasium

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start episodes in all rows, or in those of ``options["reset_mask"]``; see the class for ``options``.

        Args:
            seed: Row i is seeded ``seed + i``; or one seed per row. None goes on in the rows' order of prompts.

        Raises:
            ValueError, TypeError: For options of the wrong form; nothing has changed then.
        """
        parsed = parse_options(self.process, options)
        seeds = self._row_seeds(seed)
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))
        for row, row_seed in enumerate(seeds):
            if row_seed is not None and parsed.rows[row]:
                self.process.seed_row(row, seeding.np_random(row_seed)[0])
        self._begin(parsed)
        info: dict[str, Any] = {}
        self._describe_observation(info)
        if self.render_mode == "human":
            self.render()
        return self._observation(), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append ``actions`` (N,) to the rows; see the class docstring.

        Raises:
            ValueError: For a bad action, a missing announcement, an ended row (disabled mode) or a failing reward;
                nothing has changed then.
        """
        resetting = self._pending.clone()
        transition = self.process.step(actions, ~resetting)
        if bool(resetting.any()):
            self._begin(ResetOptions(rows=resetting.tolist()))
        info: dict[str, Any] = {}
        if transition.ref_logprobs is not None:
            self._put(info, "ref_logprob", transition.ref_logprobs, ~resetting)
        ended = transition.terminated
        if transition.ended_rows:
            end_info = self._end_info(transition)
            if self._mode is AutoresetMode.SAME_STEP:
                self._put_final(info, end_info, ended)
                self._begin(ResetOptions(rows=ended.tolist()))
            else:
                info |= end_info
                if self._mode is AutoresetMode.NEXT_STEP:
                    self._pending |= ended
        self._describe_observation(info)
        if self.render_mode == "human":
            self.render()
        truncated = torch.zeros_like(ended)
        return self._observation(), self._out(transition.rewards), self._out(ended), self._out(truncated), info

    def render(self) -> tuple[Any, ...] | None:
        """One frame per row: a string ("ansi") or an array (H, W, 3) uint8 ("rgb_array"); "human" prints and returns
        None."""
        if self.render_mode is None:
            return None
        views = [episode_view(self.process, row) for row in range(self.num_envs)]
        if self.render_mode == "rgb_array":
            return tuple(render_rgb(view) for view in views)
        frames = tuple(render_ansi(view) for view in views)
        if self.render_mode == "human":
            print("\n".join(frames), flush=True)
            return None
        return frames

    # ---- beyond Gymnasium (reached through `env.unwrapped`)

    def announce_logprobs(self, logprobs: Any) -> None:
        """Tell log pi of the next actions, (N,) in nats; or (N, V) for the exact KL. Rows in autoreset may hold
        anything."""
        self.process.announce_logprobs(logprobs)

    def action_masks(self) -> Any:
        """True where a token may be chosen next, (N, V) bool; all True when nothing is forbidden."""
        return self._out(self.process.action_masks())

    def evaluate_responses(
        self,
        prompt_ids: Sequence[Any],
        response_ids: Any,
        response_mask: Any,
        logprobs: Any | None = None,
        prompt_index: Any | None = None,
    ) -> ResponseRewards:
        """Rewards of whole finished responses, equal to stepping through them; see
        :func:`rlhf_gym.envs.episodes.evaluate_responses`."""
        return evaluate_responses(self.process, prompt_ids, response_ids, response_mask, logprobs, prompt_index)

    def clone_state(self) -> dict[str, Any]:
        """A copy of everything that the future depends on, KV cache included: for tree search and Monte-Carlo
        estimates."""
        return {"process": self.process.clone_state(), "pending": self._pending.clone()}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that ``clone_state`` of this environment gave; it may be restored any number of times."""
        pending = state["pending"]
        self.process.restore_state(state["process"])
        self._pending.copy_(pending)

    # ---- inside

    def _begin(self, options: ResetOptions) -> None:
        rows = [row for row, chosen in enumerate(options.rows) if chosen]
        prompts = [options.prompts[row] if options.prompts else self.process.next_prompt(row) for row in rows]
        self.process.begin(rows, prompts)
        self._pending[rows] = False

    def _row_seeds(self, seed: Any) -> list[int | None]:
        """The seed of each row, once all of them have been checked."""
        if seed is None:
            return [None] * self.num_envs
        several = not isinstance(seed, str) and np.ndim(seed) == 1
        seeds = list(seed) if several else [seed]
        if several and len(seeds) != self.num_envs:
            raise ValueError(f"a list of seeds must have one entry per row: {self.num_envs}, got {len(seeds)}")
        for i, one in enumerate(seeds):
            if several and one is None:
                continue
            if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or one < 0:
                raise ValueError(f"{f'seed[{i}]' if several else 'seed'} must be an integer >= 0, got {one!r}")
        if several:
            return [None if one is None else int(one) for one in seeds]
        return [int(seed) + i for i in range(self.num_envs)]

    def _out(self, x: Tensor) -> Any:
        """The one place where tensors leave: a copy, as numpy or torch."""
        return x.clone() if self.output == "torch" else x.cpu().numpy().copy()

    def _observation(self) -> dict[str, Any]:
        return {key: self._out(value) for key, value in self.process.observation().items()}

    def _put(self, info: dict[str, Any], key: str, value: Tensor, mask: Tensor) -> None:
        info[key], info[f"_{key}"] = self._out(value), self._out(mask)

    def _describe_observation(self, info: dict[str, Any]) -> None:
        everyone = torch.ones(self.num_envs, dtype=torch.bool, device=self.process.device)
        index = torch.tensor(
            [-1 if p is None else p.index for p in self.process.row_prompts], device=self.process.device
        )
        self._put(info, "prompt_index", index, everyone)
        if self.process.forbids_tokens:
            self._put(info, "action_mask", self.process.action_masks().to(torch.int8), everyone)

    def _end_info(self, transition: Transition) -> dict[str, Any]:
        """The end-of-episode keys, full width with their masks."""
        info: dict[str, Any] = {}
        rows, ended = transition.ended_rows, transition.terminated
        scored, process = transition.scored, self.process

        def widen(values: Tensor) -> Tensor:
            full = torch.zeros(self.num_envs, device=process.device)
            full[rows] = values.to(full)
            return full

        self._put(info, "score", widen(torch.from_numpy(scored.totals)), ended)
        for name, term in scored.terms.items():
            self._put(info, f"score/{name}", widen(torch.from_numpy(np.asarray(term))), ended)
        for name, metric in scored.metrics.items():
            self._put(info, f"metric/{name}", widen(torch.from_numpy(metric)), ended)
        known = widen(torch.isfinite(transition.kl)).bool()
        if bool(known.any()):
            self._put(info, "kl", torch.where(known, widen(torch.nan_to_num(transition.kl)), 0.0), known)
        if self.output == "torch":
            self._put(info, "stop_reason", transition.stop_reasons, ended)
            return info
        texts = {
            "stop_reason": [STOP_REASONS[int(transition.stop_reasons[row])] for row in rows],
            "prompt": [process.row_prompts[row].text for row in rows],
            "response": scored.completions,
        }
        for key, values in texts.items():
            column = np.full(self.num_envs, None, dtype=object)
            column[rows] = values
            info[key], info[f"_{key}"] = column, self._out(ended)
        return info

    def _put_final(self, info: dict[str, Any], end_info: dict[str, Any], ended: Tensor) -> None:
        observation = self._observation()
        if self.output == "torch":
            info["final_obs"] = observation
        else:
            info["final_obs"] = np.full(self.num_envs, None, dtype=object)
            for row in ended.nonzero().flatten().tolist():
                info["final_obs"][row] = {key: value[row].copy() for key, value in observation.items()}
        self._put(
            end_info,
            "prompt_index",
            torch.tensor([p.index for p in self.process.row_prompts], device=ended.device),
            ended,
        )
        info["final_info"] = end_info
        info["_final_obs"], info["_final_info"] = self._out(ended), self._out(ended)


def make_spaces(process: TextGenerationProcess) -> tuple[spaces.Dict, spaces.Discrete]:
    """Observation and action space of one row."""
    shape, top = (process.max_tokens,), process.vocab_size - 1
    observation = spaces.Dict(
        input_ids=spaces.Box(0, top, shape, np.int64), attention_mask=spaces.Box(0, 1, shape, np.int8)
    )
    return observation, spaces.Discrete(process.vocab_size)


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    names = {m.name.lower(): m for m in AutoresetMode}
    if not isinstance(mode, str) or mode.lower() not in names:
        raise ValueError(f"autoreset_mode must be one of {', '.join(map(repr, names))}, got {mode!r}")
    return names[mode.lower()]
