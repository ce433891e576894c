"""Rollouts by stepping, for vector environments that know nothing of whole responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from rlhf_gym.kl import estimate_kl
from rlhf_gym.lm import Engine, TokenFilter, join_responses, sample_tokens

from .batch import Batch, Rollout
from .policy import Policy


def token_filter_of(envs: VectorEnv) -> TokenFilter:
    """Temperature and masks of an environment, or of the rows of Gymnasium's ``SyncVectorEnv``; none where it has none.

    Raises:
        ValueError: If the rows differ.
    """
    base = envs.unwrapped
    rows = [base] if hasattr(base, "token_filter") else [env.unwrapped for env in getattr(base, "envs", ())]
    filters = {getattr(row, "token_filter", TokenFilter()) for row in rows} or {TokenFilter()}
    if len(filters) > 1:
        raise ValueError(f"all rows of envs must have one temperature and one filter, got {sorted(map(str, filters))}")
    return filters.pop()


def collect_by_stepping(
    envs: VectorEnv,
    policy: Policy,
    engine: Engine,
    uniforms: Tensor,
    progress: Callable[[int], None] | None = None,
    seed: int | None = None,
    prompt_index: np.ndarray | None = None,
    deterministic: bool = False,
    mask_engine: Engine | None = None,
) -> Rollout:
    """The first ``num_rounds`` episodes of every row after a reset, in any autoreset mode.

    Episode b is the (b // N)-th of row b % N. Rows that have finished theirs go on with the others, unrecorded: a batch
    can only be stepped as a whole. The prompts that they take are given back where the base can say where its rows
    stand in their orders (``prompt_order_state``), so that the next rollout goes on where this one's episodes ended.

    Args:
        envs: N rows whose observations hold ``input_ids`` and ``attention_mask``. Tokens that
            ``info["action_mask"]`` forbids are not chosen; ``announce_logprobs`` and ``kl_estimator`` are used where
            the base has them.
        policy: Chooses the tokens.
        engine: A cache of the policy's model with N rows.
        uniforms: One number per token. Shape (N * num_rounds, R); an episode longer than R is an error of the
            environment.
        progress: Told of every n new tokens.
        seed: For the reset that begins the rollout.
        prompt_index: Which prompts to begin with, (N,), for environments whose reset takes such an option.
        deterministic: Choose the likeliest token each time.
        mask_engine: A cache of the policy's own ``mask_model``, N rows; its mask is taken within the environment's.
    """
    base, device = envs.unwrapped, policy.device
    num_rows, num_rounds = envs.num_envs, len(uniforms) // envs.num_envs
    mode = envs.metadata.get("autoreset_mode")
    episodes = _Episodes(uniforms)
    # A mask of allowed_tokens alone is known to the update: it need not be kept for each token.
    keep_masks = policy.token_filter.uses_reference or policy.token_filter.allowed_tokens is None
    announces = hasattr(base, "announce_logprobs") and getattr(base, "language_model", None) is not None
    finished = np.zeros(num_rows, dtype=int)  # episodes of each row
    resetting = np.zeros(num_rows, dtype=bool)  # rows whose next step is next_step mode's reset
    orders: list[Any] = [None] * num_rows

    options = {} if prompt_index is None else {"options": {"prompt_index": prompt_index}}
    observation, info = envs.reset(seed=seed, **options)
    allowed = _allowed(info, None, device)
    while (finished < num_rounds).any():
        ids = torch.as_tensor(observation["input_ids"]).long().to(device)
        lengths = torch.as_tensor(observation["attention_mask"]).to(device).sum(1).long()
        recording = np.flatnonzero((finished < num_rounds) & ~resetting)
        episode = finished[recording] * num_rows + recording
        episodes.begin(episode, ids[recording], lengths[recording])
        if hasattr(base, "prompt_order_state"):
            last = recording[(finished[recording] == num_rounds - 1) & (episodes.lengths[episode] == 0)]
            if len(last):
                now = base.prompt_order_state()
                for row in last:
                    orders[row] = now[row]

        active = torch.from_numpy(~resetting).to(device)
        logits = engine.next_logits(ids, lengths, active)
        if mask_engine is not None:
            masking = mask_engine.next_logits(ids, lengths, active)
            if allowed is not None:
                masking = masking.masked_fill(~allowed, -torch.inf)
            allowed = policy.token_filter.mask(masking)
        all_logprobs = policy.token_filter.logprobs(logits, allowed)
        draws = torch.full((num_rows,), 0.5, device=device)
        draws[recording] = episodes.next_uniforms(episode)
        tokens = all_logprobs.argmax(-1) if deterministic else sample_tokens(all_logprobs, draws)
        logprobs = all_logprobs.gather(1, tokens[:, None])[:, 0]
        values = policy.value(engine.last_hidden)

        if announces:
            base.announce_logprobs(logprobs)
        observation, rewards, terminated, truncated, info = envs.step(
            tokens if isinstance(observation["input_ids"], Tensor) else tokens.cpu().numpy()
        )
        ended = _numpy(terminated) | _numpy(truncated)
        kl, ref_logprobs = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        if "ref_logprob" in info:
            ref_logprobs = torch.as_tensor(info["ref_logprob"]).to(logprobs)
            episodes.has_reference = True
            kl = estimate_kl(logprobs, ref_logprobs, getattr(base, "kl_estimator", "k1"))
        step = {
            "response_ids": tokens,
            "logprobs": logprobs,
            "values": values,
            "rewards": torch.as_tensor(rewards).to(values),
            "kl": kl,
            "ref_logprobs": ref_logprobs,
        }
        if allowed is not None and keep_masks:
            step["allowed"] = allowed
        episodes.add(episode, recording, step)
        over = ended[recording]
        ended_by_eos = [int(tokens[row]) in getattr(base, "eos_token_ids", ()) for row in recording[over]]
        episodes.end(
            episode[over],
            recording[over],
            ended_by_eos,
            info["final_info"] if mode is AutoresetMode.SAME_STEP and over.any() else info,
        )
        finished[recording[over]] += 1
        if progress is not None:
            progress(len(recording))
        allowed = _allowed(info, None, device)
        if mode is AutoresetMode.DISABLED and ended.any():
            observation, info = envs.reset(options={"reset_mask": ended})
            allowed = _allowed(info, allowed, device)
        resetting = ended if mode is AutoresetMode.NEXT_STEP else np.zeros(num_rows, dtype=bool)
    if hasattr(base, "prompt_order_state"):
        base.load_prompt_order_state(orders)
    return episodes.rollout(getattr(base, "pad_token_id", 0))


class _Episodes:
    """Fills B x R tables, one row per episode, token by token."""

    def __init__(self, uniforms: Tensor):
        self.uniforms, (count, width), device = uniforms, uniforms.shape, uniforms.device
        self.tables = {
            name: torch.zeros(count, width, device=device)
            for name in ("logprobs", "values", "rewards", "kl", "ref_logprobs")
        }
        self.has_reference = False
        self.tables["response_ids"] = torch.zeros(count, width, dtype=torch.long, device=device)
        self.lengths = np.zeros(count, dtype=int)
        self.prompts: list[Any] = [None] * count
        self.scores = torch.zeros(count, device=device)
        self.ended_by_eos = torch.zeros(count, dtype=torch.bool, device=device)
        self.texts = {"prompt": [""] * count, "response": [""] * count}
        self.terms: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}

    def begin(self, episode: np.ndarray, ids: Tensor, lengths: Tensor) -> None:
        """Note the prompts of episodes that have no token yet."""
        for i, b in enumerate(episode):
            if self.lengths[b] == 0:
                self.prompts[b] = ids[i, : int(lengths[i])].clone()

    def next_uniforms(self, episode: np.ndarray) -> Tensor:
        """The number that draws each episode's next token."""
        if len(episode) and self.lengths[episode].max() >= self.uniforms.shape[1]:
            raise ValueError(
                f"the environment goes on after {self.uniforms.shape[1]} response tokens, more than its observation "
                "has room for"
            )
        return self.uniforms[episode, self.lengths[episode]]

    def add(self, episode: np.ndarray, rows: np.ndarray, step: dict[str, Tensor]) -> None:
        """One more token in each of these episodes; ``step`` has a value per environment row."""
        if "allowed" in step and "allowed" not in self.tables:
            shape = (*self.uniforms.shape, step["allowed"].shape[1])
            self.tables["allowed"] = torch.ones(shape, dtype=torch.bool, device=self.uniforms.device)
        for name, values in step.items():
            self.tables[name][episode, self.lengths[episode]] = values[rows]
        self.lengths[episode] += 1

    def end(self, episode: np.ndarray, rows: np.ndarray, ended_by_eos: list[bool], info: dict[str, Any]) -> None:
        """These episodes are over; ``info`` has their end-of-episode keys where the environment gives any."""
        for b, row, eos in zip(episode, rows, ended_by_eos, strict=True):
            self.scores[b] = float(info["score"][row]) if "score" in info else self.tables["rewards"][b].sum()
            self.ended_by_eos[b] = eos
            for key, texts in self.texts.items():
                texts[b] = str(info[key][row]) if key in info else ""
            for family, columns in (("score/", self.terms), ("metric/", self.metrics)):
                for key in (key for key in info if key.startswith(family)):
                    column = columns.setdefault(key.removeprefix(family), torch.full_like(self.scores, torch.nan))
                    column[b] = float(info[key][row])

    def rollout(self, pad_token_id: int) -> Rollout:
        """All episodes together."""
        mask = (
            torch.arange(self.uniforms.shape[1], device=self.uniforms.device)
            < torch.from_numpy(self.lengths).to(self.uniforms.device)[:, None]
        )
        ids, _, prompt_lengths = join_responses(
            self.prompts, self.tables["response_ids"], mask, pad_token_id=pad_token_id
        )
        if not self.has_reference:
            del self.tables["ref_logprobs"]
        batch = Batch(
            ids=ids,
            prompt_lengths=prompt_lengths,
            response_mask=mask,
            scores=self.scores,
            ended_by_eos=self.ended_by_eos,
            **self.tables,
        )
        return Rollout(batch, self.texts["prompt"], self.texts["response"], self.terms, self.metrics)


def _allowed(info: dict[str, Any], before: Tensor | None, device: torch.device) -> Tensor | None:
    """Tokens that may be chosen next, (N, V) bool, or None; rows of which ``info`` says nothing are as ``before``."""
    if "action_mask" not in info:
        return before
    told = torch.as_tensor(info["action_mask"]).to(device).bool()
    told |= ~told.any(1, keepdim=True)  # a row that has ended: its token is ignored
    known = torch.as_tensor(info.get("_action_mask", np.ones(len(told), dtype=bool))).to(device)
    return torch.where(known[:, None], told, torch.ones_like(told) if before is None else before)


def _numpy(x: Any) -> np.ndarray:
    return x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
