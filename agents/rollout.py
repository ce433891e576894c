"""Rollouts: batches of whole episodes, collected from any vector environment of text.

Our own environment is gone through by whole responses (generate, then ``evaluate_responses``): one reference forward
and one reward call for the batch. Any other Gymnasium ``VectorEnv`` with the same spaces, and ours behind wrappers, is
stepped (``stepping.py``). Both ways draw the same tokens from the same numbers and give the same :class:`Rollout`; the
agent cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from rlhf_gym.lm import generate, join_responses, make_engine, response_logits

from .batch import Batch, Rollout
from .policy import Policy
from .stepping import collect_by_stepping


class Collector:
    """Collects rollouts of a policy in an environment.

    Args:
        envs: A vector environment whose observations hold ``input_ids`` and ``attention_mask``.
        policy: The policy that acts.
        generator: Source of the uniform numbers, on the CPU so that a seed means the same on every device.
        num_rounds: Episodes per row and rollout; a row that finishes early takes its next prompt at once.
    """

    def __init__(self, envs: VectorEnv, policy: Policy, generator: torch.Generator, num_rounds: int = 1):
        space = envs.single_observation_space
        self.envs, self.policy, self.generator, self.num_rounds = envs, policy, generator, num_rounds
        self.by_whole_responses = hasattr(
            envs, "evaluate_responses"
        )  # a wrapper has no such method, and may change rewards
        self.width = space["input_ids"].shape[0]
        self.max_response_tokens = getattr(envs.unwrapped, "max_response_tokens", self.width)
        self._engine = self._reference_engine = None

    def collect(self, progress: Callable[[int], None] | None = None, seed: int | None = None) -> Rollout:
        """``num_envs * num_rounds`` episodes.

        Args:
            progress: Told of every n new tokens.
            seed: For the environment's first reset; None goes on in the rows' orders of prompts.
        """
        if self._engine is None:
            self._engine = make_engine(self.policy.model, self.envs.num_envs, self.width)
        self._engine.invalidate()  # the weights have changed since
        with torch.no_grad():
            # Drawn before anything is generated: episode b's tokens depend on its own numbers and on no other episode.
            num_episodes = self.envs.num_envs * self.num_rounds
            uniforms = torch.rand(num_episodes, self.max_response_tokens, generator=self.generator).to(
                self.policy.device
            )
            if self.by_whole_responses:
                rollout = self._whole_responses(uniforms, progress, seed)
            else:
                rollout = collect_by_stepping(self.envs, self.policy, self._engine, uniforms, progress, seed)
            if self.policy.critic is not None:
                # A critic with a trunk of its own did not run while the policy sampled.
                rollout.batch = replace(rollout.batch, values=self.policy(rollout.batch)[1])
            return rollout

    def _whole_responses(self, uniforms: Tensor, progress: Callable[[int], None] | None, seed: int | None) -> Rollout:
        envs, policy = self.envs, self.policy
        prompts, index, texts = [], [], []
        for round_number in range(self.num_rounds):
            observation, info = envs.reset(seed=seed if round_number == 0 else None)
            for row, length in enumerate(observation["attention_mask"].sum(1)):
                prompts.append(torch.as_tensor(observation["input_ids"][row][: int(length)]))
                index.append(int(info["prompt_index"][row]))
                texts.append(envs.prompts[index[-1]].text)
        if policy.token_filter.uses_reference and self._reference_engine is None:
            self._reference_engine = make_engine(envs.language_model.model, envs.num_envs, self.width)
        responses = generate(
            self._engine,
            prompts,
            max_response_tokens=self.max_response_tokens,
            eos_token_ids=envs.eos_token_ids,
            uniforms=uniforms,
            token_filter=policy.token_filter,
            reference_engine=self._reference_engine,
            value_fn=policy.value,
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
            values=responses.values,
            rewards=result.rewards,
            scores=result.scores,
            ended_by_eos=responses.ended_by_eos,
            kl=torch.zeros_like(result.rewards) if result.kl is None else result.kl,
        )
        if policy.token_filter.uses_reference:
            lengths = prompt_lengths + batch.response_mask.sum(1)
            logits, _ = response_logits(
                envs.language_model.model, ids, lengths, prompt_lengths - 1, self.max_response_tokens
            )
            batch = replace(batch, allowed=policy.token_filter.mask(logits, keep=batch.response_ids))
        return Rollout(batch, texts, result.completions, result.terms)
