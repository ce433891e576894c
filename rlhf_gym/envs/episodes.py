"""The second way through the process: whole responses at once.

A response is a fixed sequence, so its rewards need no stepping: one reference forward and one reward call for the
batch. The result equals that of ``step`` token by token (a property test holds the two equal); a batched agent is free
to use either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_gym.envs.core import TextGenerationProcess, are_logprobs
from rlhf_gym.envs.prompts import Prompt
from rlhf_gym.kl import estimate_kl, exact_kl
from rlhf_gym.lm import join_responses, response_logits, response_logprobs

# The exact KL needs logits over the vocabulary: so many entries at a time.
LOGITS_PER_CHUNK = 2**24


@dataclass
class ResponseRewards:
    """Rewards of B finished responses; arrays are numpy or torch like the ``response_ids`` they answer.

    Attributes:
        rewards: What ``step`` would have returned for each token, 0 after the end. Shape (B, R), float32.
        scores: Score of each response, the terms' sum. Shape (B,), float32.
        ref_logprobs: log pi_ref of each token in nats, 0 after the end and without a reference. Shape (B, R), float32.
        kl: KL estimate of each token, 0 after the end, None when no log-probs were given. Shape (B, R), float32.
        terms: The reward's ledger, each term of shape (B,), float32; they sum to ``scores`` (NaN: did not apply).
        completions: The response texts.
        metrics: What the environment's metrics said, each of shape (B,), float32; no part of the rewards.
    """

    rewards: Any
    scores: Any
    ref_logprobs: Any
    kl: Any | None
    terms: dict[str, Any]
    completions: list[str]
    metrics: dict[str, Any]


@torch.no_grad()
def evaluate_responses(
    process: TextGenerationProcess,
    prompt_ids: Sequence[Any],
    response_ids: Any,
    response_mask: Any,
    logprobs: Any | None = None,
    prompt_index: Any | None = None,
) -> ResponseRewards:
    """Rewards of finished responses; changes nothing in the process.

    Args:
        process: The process whose reference, reward and KL settings apply.
        prompt_ids: B sequences of token ids.
        response_ids: Shape (B, R), integers, R <= max_response_tokens; anything may stand after the end.
        response_mask: True for the tokens of the response, a prefix of each row. Shape (B, R), bool. Each response is a
            finished episode: it ends with an EOS token, or has max_response_tokens tokens.
        logprobs: log pi of each token, (B, R) in nats, or (B, R, V) for the exact KL of each state. Needed when
            ``kl_coef > 0``.
        prompt_index: ``info["prompt_index"]`` of each row, (B,), -1 for none: gives prompts their text and columns
            back. Without it the text is decoded from the ids, and a reward that needs columns is refused.

    Raises:
        ValueError: Naming the argument, the rule and the first bad row.
    """
    as_numpy = not isinstance(response_ids, Tensor)
    device = process.device
    ids, mask = _integers(response_ids, "response_ids").to(device), torch.as_tensor(response_mask, device=device)
    lengths = _checked_lengths(process, prompt_ids, ids, mask)
    prompts = _prompts(process, prompt_ids, prompt_index)
    logprobs = None if logprobs is None else torch.as_tensor(logprobs, device=device).detach().float()
    if logprobs is None and process.needs_announcement:
        raise ValueError(
            f"logprobs are needed because kl_coef={process.kl_coef:g}: pass the policy's log-probs of the response "
            "tokens, shape (B, R)"
        )
    if logprobs is not None and tuple(logprobs.shape) not in {tuple(ids.shape), (*ids.shape, process.vocab_size)}:
        raise ValueError(
            f"logprobs must have shape {tuple(ids.shape)} or {(*ids.shape, process.vocab_size)}, got "
            f"{tuple(logprobs.shape)}"
        )
    if logprobs is not None:
        ok, rule = are_logprobs(logprobs, exact=logprobs.dim() == 3)
        _refuse((mask & ~ok).any(1), rule)

    ref_logprobs, kl = torch.zeros(ids.shape, device=device), None
    if process.language_model is not None:
        ref_logprobs, kl = _reference_pass(process, prompts, ids, mask, logprobs)
    rewards = torch.zeros(ids.shape, device=device)
    if process.kl_term == "reference":
        rewards += process.kl_coef * ref_logprobs
    elif kl is not None:
        rewards -= process.kl_coef * kl

    responses = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    ended_by_eos = torch.isin(ids.gather(1, lengths[:, None] - 1)[:, 0], process._eos)
    scored = process.scorer.score(prompts, responses, ended_by_eos.cpu().numpy())
    scores = torch.from_numpy(scored.totals).to(rewards)
    last = scores.clone()
    if process.reward.dense:
        for row, tokens in enumerate(process.scorer.token_rewards(prompts, responses)):
            # The last token is paid with the rest of the score, as in step().
            early = torch.as_tensor(np.asarray(tokens)[:-1]).to(rewards)
            rewards[row, : len(early)] += early
            last[row] -= early.sum()
    rewards.scatter_add_(1, lengths[:, None] - 1, last[:, None])

    edge = (lambda x: x.cpu().numpy()) if as_numpy else (lambda x: x)
    terms, metrics = (
        {name: edge(torch.from_numpy(np.asarray(values)).to(rewards)) for name, values in each.items()}
        for each in (scored.terms, scored.metrics)
    )
    return ResponseRewards(
        rewards=edge(rewards),
        scores=edge(scores),
        ref_logprobs=edge(ref_logprobs),
        kl=None if kl is None else edge(kl),
        terms=terms,
        completions=scored.completions,
        metrics=metrics,
    )


def _checked_lengths(process: TextGenerationProcess, prompt_ids: Sequence[Any], ids: Tensor, mask: Tensor) -> Tensor:
    """Length of each response, (B,) int64, once everything about the arrays has been checked."""
    if ids.dim() != 2 or mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"response_ids and response_mask must have one shape (B, R) and the mask be bool, got "
            f"{tuple(ids.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    if len(prompt_ids) != len(ids):
        raise ValueError(f"prompt_ids must hold one sequence per response: {len(ids)}, got {len(prompt_ids)}")
    if ids.shape[1] > process.max_response_tokens:
        raise ValueError(
            f"responses must have at most max_response_tokens={process.max_response_tokens} columns, got {ids.shape[1]}"
        )
    lengths = mask.sum(1)
    prefix = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    _refuse(lengths == 0, "a response must have at least one token")
    _refuse((mask != prefix).any(1), "response_mask must be True for a prefix of the row and False after it")
    _refuse(
        (mask & ((ids < 0) | (ids >= process.vocab_size))).any(1),
        f"response tokens must be in [0, {process.vocab_size})",
    )
    if (allowed := process.token_filter.allowed_tokens) is not None:
        forbidden = ~torch.isin(ids, torch.tensor(list(allowed), device=ids.device))
        _refuse((mask & forbidden).any(1), "a token is forbidden (allowed_tokens)")
    is_eos = torch.isin(ids, process._eos) & mask
    last = torch.arange(ids.shape[1], device=ids.device) == lengths[:, None] - 1
    _refuse((is_eos & ~last).any(1), "an EOS token ends the response; nothing may follow it")
    _refuse(
        ~(is_eos & last).any(1) & (lengths < process.max_response_tokens),
        f"a response must be finished: end with EOS or have max_response_tokens={process.max_response_tokens} tokens",
    )
    return lengths


def _integers(x: Any, name: str) -> Tensor:
    tensor = torch.as_tensor(x)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.long()


def _refuse(bad: Tensor, rule: str) -> None:
    if bool(bad.any()):
        raise ValueError(f"responses, row {int(bad.nonzero()[0])}: {rule}")


def _prompts(process: TextGenerationProcess, prompt_ids: Sequence[Any], prompt_index: Any | None) -> list[Prompt]:
    indices = [-1] * len(prompt_ids) if prompt_index is None else [int(i) for i in prompt_index]
    if len(indices) != len(prompt_ids):
        raise ValueError(f"prompt_index must have one entry per response: {len(prompt_ids)}, got {len(indices)}")
    prompts = []
    for row, (given, index) in enumerate(zip(prompt_ids, indices, strict=True)):
        if 0 <= index < len(process.prompts) and given is process.prompts[index].ids:
            prompts.append(process.prompts[index])  # our own prompt itself: nothing to check
            continue
        ids = _integers(given, f"prompt_ids, row {row},").cpu()
        if not 1 <= len(ids) <= process.max_prompt_tokens:
            raise ValueError(
                f"prompt_ids, row {row}: a prompt has 1 to max_prompt_tokens={process.max_prompt_tokens} tokens, "
                f"got {len(ids)}"
            )
        if not bool(((ids >= 0) & (ids < process.vocab_size)).all()):
            raise ValueError(f"prompt_ids, row {row}: tokens must be in [0, {process.vocab_size}), got {ids.tolist()}")
        if index >= len(process.prompts) or index < -1:
            raise ValueError(
                f"prompt_index, row {row}: must be -1 or below the number of prompts {len(process.prompts)}, got "
                f"{index}"
            )
        if index >= 0 and not torch.equal(ids, process.prompts[index].ids):
            raise ValueError(
                f"prompt_ids, row {row}: these are not the tokens of prompt {index}; pass prompt_index -1 for a "
                "prompt of your own"
            )
        prompts.append(process.prompts[index] if index >= 0 else Prompt(process.scorer.decode(ids.tolist()), ids))
    process.scorer.check_columns(prompts, "prompts (pass prompt_index=info['prompt_index']); rows")
    return prompts


def _reference_pass(
    process: TextGenerationProcess, prompts: list[Prompt], ids: Tensor, mask: Tensor, logprobs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """log pi_ref of the tokens and the KL estimates, both (B, R) float32, 0 after the end."""
    model, token_filter = process.language_model.model, process.token_filter
    prompt_ids = [p.ids for p in prompts]
    ref_logprobs = response_logprobs(model, prompt_ids, ids, mask, token_filter=token_filter)
    _refuse((ref_logprobs == -torch.inf).any(1), "a token is forbidden there (top_k, top_p, or impossible)")
    if logprobs is None:
        return ref_logprobs, None
    kl = torch.zeros(ids.shape, device=ids.device)
    if logprobs.dim() == 2:
        kl = estimate_kl(torch.where(mask, logprobs, 0.0), ref_logprobs, process.kl_estimator)
    else:
        context, lengths, prompt_lengths = join_responses(prompt_ids, ids, mask)
        for rows in torch.arange(len(ids), device=ids.device).split(
            max(1, LOGITS_PER_CHUNK // (ids.shape[1] * process.vocab_size))
        ):
            logits, _ = response_logits(model, context[rows], lengths[rows], prompt_lengths[rows] - 1, ids.shape[1])
            allowed = token_filter.mask(logits, keep=torch.where(mask[rows], ids[rows], 0))
            kl[rows] = exact_kl(logprobs[rows], token_filter.logprobs(logits, allowed))
    _refuse(
        (mask & ~torch.isfinite(kl)).any(1),
        "logprobs give probability to forbidden tokens",
    )
    return ref_logprobs, torch.where(mask, kl, 0.0)
