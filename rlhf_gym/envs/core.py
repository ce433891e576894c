"""The process itself: text generation as a batched Markov decision process, one implementation for every way in.

State: the tokens of each row (prompt and response so far). Action: the next token. Transition: append it. End: an EOS
token or ``max_response_tokens``. Reward: the score of the finished response minus ``kl_coef`` times the KL term of each
token. The scalar and the vector environment, stepping and whole episodes (``episodes.py``) all stand on
:class:`TextGenerationProcess`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from torch import Tensor

from rlhf_gym.envs.prompts import Prompt, PromptEncoder, PromptOrder, read_prompts
from rlhf_gym.envs.scoring import ScoredResponses, Scorer
from rlhf_gym.kl import KLEstimator, estimate_kl, exact_kl
from rlhf_gym.lm import Engine, LanguageModel, TokenFilter, load_language_model, make_engine, pad_sequences
from rlhf_gym.lm.load import torch_device
from rlhf_gym.rewards import as_reward

STOP_REASONS = ("", "eos", "length")  # index = the int8 code of torch mode
KL_ESTIMATORS = ("k1", "k3")
KL_TERMS = ("both", "reference")


@dataclass
class Transition:
    """What one step did. N rows; rows that were not active hold zeros.

    Attributes:
        rewards: (N,) float32.
        terminated: (N,) bool.
        ref_logprobs: log pi_ref of the actions, in nats, None without a reference. (N,) float32.
        stop_reasons: Index into ``STOP_REASONS``. (N,) int8.
        ended_rows: Indices of the rows that ended, in order; the fields below describe these k rows.
        scored: Their scores, terms and texts; None when no row ended.
        kl: Sum over the response of the KL estimate, NaN unless every step was announced. (k,) float32.
    """

    rewards: Tensor
    terminated: Tensor
    ref_logprobs: Tensor | None
    stop_reasons: Tensor
    ended_rows: list[int] = field(default_factory=list)
    scored: ScoredResponses | None = None
    kl: Tensor | None = None


class TextGenerationProcess:
    """N rows of text generation under one reference model, prompt set and reward.

    Args:
        num_rows: N >= 1.
        model: The reference: packaged name, directory, hub id, ``.gguf`` file, ``PreTrainedModel`` or
            ``LanguageModel``. None gives a process without a reference; it then needs a ``tokenizer`` and
            ``kl_coef=0``.
        tokenizer: The model's tokenizer where ``model`` does not bring one.
        prompts: See :func:`rlhf_gym.envs.prompts.read_prompts`.
        reward: See :func:`rlhf_gym.rewards.as_reward`.
        kl_coef: Weight of the KL penalty per nat, >= 0. Above 0 the agent announces its log-probs before each step.
        kl_term: "both" subtracts ``kl_coef * KL(pi || pi_ref)``. "reference" adds ``kl_coef * log pi_ref`` and leaves
            the entropy to the agent: the same objective only for agents that add ``kl_coef * entropy`` themselves (soft
            Q-learning). For anyone else it is a different one: with a constant score and pi_ref = (.6, .4) the first is
            best at pi_ref itself (penalty 0), the second at always choosing the first token.
        kl_estimator: "k1" (log pi - log pi_ref) or "k3" (ratio - 1 - log ratio, never negative). An announcement of all
            V log-probs uses the exact sum. Only with k1 has this reward the gradient of the objective; k3 and the exact
            sum estimate the size of the KL, for the log, and as a reward alone they optimise something else
            (``python -m rlhf_gym.benchmarks.estimators``).
        temperature: Divides the logits of both distributions, > 0.
        top_k, top_p: Restrict actions to the likeliest tokens *of the reference*; both distributions are renormalised
            on them.
        allowed_tokens: Token ids that may be chosen at all.
        max_prompt_tokens: Longest prompt in tokens; None takes that of the longest prompt given.
        max_response_tokens: Length limit of the response in tokens, EOS included.
        truncate_prompts: None (a longer prompt is an error) or "left".
        missing_eos_penalty: Subtracted once from the score of a response that did not end by EOS, >= 0.
        metrics: Other rewards by name, ``{"gold": reward}``: reported at the end of each episode, never paid.
        device, dtype: Of the reference, see :func:`rlhf_gym.lm.load_language_model`.

    Raises:
        ValueError, TypeError, FileNotFoundError: Naming the argument, the rule and the value; everything that can be
            known is checked here.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        model: Any = None,
        tokenizer: Any = None,
        prompts: Any = None,
        reward: Any = None,
        kl_coef: float = 0.0,
        kl_term: str = "both",
        kl_estimator: KLEstimator = "k1",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        allowed_tokens: Sequence[int] | None = None,
        max_prompt_tokens: int | None = None,
        max_response_tokens: int = 32,
        truncate_prompts: str | None = None,
        missing_eos_penalty: float = 0.0,
        metrics: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ):
        _check_count("num_envs", num_rows)
        _check_count("max_response_tokens", max_response_tokens)
        if max_prompt_tokens is not None:
            _check_count("max_prompt_tokens", max_prompt_tokens)
        _check_choice("kl_term", kl_term, KL_TERMS)
        _check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        if reward is None:
            raise ValueError(
                "reward is missing; pass a function such as `lambda text: float('good' in text)`, a name or a "
                "reward model"
            )
        self.num_rows, self.max_response_tokens = int(num_rows), int(max_response_tokens)
        self.kl_term = kl_term
        self.kl_estimator: KLEstimator = kl_estimator
        self.token_filter = TokenFilter(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            allowed_tokens=None if allowed_tokens is None else tuple(allowed_tokens),
        )
        self._load_models(model, tokenizer, device, dtype)
        self.kl_coef = kl_coef
        # A token that the reference cannot produce has an infinite KL: it is no action.
        self._reference_forbids = self.language_model is not None and getattr(
            self.language_model.model, "forbids_tokens", False
        )
        self._check_filter()
        self.reward = as_reward(reward, language_model=self.language_model)
        self.metrics = {
            name: as_reward(spec, language_model=self.language_model) for name, spec in (metrics or {}).items()
        }
        for each in (self.reward, *self.metrics.values()):
            if each.needs_language_model:
                raise ValueError(
                    f"reward {each!r} reads the reference, and there is none; pass model=, or another reward"
                )
        self.scorer = Scorer(self.reward, self.tokenizer, missing_eos_penalty, self.metrics)

        self.encoder = PromptEncoder(
            self.tokenizer, self.vocab_size, self.eos_token_ids, self.bos_token_id, truncate_prompts
        )
        rows = read_prompts(prompts)
        self.prompts = [self.encoder.encode(row, max_prompt_tokens, f"prompts[{i}]", i) for i, row in enumerate(rows)]
        self.scorer.check_columns(self.prompts, "prompts")
        self.max_prompt_tokens = int(max_prompt_tokens or max(len(p.ids) for p in self.prompts))
        self.max_tokens = self.max_prompt_tokens + self.max_response_tokens
        context = self.language_model.max_context if self.language_model else None
        if context is not None and self.max_tokens > context:
            raise ValueError(
                f"max_prompt_tokens + max_response_tokens must fit the model's context of {context} tokens, got "
                f"{self.max_prompt_tokens} + {self.max_response_tokens} = {self.max_tokens}"
            )

        n, device = self.num_rows, self.device
        self._eos = torch.tensor(self.eos_token_ids, dtype=torch.long, device=device)
        self._columns = torch.arange(self.max_tokens, device=device)
        self.ids = torch.full((n, self.max_tokens), self.pad_token_id, dtype=torch.long, device=device)
        self.lengths = torch.zeros(n, dtype=torch.long, device=device)  # prompt and response so far
        self.prompt_lengths = torch.zeros(n, dtype=torch.long, device=device)
        self.ended = torch.ones(n, dtype=torch.bool, device=device)  # a row that has not been reset cannot be stepped
        self.kl_sums = torch.zeros(n, device=device)  # NaN from the first step that was not announced
        self.reward_sums = torch.zeros(n, device=device)  # dense rewards paid so far, before any KL
        self.step_rewards = torch.zeros(n, self.max_response_tokens, device=device)  # for render
        self.row_prompts: list[Prompt | None] = [None] * n
        self.row_results: list[dict[str, float]] = [
            {} for _ in range(n)
        ]  # the ledger of the episode that ended, for render
        self._orders: list[PromptOrder | None] = [None] * n
        self._announced: Tensor | None = None
        self._engine: Engine | None = (
            None  # built when first needed: agents that go by whole responses never pay for it
        )

    def _load_models(self, model: Any, tokenizer: Any, device: Any, dtype: Any) -> None:
        self.language_model: LanguageModel | None = None
        if model is not None:
            lm = self.language_model = load_language_model(model, tokenizer, device=device, dtype=dtype)
            self.tokenizer, self.vocab_size, self.device = lm.tokenizer, lm.vocab_size, lm.device
            self.eos_token_ids, self.pad_token_id, self.bos_token_id = (
                lm.eos_token_ids,
                lm.pad_token_id,
                lm.bos_token_id,
            )
            return
        if tokenizer is None:
            raise ValueError(
                'model is missing; pass a name such as "tiny-reviews", a directory or a model (or a tokenizer '
                "alone, for no reference)"
            )
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)
        self.device = torch_device("cpu" if device == "auto" else device)
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an EOS token: without one no response ends before the length limit")
        self.eos_token_ids, self.bos_token_id = (tokenizer.eos_token_id,), tokenizer.bos_token_id
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _check_filter(self) -> None:
        if self.token_filter.uses_reference and self.language_model is None:
            raise ValueError("top_k and top_p are taken on the reference; pass model=, or drop them")
        allowed = self.token_filter.allowed_tokens
        if allowed is not None and not all(0 <= a < self.vocab_size for a in allowed):
            raise ValueError(
                f"allowed_tokens must be token ids in [0, {self.vocab_size}), got {sorted(allowed)[:3]} ... "
                f"{sorted(allowed)[-1]}"
            )

    # ---- the KL penalty

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty per nat. The agent that owns the rollout may set it, between rollouts only."""
        return self._kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"kl_coef must be a finite number >= 0, got {value}")
        if value > 0 and self.language_model is None:
            raise ValueError(f"kl_coef={value} needs a reference: pass model=, or set kl_coef=0")
        self._kl_coef = float(value)

    @property
    def needs_announcement(self) -> bool:
        """Whether a step must be preceded by ``announce_logprobs``."""
        return self.kl_coef > 0 and self.kl_term == "both"

    def announce_logprobs(self, logprobs: Any) -> None:
        """Tell the process log pi of the next actions. Shape (N,) in nats, or (N, V) for the exact KL of each state
        (see ``kl_estimator`` for what that is good for).

        Raises:
            ValueError: If the shape is neither.
        """
        announced = torch.as_tensor(logprobs, device=self.device).detach().to(torch.float32, copy=True)
        if tuple(announced.shape) not in {(self.num_rows,), (self.num_rows, self.vocab_size)}:
            raise ValueError(
                f"logprobs must have shape ({self.num_rows},), or ({self.num_rows}, {self.vocab_size}) for the "
                f"exact KL, got {tuple(announced.shape)}"
            )
        if self.language_model is None:
            raise ValueError(
                "announce_logprobs needs a reference to compare with; this environment was made without model="
            )
        self._announced = announced

    def _kl_of_step(self, ref_all: Tensor, ref_logprobs: Tensor, active: Tensor) -> Tensor | None:
        """KL estimate of this step, (N,), NaN-free in active rows; None when nothing was announced."""
        if self._announced is None:
            if self.needs_announcement and bool(active.any()):
                raise ValueError(
                    f"step needs the policy's log-probs because kl_coef={self.kl_coef:g}: call "
                    "`env.unwrapped.announce_logprobs(logprobs)` before each step "
                    "(Stable-Baselines3: callback=AnnounceLogprobs()), or make the environment with kl_coef=0"
                )
            return None
        announced = self._announced
        exact = announced.dim() == 2
        ok, rule = are_logprobs(announced, exact)
        if bool((active & ~ok).any()):
            row = int((active & ~ok).nonzero()[0])
            raise ValueError(
                f"announced logprobs, row {row}: {rule}, got "
                f"{announced[row].tolist() if not exact else announced[row].exp().sum().item()}"
            )
        kl = exact_kl(announced, ref_all) if exact else estimate_kl(announced, ref_logprobs, self.kl_estimator)
        if bool((active & ~torch.isfinite(kl)).any()):
            raise ValueError(
                "announced logprobs give probability to tokens that the environment forbids; apply `action_masks()` "
                "to the policy and renormalise"
            )
        return torch.where(active, kl, 0.0)

    # ---- prompts and seeds

    def seed_row(self, row: int, np_random: np.random.Generator) -> None:
        """Give a row its generator; its order of prompts starts anew."""
        self._orders[row] = PromptOrder(len(self.prompts), np_random)

    def next_prompt(self, row: int) -> Prompt:
        """The next prompt of a row in its own order."""
        if self._orders[row] is None:
            self.seed_row(row, seeding.np_random(None)[0])
        return self.prompts[self._orders[row].next()]

    def prompt_order_state(self) -> list[dict[str, Any] | None]:
        """JSON-able position of every row in its order of prompts (for checkpoints)."""
        return [order.state_dict() if order else None for order in self._orders]

    def load_prompt_order_state(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Continue the orders of prompts where ``prompt_order_state`` was taken.

        Raises:
            ValueError: If the number of rows differs.
        """
        if len(states) != self.num_rows:
            raise ValueError(
                f"the saved state has {len(states)} rows, this environment {self.num_rows}; make it with "
                f"num_envs={len(states)}"
            )
        for row, state in enumerate(states):
            if state is None:
                self._orders[row] = None
            else:
                self.seed_row(row, np.random.Generator(np.random.PCG64()))
                self._orders[row].load_state_dict(state)

    # ---- the process

    def begin(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """Start episodes in some rows, each with its prompt; what was announced for them is forgotten.

        Costs no forward: the ids are the state, the cache is a memo that is filled when next needed.
        """
        index = torch.tensor(rows, device=self.device)
        ids, lengths = pad_sequences([p.ids for p in prompts], pad_token_id=self.pad_token_id)
        ids = torch.nn.functional.pad(ids, (0, self.max_tokens - ids.shape[1]), value=self.pad_token_id)
        self.ids[index] = ids.to(self.device)
        self.lengths[index] = self.prompt_lengths[index] = lengths.to(self.device)
        self.ended[index] = False
        self.kl_sums[index] = self.reward_sums[index] = 0.0
        self.step_rewards[index] = 0.0
        for row, prompt in zip(rows, prompts, strict=True):
            self.row_prompts[row], self.row_results[row] = prompt, {}
        if self._announced is not None:
            if len(rows) == self.num_rows:
                self._announced = None
            else:
                self._announced[index] = torch.nan
        if self._engine is not None:
            # The memo would find a prompt that it has seen before; the last bits of its answer would then depend on
            # what the row did before.
            self._engine.forget(index)

    def response_ids(self, row: int) -> list[int]:
        """Tokens of the response so far."""
        return self.ids[row, self.prompt_lengths[row] : self.lengths[row]].tolist()

    def observation(self) -> dict[str, Tensor]:
        """Fresh tensors ``input_ids`` (N, L) int64, right-padded, and ``attention_mask`` (N, L) int8."""
        return {"input_ids": self.ids.clone(), "attention_mask": (self._columns < self.lengths[:, None]).to(torch.int8)}

    def _reference_logits(self, needed: Tensor) -> Tensor | None:
        """Logits of the next token under the reference, (N, V) float32; rows not needed hold anything."""
        if self.language_model is None:
            return None
        if self._engine is None:
            self._engine = make_engine(self.language_model.model, self.num_rows, self.max_tokens)
        return self._engine.next_logits(self.ids, self.lengths, needed)

    def _mask(self, logits: Tensor | None) -> Tensor | None:
        if not self.forbids_tokens:
            return None
        shaped = logits if logits is not None else torch.zeros(self.num_rows, self.vocab_size, device=self.device)
        mask = self.token_filter.mask(shaped)
        possible = shaped > -torch.inf
        return possible if mask is None else possible & mask

    @torch.no_grad()
    def action_masks(self) -> Tensor:
        """True where a token may be chosen next. Shape (N, V), bool; all True when nothing is forbidden, and in rows
        that have ended."""
        uses_reference = self.token_filter.uses_reference or self._reference_forbids
        mask = self._mask(self._reference_logits(~self.ended) if uses_reference else None)
        if mask is None:
            return torch.ones(self.num_rows, self.vocab_size, dtype=torch.bool, device=self.device)
        return mask | self.ended[:, None]

    @torch.no_grad()
    def next_ref_logprobs(self) -> Tensor:
        """log pi_ref of every token that may come next, in nats: -inf where forbidden, anything in rows that have
        ended. Shape (N, V), float32."""
        logits = self._reference_logits(~self.ended)
        return self.token_filter.logprobs(logits, self._mask(logits))

    @torch.no_grad()
    def last_ref_hidden(self) -> Tensor:
        """The input of the reference's LM head at each row's last token, ended rows included; zeros in rows that were
        never reset. Shape (N, d), float32."""
        begun = self.lengths > 0
        self._reference_logits(begun)
        return torch.where(begun[:, None], self._engine.last_hidden.float(), 0.0)

    @property
    def forbids_tokens(self) -> bool:
        """Whether any action mask can be other than all True."""
        token_filter = self.token_filter
        return token_filter.allowed_tokens is not None or token_filter.uses_reference or self._reference_forbids

    @torch.no_grad()
    def step(self, actions: Any, active: Tensor | None = None) -> Transition:
        """Append one token to every active row.

        Args:
            actions: Token ids. Shape (N,), any integer dtype. Ignored in rows that are not active.
            active: Rows that act; default all. Shape (N,), bool.

        Raises:
            ValueError: For an action out of range or forbidden, an ended row, a missing or wrong announcement, or a
                failing reward. Nothing has changed then, and the announcement is kept.
        """
        active = torch.ones(self.num_rows, dtype=torch.bool, device=self.device) if active is None else active
        actions = self._checked_actions(actions, active)
        if bool((active & self.ended).any()):
            rows = (active & self.ended).nonzero().flatten().tolist()
            raise ValueError(
                f"row {rows[0]} has ended or was never reset; call reset (for some rows: "
                f"options={{'reset_mask': mask}}) before step"
            )

        ref_logprobs = step_kl = None
        logits = self._reference_logits(active)
        mask = self._mask(logits)
        if mask is not None:
            self._refuse_forbidden(actions, active, mask)
        rewards = torch.zeros(self.num_rows, device=self.device)
        if logits is not None:
            ref_all = self.token_filter.logprobs(logits, mask)
            ref_logprobs = torch.where(active, ref_all.gather(-1, actions[:, None])[:, 0], 0.0)
            step_kl = self._kl_of_step(ref_all, ref_logprobs, active)
            if self.kl_term == "reference":
                rewards += self.kl_coef * ref_logprobs
            elif step_kl is not None:
                rewards -= self.kl_coef * step_kl

        by_eos = active & torch.isin(actions, self._eos)
        by_length = active & ~by_eos & (self.lengths + 1 - self.prompt_lengths >= self.max_response_tokens)
        ended_rows = (by_eos | by_length).nonzero().flatten().tolist()
        scores, scored = self._score_step(actions, active, by_eos, ended_rows)
        rewards += scores

        # Everything that can fail is behind us: from here on the state changes.
        self._announced = None
        position = torch.where(active, self.lengths, 0)
        rows = torch.arange(self.num_rows, device=self.device)
        self.ids[rows, position] = torch.where(active, actions, self.ids[rows, position])
        self.step_rewards[rows, (self.lengths - self.prompt_lengths).clamp(0, self.max_response_tokens - 1)] += (
            torch.where(active, rewards, 0.0)
        )
        self.lengths += active
        self.ended |= by_eos | by_length
        self.reward_sums += scores
        self.kl_sums += torch.where(active, torch.nan if step_kl is None else step_kl, 0.0)
        stop_reasons = by_eos.to(torch.int8) + 2 * by_length.to(torch.int8)
        transition = Transition(rewards, by_eos | by_length, ref_logprobs, stop_reasons, ended_rows, scored)
        if ended_rows:
            transition.kl = self.kl_sums[ended_rows].clone()
            for i, row in enumerate(ended_rows):
                terms = {f"score/{name}": float(term[i]) for name, term in scored.terms.items()}
                self.row_results[row] = {"score": float(scored.totals[i])} | terms
        return transition

    def _checked_actions(self, actions: Any, active: Tensor) -> Tensor:
        actions = torch.as_tensor(actions, device=self.device)
        if (
            tuple(actions.shape) != (self.num_rows,)
            or actions.is_floating_point()
            or actions.is_complex()
            or actions.dtype == torch.bool
        ):
            raise ValueError(
                f"actions must be integers of shape ({self.num_rows},), got {actions.dtype} of shape "
                f"{tuple(actions.shape)}"
            )
        actions = actions.long()
        bad = active & ((actions < 0) | (actions >= self.vocab_size))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"action must be a token id in [0, {self.vocab_size}), got {int(actions[row])} in row {row}"
            )
        return torch.where(active, actions, 0)

    def _refuse_forbidden(self, actions: Tensor, active: Tensor, mask: Tensor) -> None:
        bad = active & ~mask.gather(-1, actions[:, None])[:, 0]
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"action {int(actions[row])} in row {row} is forbidden here (allowed_tokens, top_k, top_p, or "
                "impossible under the reference); choose where action_masks() is True"
            )

    def _score_step(
        self, actions: Tensor, active: Tensor, by_eos: Tensor, ended_rows: list[int]
    ) -> tuple[Tensor, ScoredResponses | None]:
        """What the reward pays for this step, (N,), before any KL: the score on the last token, dense terms as they
        fall due."""
        paid, scored = torch.zeros(self.num_rows, device=self.device), None
        if self.reward.dense:
            ending = set(ended_rows)
            going = [row for row in active.nonzero().flatten().tolist() if row not in ending]
            if going:
                responses = self._responses_with(actions, going)
                dense = self.scorer.token_rewards([self.row_prompts[row] for row in going], responses)
                paid[going] = torch.tensor([float(tokens[-1]) for tokens in dense], device=self.device)
        if ended_rows:
            responses = self._responses_with(actions, ended_rows)
            scored = self.scorer.score(
                [self.row_prompts[row] for row in ended_rows], responses, by_eos[ended_rows].cpu().numpy()
            )
            # The last step pays what is left, so that rewards sum to the score whatever was paid before.
            paid[ended_rows] = torch.from_numpy(scored.totals).to(paid) - self.reward_sums[ended_rows]
        return paid, scored

    def _responses_with(self, actions: Tensor, rows: list[int]) -> list[list[int]]:
        """Responses of some rows as they will be after these actions."""
        # One copy to the host each, not one per row.
        tensors = (self.ids, self.prompt_lengths, self.lengths, actions)
        each = zip(*(tensor[rows].tolist() for tensor in tensors), strict=True)
        return [[*ids[start:end], action] for ids, start, end, action in each]

    # ---- copies

    _TENSORS = ("ids", "lengths", "prompt_lengths", "ended", "kl_sums", "reward_sums", "step_rewards")

    def clone_state(self) -> dict[str, Any]:
        """Everything that the future depends on, the KV cache included. Shares no memory with the process."""
        state: dict[str, Any] = {name: getattr(self, name).clone() for name in self._TENSORS}
        state["announced"] = None if self._announced is None else self._announced.clone()
        state["engine"] = self._engine.snapshot() if self._engine is not None else None
        state["row_prompts"], state["row_results"] = list(self.row_prompts), copy.deepcopy(self.row_results)
        state["orders"], state["memory"] = copy.deepcopy(self._orders), self.scorer.memory()
        return state

    def restore_state(self, state: dict[str, Any]) -> None:
        """Go back to a state taken by ``clone_state`` of this process; the state stays usable.

        Raises:
            ValueError: If it is that of a process of other sizes. Nothing has changed then.
        """
        for name in self._TENSORS:  # first, for copy_ would broadcast one row to all
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"the state is another environment's: its {name} has shape {tuple(state[name].shape)}, here it is "
                    f"{tuple(getattr(self, name).shape)}; restore it where it was cloned"
                )
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])
        self._announced = None if state["announced"] is None else state["announced"].clone()
        if self._engine is not None:
            # A state taken before the first forward has no cache; forgetting ours is enough, it is only a memo.
            self._engine.invalidate() if state["engine"] is None else self._engine.restore(state["engine"])
        self.row_prompts, self.row_results = list(state["row_prompts"]), copy.deepcopy(state["row_results"])
        self._orders = copy.deepcopy(state["orders"])
        self.scorer.restore_memory(state["memory"])


def are_logprobs(x: Tensor, exact: bool) -> tuple[Tensor, str]:
    """Which entries are log-probs, and the rule that the others break.

    Args:
        x: Log-probs of tokens in nats, (...), or with ``exact`` of the whole vocabulary, (..., V).

    Returns:
        Bool (...), and the rule in words.
    """
    if exact:
        ok = (x.exp().sum(-1) - 1).abs() < 1e-2
        return ok, "log-probs over the vocabulary must be normalised (their exp sums to 1)"
    return torch.isfinite(x) & (x <= 1e-3), "log-probs must be finite and <= 0"


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
