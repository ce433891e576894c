"""Best-of-N: several responses are sampled and the one with the highest score is kept. Nothing is trained.

    1. Sample ``num_candidates`` responses to a prompt from the policy, which stays what it is (the reference).
    2. Score them, and take the first of the best.

The price is paid when it is used: N times the tokens and N scores for each response, and the reward has to be at hand.
So ``learn`` generates nothing, and the tokens it has learnt from are 0.

Objective: E[score of the best of N], with no regard to kl_coef. Yet its KL to the reference is bounded, log N - (N - 1)
/ N nats per response, and less where responses tie (Beirami et al. 2024); no training of any kind is steadier. For a
score of 0 or 1 it lies on the exact frontier: no policy has more reward at its KL (docs/exact.md). With the N that
suits kl_coef it is a baseline that trained agents have to reach.

`rlhf_gym.exact.evaluate` gives its objective, reward, KL and regret exactly (where the policy is the reference), and
`rlhf_gym.evaluation.evaluate` samples: for both the agent is best-of-N of its ``policy_model``, which is the language
model that candidates come from, and what is saved.

As a policy it plans: ``predict`` samples N continuations of the text so far, and then hands out the best one's tokens
as long as the episode follows it; where somebody else has chosen a token it plans anew from there.

Source: Stiennon et al. 2020; Nakano et al. 2021 (WebGPT). The settings of gradient steps (learning_rate, num_epochs and
the like), num_rounds and ref_kl_target have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from rlhf_gym.envs.episodes import evaluate_responses
from rlhf_gym.evaluation import evaluate, evaluation_process
from rlhf_gym.lm import generate, make_engine

from .base import Agent, Callback
from .config import COUNT, AgentConfig, check_fields


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(AgentConfig):
    """Settings of best-of-N; of those of every agent only ``dtype`` counts.

    Attributes:
        num_candidates: Responses that are sampled for each one that is kept, N. 1 is the policy itself.
    """

    num_candidates: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"num_candidates": COUNT})


@dataclass(frozen=True)
class _Plan:
    """What a row has said and is about to say; all are token ids.

    Attributes:
        prompt: The prompt.
        index: Its number in the environment, -1 for a prompt that is not one of its own.
        text: Prompt and response so far.
        response: The whole response that is planned, what is said of it included; no more than that if nothing is.
    """

    prompt: list[int]
    index: int
    text: list[int]
    response: list[int]

    @property
    def num_said(self) -> int:
        return len(self.text) - len(self.prompt)


class BestOfN(Agent):
    """Best-of-N sampling; see the module's docstring and :class:`BestOfNConfig`.

    Args:
        envs: A native vector environment without wrappers, which scores the candidates.
        policy: Whom to sample from; None is the environment's reference.
        seed, audit_interval, **config: As in :class:`~rlhf_gym.agents.base.Agent`.

    Attributes:
        num_candidates: N.

    Raises:
        ValueError: If the environment cannot score whole responses.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64)                 # doctest: +SKIP
        >>> BestOfN(envs, num_candidates=16).respond(["review of the lamp :"])          # doctest: +SKIP
    """

    config_class = BestOfNConfig

    def __init__(self, envs: VectorEnv, policy: Any = None, seed: int = 0, **arguments: Any):
        super().__init__(envs, policy, seed, **arguments)
        if not self.collector.by_whole_responses:
            raise ValueError(
                f"envs must be a native vector environment without wrappers, got {type(envs).__name__}: the candidates' "
                "whole responses have to be scored; use gym.make_vec and leave wrappers out"
            )
        self.num_candidates = self.config.num_candidates
        self._process = evaluation_process(envs)  # without the KL penalty
        self._index = {tuple(prompt.ids.tolist()): i for i, prompt in enumerate(self._process.prompts)}
        self._plans: list[_Plan | None] = []

    def learn(
        self, total_timesteps: int, callback: Callback | Sequence[Callback] | None = None, progress_bar: bool = False
    ) -> BestOfN:
        """Nothing is to be learnt, so nothing is generated; callbacks are called once, with N and the bound of the KL."""
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps must be >= 1, got {total_timesteps}")
        n = self.num_candidates
        metrics = {"best_of_n/num_candidates": float(n), "best_of_n/kl_bound": math.log(n) - (n - 1) / n}
        for call in [callback] if callable(callback) else list(callback or []):
            call(self, metrics)
        return self

    def respond(self, prompts: Any = None, seed: int | None = None) -> list[dict[str, Any]]:
        """The best of N responses to each prompt.

        Args:
            prompts: From any source that the environment takes; None: the environment's own.
            seed: Of the sampling. None: the agent's.

        Returns:
            For each prompt ``prompt``, ``response``, ``score`` and its terms, ``kl`` (an upper bound in the mean, see
            `rlhf_gym.evaluation.evaluate`), ``num_tokens`` and ``stop_reason``.
        """
        return evaluate(self, self.envs, prompts=prompts, seed=self.seed if seed is None else seed).samples

    @torch.no_grad()
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """The next tokens of the best continuations; see the module's docstring.

        Each row has a plan of its own, so observations have to come with the same rows in the same order. A text that
        no plan leads to is taken for one of the environment's prompts with the beginning of a response, where it can be,
        and otherwise for a prompt. Where the response has ended, the padding token is returned.

        Args:
            observation: ``input_ids`` and ``attention_mask`` of one row (L,) or several (N, L), numpy or torch.
            deterministic: Draw the candidates with the same random numbers each time: a plan then depends on nothing
                but the text.

        Returns:
            As :meth:`~rlhf_gym.agents.base.Agent.predict`.
        """
        ids, mask = (torch.as_tensor(observation[key]).cpu() for key in ("input_ids", "attention_mask"))
        single = ids.dim() == 1
        ids, lengths = (ids[None], mask[None].sum(1)) if single else (ids, mask.sum(1))
        texts = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        if len(self._plans) != len(texts):
            self._plans = [None] * len(texts)
        plans = [self._followed(plan, text) for plan, text in zip(self._plans, texts, strict=True)]
        unplanned = [row for row, plan in enumerate(plans) if self._has_to_go_on(plan)]
        for said in sorted({plans[row].num_said for row in unplanned}):  # so many tokens are left to all of these
            rows = [row for row in unplanned if plans[row].num_said == said]
            responses = self._best_continuations([plans[row] for row in rows], deterministic)
            for row, response in zip(rows, responses, strict=True):
                plans[row] = replace(plans[row], response=response)
        self._plans = list(plans)
        tokens = [(plan.response[plan.num_said :] or [self._process.pad_token_id])[0] for plan in plans]
        found = torch.tensor(tokens[0] if single else tokens)
        is_tensor = isinstance(observation["input_ids"], Tensor)
        return (found.to(observation["input_ids"].device) if is_tensor else found.numpy()), None

    def _followed(self, plan: _Plan | None, text: list[int]) -> _Plan:
        """The row's plan, in which the text may be one token further; otherwise one that knows what has been said."""
        # The same text again is the same question, but a bare prompt is the next episode.
        if plan is not None and len(text) > len(plan.prompt) and plan.text in (text, text[:-1]):
            said = text[len(plan.prompt) :]
            as_planned = plan.response[: len(said)] == said
            return replace(plan, text=text, response=plan.response if as_planned else said)
        limit = self._process.max_response_tokens
        starts = [n for n in set(map(len, self._index)) if tuple(text[:n]) in self._index and len(text) - n <= limit]
        start = max(starts, default=len(text))
        return _Plan(text[:start], self._index.get(tuple(text[:start]), -1), text, text[start:])

    def _has_to_go_on(self, plan: _Plan) -> bool:
        """Whether all that is planned has been said, and the response has not ended."""
        limit, ends = self._process.max_response_tokens, self._process.eos_token_ids
        has_ended = plan.num_said >= limit or (plan.num_said > 0 and plan.text[-1] in ends)
        return len(plan.response) == plan.num_said and not has_ended

    def _best_continuations(self, plans: list[_Plan], deterministic: bool) -> list[list[int]]:
        """The best of N responses that begin as these, which have equally many tokens so far."""
        process, n = self._process, self.num_candidates
        num_said = plans[0].num_said
        shape = (len(plans), n, process.max_response_tokens - num_said)
        if deterministic:
            uniforms = torch.rand(shape[1:], generator=torch.Generator().manual_seed(self.seed)).expand(shape)
        else:
            uniforms = torch.rand(shape, generator=self._predict_generator)
        prompts = [torch.tensor(plan.prompt, device=process.device) for plan in plans for _ in range(n)]
        said = torch.tensor([plan.response for plan in plans for _ in range(n)], device=process.device).long()
        texts = [torch.tensor([*plan.prompt, *plan.response], device=self.policy.device) for plan in plans]
        found = generate(
            self._engine(self.policy.model),
            [text for text in texts for _ in range(n)],
            max_response_tokens=shape[2],
            eos_token_ids=process.eos_token_ids,
            uniforms=uniforms.flatten(0, 1),
            token_filter=self.policy.token_filter,
            reference_engine=self._engine(self._reference().model) if self.policy.token_filter.uses_reference else None,
        )
        responses = torch.cat([said, found.response_ids.to(said)], dim=1)
        real = torch.cat([torch.ones_like(said).bool(), found.response_mask.to(said.device)], dim=1)
        memory = process.scorer.memory()  # planning is not to be seen by rewards that remember
        try:
            index = [plan.index for plan in plans for _ in range(n)]
            scores = evaluate_responses(process, prompts, responses, real, prompt_index=index).scores
        finally:
            process.scorer.restore_memory(memory)
        best = scores.reshape(-1, n).argmax(1) + n * torch.arange(len(plans), device=scores.device)
        return [responses[row, : int(real[row].sum())].tolist() for row in best.tolist()]

    def _engine(self, model: Any) -> Any:
        """A cache to generate in, with as many rows as the environment has."""
        key = (id(model), "plan")
        if key not in self._predict_engines:
            self._predict_engines[key] = make_engine(model, self.envs.num_envs, self._process.max_tokens)
        return self._predict_engines[key]
