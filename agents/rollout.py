"""Rollouts: batches of whole episodes, collected from any vector environment of text.

Our own environment is gone through by whole responses (generate, then ``evaluate_responses``): one reference forward
and one reward call for the batch. Any other Gymnasium ``VectorEnv`` with the same spaces, and ours behind wrappers, is
stepped (``stepping.py``). Both ways draw the same tokens from the same numbers and give the same :class:`Rollout`; the
agent cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from torch import Tensor

from rlhf_gym.lm import Engine, generate, join_responses, make_engine, response_logits

from . import parallel
from .batch import Batch, Rollout
from .policy import Policy
from .stepping import collect_by_stepping

ROWS_PER_PASS = 32  # passes beside the sampling hold logits of so many responses at a time


class Collector:
    """Collects rollouts of a policy in an environment.

    Args:
        envs: A vector environment whose observations hold ``input_ids`` and ``attention_mask``.
        policy: The policy that acts.
        generator: Source of the uniform numbers, on the CPU so that a seed means the same on every device.
        num_rounds: Episodes per row and rollout; a row that finishes early takes its next prompt at once.
        group_size: Responses to each prompt, next to each other in the batch: every so many-th row's prompt is given to
            the rows after it too.
        with_baselines: Whether the likeliest response to each prompt is generated and scored as well.

    Raises:
        ValueError: If the groups do not fit into the rows, or the environment cannot be asked for them, or several
            processes train together in an environment that has to be stepped.
    """

    def __init__(
        self,
        envs: VectorEnv,
        policy: Policy,
        generator: torch.Generator,
        num_rounds: int = 1,
        *,
        group_size: int = 1,
        with_baselines: bool = False,
    ):
        space = envs.single_observation_space
        self.envs, self.policy, self.generator, self.num_rounds = envs, policy, generator, num_rounds
        # A wrapper has no such method, and may change rewards.
        self.by_whole_responses = hasattr(envs, "evaluate_responses")
        self.group_size, self.with_baselines = group_size, with_baselines
        if parallel.size() > 1 and not self.by_whole_responses:
            raise ValueError(
                "envs must be the native environment without wrappers where several processes train together, got "
                f"{type(envs).__name__}; rows that are stepped are not shared out"
            )
        if envs.num_envs % group_size:
            raise ValueError(
                f"group_size must divide the environment's {envs.num_envs} rows, got {group_size}; all responses to a "
                "prompt stand in rows of one batch"
            )
        if (group_size > 1 or with_baselines) and not self.by_whole_responses:
            if num_rounds > 1:
                raise ValueError(
                    f"num_rounds must be 1 for several responses to a prompt in an environment that is stepped, got "
                    f"{num_rounds}; use more rows, or the native environment without wrappers"
                )
            if isinstance(envs.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
                raise ValueError(
                    f"envs must take a prompt for each row, and Gymnasium's {type(envs.unwrapped).__name__} resets all of "
                    "its rows with the same options; use gym.make_vec without vectorization_mode"
                )
        self.width = space["input_ids"].shape[0]
        self.max_response_tokens = getattr(envs.unwrapped, "max_response_tokens", self.width)
        self._engine: Engine | None = None
        self._mask_engine: Engine | None = None

    def collect(self, progress: Callable[[int], None] | None = None, seed: int | None = None) -> Rollout:
        """``num_envs * num_rounds`` episodes.

        Args:
            progress: Told of every n new tokens.
            seed: For the environment's first reset; None goes on in the rows' orders of prompts.
        """
        if self._engine is None:
            self._engine = make_engine(self.policy.model, parallel.share(self.envs.num_envs), self.width)
        if self._mask_engine is None and self._mask_model is not None:
            self._mask_engine = make_engine(self._mask_model, self._engine.num_rows, self.width)
        for engine in filter(None, (self._engine, self._mask_engine)):
            engine.invalidate()  # the weights have changed since
        with torch.no_grad():
            # Drawn before anything is generated: episode b's tokens depend on its own numbers and on no other episode.
            num_episodes = self.envs.num_envs * self.num_rounds
            uniforms = torch.rand(num_episodes, self.max_response_tokens, generator=self.generator).to(
                self.policy.device
            )
            if self.by_whole_responses:
                rollout = self._whole_responses(uniforms, progress, seed)
            else:
                rollout = self._by_stepping(uniforms, progress, seed)
            if self.policy.critic is not None:
                # A critic with a trunk of its own did not run while the policy sampled.
                values = torch.zeros_like(rollout.batch.values)
                for rows in torch.arange(len(values), device=values.device).split(ROWS_PER_PASS):
                    part = rollout.batch.rows(rows)
                    values[rows, : part.response_ids.shape[1]] = self.policy(part)[1]
                rollout.batch = replace(rollout.batch, values=values)
            return rollout

    @property
    def _mask_model(self) -> Any:
        """The model whose logits a top-k or top-p looks at; None where nobody asks, or the environment tells masks."""
        if not self.policy.token_filter.uses_reference:
            return None
        if self.policy.mask_model is not None:
            return self.policy.mask_model
        return self.envs.language_model.model if self.by_whole_responses else None

    def _whole_responses(self, uniforms: Tensor, progress: Callable[[int], None] | None, seed: int | None) -> Rollout:
        envs, policy = self.envs, self.policy
        index: list[int] = []
        for round_number in range(self.num_rounds):
            _, info = envs.reset(seed=seed if round_number == 0 else None)
            rows = self._rows_asked(envs.num_envs)
            index += info["prompt_index"][rows].tolist()
        prompts = [envs.prompts[i].ids for i in index]
        rollout = self._respond(prompts, index, uniforms, progress)
        if self.with_baselines:
            # Equal prompts have the same likeliest response.
            asked = sorted(set(index))
            likeliest = self._respond([prompts[index.index(i)] for i in asked], asked, None, progress)
            which = torch.tensor([asked.index(i) for i in index], device=policy.device)
            rollout.baselines = likeliest.batch.rewards.sum(1)[which]
            rollout.num_baseline_tokens = likeliest.num_tokens
        return rollout

    def _rows_asked(self, num_rows: int) -> Tensor:
        """The row whose prompt each row gets: its own, or that of the first of its group."""
        rows = torch.arange(num_rows)
        return rows - rows % self.group_size

    def _by_stepping(self, uniforms: Tensor, progress: Callable[[int], None] | None, seed: int | None) -> Rollout:
        collect = partial(
            collect_by_stepping, self.envs, self.policy, self._engine, progress=progress, mask_engine=self._mask_engine
        )
        if self.group_size == 1 and not self.with_baselines:
            return collect(uniforms, seed=seed)
        info = self.envs.reset(seed=seed)[1]
        if "prompt_index" not in info:
            raise ValueError(
                "this agent needs several responses to a prompt, and this environment does not tell prompts apart "
                '(info["prompt_index"] and reset(options={"prompt_index": ...}))'
            )
        index = np.asarray(torch.as_tensor(info["prompt_index"]).cpu())[self._rows_asked(self.envs.num_envs).numpy()]
        rollout = collect(uniforms, prompt_index=index)
        if self.with_baselines:
            likeliest = collect(uniforms, prompt_index=index, deterministic=True)
            rollout.baselines = likeliest.batch.rewards.sum(1)
            rollout.num_baseline_tokens = likeliest.num_tokens
        return rollout

    def _respond(
        self,
        prompts: list[Tensor],
        index: list[int],
        uniforms: Tensor | None,
        progress: Callable[[int], None] | None,
    ) -> Rollout:
        """Sampled responses to these prompts with what they earn; the likeliest ones where ``uniforms`` is None.

        Where several processes train together, each generates its part.
        """
        if parallel.size() == 1:
            return self._generate(prompts, index, uniforms, progress)
        mine = list(range(parallel.rank(), len(prompts), parallel.size())) or [0]
        part = self._generate(
            [prompts[i] for i in mine],
            [index[i] for i in mine],
            None if uniforms is None else uniforms[mine],
            None if progress is None else lambda count: progress(count * parallel.size()),
        )
        return parallel.gather(part, len(prompts))

    def _generate(
        self,
        prompts: list[Tensor],
        index: list[int],
        uniforms: Tensor | None,
        progress: Callable[[int], None] | None,
    ) -> Rollout:
        envs, policy = self.envs, self.policy
        texts = [envs.prompts[i].text for i in index]
        responses = generate(
            self._engine,
            prompts,
            max_response_tokens=self.max_response_tokens,
            eos_token_ids=envs.eos_token_ids,
            uniforms=uniforms,
            token_filter=policy.token_filter,
            reference_engine=self._mask_engine,
            value_fn=None if policy.value_head is None else policy.value,
            progress=progress,
        )
        result = envs.evaluate_responses(
            prompts, responses.response_ids, responses.response_mask, responses.logprobs, index
        )
        ids, _, prompt_lengths = join_responses(
            prompts, responses.response_ids, responses.response_mask, pad_token_id=envs.pad_token_id
        )
        batch = Batch(
            ids=ids,
            prompt_lengths=prompt_lengths,
            response_ids=responses.response_ids,
            response_mask=responses.response_mask,
            logprobs=responses.logprobs,
            values=torch.zeros_like(result.rewards) if responses.values is None else responses.values,
            rewards=result.rewards,
            scores=result.scores,
            ended_by_eos=responses.ended_by_eos,
            kl=torch.zeros_like(result.rewards) if result.kl is None else result.kl,
            ref_logprobs=None if envs.language_model is None else result.ref_logprobs,
        )
        if policy.token_filter.uses_reference:
            model, lengths = self._mask_model, prompt_lengths + batch.response_mask.sum(1)
            allowed = []
            for rows in torch.arange(len(ids), device=ids.device).split(ROWS_PER_PASS):
                logits, _ = response_logits(
                    model, ids[rows], lengths[rows], prompt_lengths[rows] - 1, self.max_response_tokens
                )
                allowed.append(policy.token_filter.mask(logits, keep=batch.response_ids[rows]))
            batch = replace(batch, allowed=torch.cat(allowed))
        return Rollout(batch, texts, result.completions, result.terms, result.metrics)
