"""Rollouts: batches of whole episodes, collected from any vector environment of text.

Our own environment is gone through by whole responses (generate, then ``evaluate_responses``): one reference forward and one reward call for
the batch. Any other Gymnasium ``VectorEnv`` with the same spaces, and ours behind wrappers, is stepped. Both ways draw the same tokens from the same
generator and give the same :class:`Rollout`; the agent cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from rlhf_gym.lm import generate, join_responses, make_engine, response_logits, sample_tokens

from .policy import Policy


@dataclass(frozen=True)
class Batch:
    """B episodes, or some of them. R response columns, L = longest prompt + R.

    Attributes:
        ids: Prompt and response, right-padded. (B, L) int64.
        prompt_lengths: (B,) int64.
        response_ids: (B, R) int64.
        response_mask: True where a token is real. (B, R) bool.
        logprobs: log pi of the tokens when they were sampled, in nats. (B, R) float32.
        values: V of the states in which they were chosen. (B, R) float32.
        rewards: What the environment paid. (B, R) float32.
        scores: Score of each response. (B,) float32.
        ended_by_eos: (B,) bool.
        kl: KL estimate of each token; zeros where the environment has no reference. (B, R) float32.
        allowed: Which tokens could be chosen; only with top-k or top-p. (B, R, V) bool.
    """

    ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    scores: Tensor
    ended_by_eos: Tensor
    kl: Tensor
    allowed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Batch:
        """These rows, cut to their longest response so that padding is not computed."""
        mask = self.response_mask[index]
        num_tokens = int(mask.sum(1).max())
        width = int((self.prompt_lengths[index] + mask.sum(1)).max())
        cut: dict[str, Any] = {}
        for item in fields(Batch):
            tensor = getattr(self, item.name)
            if tensor is None:
                continue
            tensor = tensor[index]
            cut[item.name] = tensor[:, :width] if item.name == "ids" else tensor[:, :num_tokens] if tensor.dim() > 1 else tensor
        return Batch(**cut)


@dataclass
class Rollout:
    """A batch of episodes with what is logged about it.

    Attributes:
        batch: The episodes.
        prompts, completions: Their texts where the environment tells them, for samples.
        terms: The reward's ledger, each (B,) float32.
        num_tokens: Response tokens in the batch, EOS included: what a timestep counts.
    """

    batch: Batch
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.batch.response_mask.sum())


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
        self.by_whole_responses = hasattr(envs, "evaluate_responses")  # a wrapper has no such method, and may change rewards
        self.width = space["input_ids"].shape[0]
        self.max_response_tokens = getattr(envs.unwrapped, "max_response_tokens", self.width)
        self._engine = self._reference_engine = None

    def collect(self, progress: Callable[[int], None] | None = None) -> Rollout:
        """``num_envs * num_rounds`` episodes; ``progress(n)`` is told of every n new tokens."""
        if self._engine is None:
            self._engine = make_engine(self.policy.model, self.envs.num_envs, self.width)
        self._engine.invalidate()  # the weights have changed since
        with torch.no_grad():
            return self._whole_responses(progress) if self.by_whole_responses else self._stepping(progress)

    # ---- by whole responses

    def _whole_responses(self, progress: Callable[[int], None] | None) -> Rollout:
        envs, policy = self.envs, self.policy
        prompts, index, texts = [], [], []
        for _ in range(self.num_rounds):
            observation, info = envs.reset()
            for row, length in enumerate(_numpy(observation["attention_mask"]).sum(1)):
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
            uniforms=torch.rand(len(prompts), self.max_response_tokens, generator=self.generator).to(policy.device),
            token_filter=policy.token_filter,
            reference_engine=self._reference_engine,
            value_fn=policy.value,
            progress=progress,
        )
        result = envs.evaluate_responses(prompts, responses.response_ids, responses.response_mask, responses.logprobs, index)
        ids, _, prompt_lengths = join_responses(prompts, responses.response_ids, responses.response_mask, pad_token_id=envs.pad_token_id)
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
            logits, _ = response_logits(envs.language_model.model, ids, prompt_lengths + batch.response_mask.sum(1), prompt_lengths - 1, batch.response_ids.shape[1])
            batch = replace(batch, allowed=policy.token_filter.mask(logits, keep=batch.response_ids))
        return Rollout(self._with_separate_values(batch), texts, result.completions, result.terms)

    def _with_separate_values(self, batch: Batch) -> Batch:
        # A critic with a trunk of its own did not run while the policy sampled.
        return batch if self.policy.critic is None else replace(batch, values=self.policy(batch)[1])

    # ---- by stepping

    def _stepping(self, progress: Callable[[int], None] | None) -> Rollout:
        envs, policy, device = self.envs, self.policy, self.policy.device
        base, num_rows = envs.unwrapped, envs.num_envs
        same_step = envs.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP
        disabled = envs.metadata.get("autoreset_mode") is AutoresetMode.DISABLED
        num_episodes, num_columns = num_rows * self.num_rounds, self.max_response_tokens
        uniforms = torch.rand(num_episodes, num_columns, generator=self.generator).to(device)
        store = {name: torch.zeros(num_episodes, num_columns, device=device) for name in ("logprobs", "values", "rewards", "kl")}
        response_ids = torch.zeros(num_episodes, num_columns, dtype=torch.long, device=device)
        scores, ended_by_eos = torch.full((num_episodes,), torch.nan, device=device), torch.zeros(num_episodes, dtype=torch.bool, device=device)
        allowed: Tensor | None = None
        prompts: list[Any] = [None] * num_episodes
        texts, completions, terms = [""] * num_episodes, [""] * num_episodes, {}
        lengths = [0] * num_episodes
        done_rounds = np.zeros(num_rows, dtype=int)  # episodes finished in each row; episode b = round * num_rows + row
        resetting = np.zeros(num_rows, dtype=bool)  # rows whose next step is the reset of next_step mode

        observation, _ = envs.reset()
        while (done_rounds < self.num_rounds).any():
            ids = torch.as_tensor(observation["input_ids"]).long().to(device)
            filled = torch.as_tensor(observation["attention_mask"]).to(device).sum(1).long()
            acting = (done_rounds < self.num_rounds) & ~resetting
            episode = np.where(acting, np.minimum(done_rounds, self.num_rounds - 1) * num_rows + np.arange(num_rows), 0)
            for row in np.flatnonzero(acting):
                if prompts[episode[row]] is None:
                    prompts[episode[row]] = ids[row, : filled[row]].clone()
            needed = torch.from_numpy(~resetting).to(device)
            logits = self._engine.next_logits(ids, filled.clamp(max=self.width), needed)
            mask = None
            if policy.token_filter.allowed_tokens is not None or policy.token_filter.uses_reference:
                mask = torch.as_tensor(base.action_masks()).to(device)
            logprobs_all = policy.token_filter.logprobs(logits, mask)
            position = torch.tensor([lengths[b] for b in episode], device=device)
            b = torch.from_numpy(episode).to(device)
            draws = uniforms[b, position.clamp(max=num_columns - 1)]
            tokens = sample_tokens(logprobs_all, draws)
            logprobs = logprobs_all.gather(1, tokens[:, None])[:, 0]
            values = policy.value(self._engine.last_hidden)
            if hasattr(base, "announce_logprobs") and getattr(base, "language_model", None) is not None:
                base.announce_logprobs(logprobs)
            actions = tokens if isinstance(observation["input_ids"], Tensor) else tokens.cpu().numpy()
            observation, rewards, terminated, truncated, info = envs.step(actions)
            ended = _numpy(terminated) | _numpy(truncated)
            final = info.get("final_info", {}) if same_step else info
            ref_logprobs = info.get("ref_logprob")
            for row in np.flatnonzero(acting):
                e, t = int(episode[row]), lengths[int(episode[row])]
                response_ids[e, t], lengths[e] = tokens[row], t + 1
                store["logprobs"][e, t], store["values"][e, t], store["rewards"][e, t] = logprobs[row], values[row], float(rewards[row])
                if ref_logprobs is not None:
                    store["kl"][e, t] = logprobs[row] - float(ref_logprobs[row])
                if mask is not None and policy.token_filter.uses_reference:
                    allowed = torch.ones(num_episodes, num_columns, mask.shape[1], dtype=torch.bool, device=device) if allowed is None else allowed
                    allowed[e, t] = mask[row]
                if ended[row]:
                    done_rounds[row] += 1
                    scores[e] = float(final["score"][row]) if "score" in final else store["rewards"][e].sum()
                    ended_by_eos[e] = int(tokens[row]) in getattr(base, "eos_token_ids", ())
                    texts[e], completions[e] = (str(final[key][row]) if key in final else "" for key in ("prompt", "response"))
                    for key in final:
                        if key.startswith("score/"):
                            terms.setdefault(key[len("score/") :], torch.zeros(num_episodes))[e] = float(final[key][row])
            if progress is not None:
                progress(int(acting.sum()))
            if disabled and ended.any():
                observation, _ = envs.reset(options={"reset_mask": ended})
            resetting = ended & (not same_step and not disabled)

        mask = torch.arange(num_columns, device=device) < torch.tensor(lengths, device=device)[:, None]
        ids, _, prompt_lengths = join_responses(prompts, response_ids, mask, pad_token_id=getattr(base, "pad_token_id", 0))
        batch = Batch(
            ids=ids, prompt_lengths=prompt_lengths, response_ids=response_ids, response_mask=mask, scores=scores, ended_by_eos=ended_by_eos, allowed=allowed, **store
        )
        return Rollout(self._with_separate_values(batch), texts, completions, terms)


def _numpy(x: Any) -> np.ndarray:
    return x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
