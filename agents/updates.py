"""From a rollout to optimiser steps: what the batched agents' updates have in common.

An algorithm brings its loss of some rows; this is the way round it: old log-probs, the learning rate's schedule, epochs,
minibatches, micro-batches, gradient steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import parallel
from .functional import LossMode, loss_normaliser, masked_mean

if TYPE_CHECKING:
    from .base import Agent
    from .batch import Batch

# Maps some rows and the minibatch's normaliser to the parts of the loss, among them "loss" (each adds up over
# micro-batches), and to numbers for the log (means over the rows' tokens).
Loss = Callable[["Batch", Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]


def optimise(
    agent: Agent, batch: Batch, loss: Loss, *, mode: LossMode = "token_mean", target_kl: float | None = None
) -> dict[str, float]:
    """``num_epochs`` passes over a batch in ``num_minibatches`` steps each.

    Where the agent has a ``group_size``, its groups stay together, in one minibatch and in their order.

    Args:
        agent: Whose policy, optimiser, settings and random numbers are used.
        batch: What to learn from.
        loss: The algorithm.
        mode: What losses are divided by, see `loss_normaliser`.
        target_kl: Ends the passes once the metric ``approx_kl`` exceeds 1.5 times this; None never.

    Returns:
        The means of all metrics over the steps, and ``num_steps`` and ``learning_rate``.
    """
    cfg = agent.config
    # The schedule is that of tokens: all steps of a rollout have the same rate.
    remaining = agent.progress_remaining if cfg.lr_schedule == "linear" else 1.0
    for group in agent.optimizer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * remaining

    agent.optimizer.divide()
    stats: dict[str, list[float]] = defaultdict(list)
    num_steps = 0
    for rows in _minibatches(agent, batch):
        found = accumulate_gradients(agent, batch, loss, rows, mode)
        for name, value in found.items():
            stats[name].append(value)
        if target_kl is not None and found["approx_kl"] > 1.5 * target_kl:
            agent.optimizer.zero_grad()
            break
        stats["grad_norm"].append(agent.optimizer.step(cfg.max_grad_norm).item())
        num_steps += 1
    means = {name: sum(values) / len(values) for name, values in stats.items()}
    return {"grad_norm": 0.0} | means | {"num_steps": num_steps, "learning_rate": cfg.learning_rate * remaining}


def accumulate_gradients(
    agent: Agent, batch: Batch, loss: Loss, rows: Tensor, mode: LossMode = "token_mean"
) -> dict[str, float]:
    """Gradients of one minibatch's loss, micro-batch by micro-batch; returns its parts and metrics."""
    # One normaliser for the whole minibatch: a mean of micro-batch means would weigh the tokens of short ones more.
    mask = batch.response_mask[rows]
    normaliser, num_tokens = loss_normaliser(mask, mode), mask.sum().clamp(min=1)
    size = agent.config.micro_batch_size or len(rows)
    group_size = getattr(agent.config, "group_size", 1)
    total: dict[str, float] = defaultdict(float)
    for part_rows, weight in _my_share(rows, group_size, max(group_size, size - size % group_size)):
        part = batch.rows(part_rows)
        parts, stats = loss(part, normaliser)
        (weight * parts["loss"]).backward()
        agent.optimizer.accumulate()
        share = float(weight * part.response_mask.sum() / num_tokens)
        for name, value in stats.items():
            total[name] += float(value) * share
        for name, value in parts.items():
            total[name] += weight * value.item()
    parallel.add_up_gradients(agent.optimizer.masters)
    return parallel.add_up_numbers(dict(total))


def _my_share(rows: Tensor, group_size: int, most: int) -> list[tuple[Tensor, float]]:
    """What this process takes through the model: up to ``most`` rows at a time, and what these count.

    That is as many times in each process, since where the weights are divided all gather them together: who has fewer
    rows takes some that count 0.
    """
    groups = rows.view(-1, group_size)
    mine = groups[parallel.rank() :: parallel.size()].flatten()
    parts = [(part, 1.0) for part in mine.split(most) if len(part)]
    num_parts = -(-parallel.share(len(groups)) * group_size // most)
    return parts + [(groups[0], 0.0)] * (num_parts - len(parts))


def _minibatches(agent: Agent, batch: Batch) -> Iterator[Tensor]:
    """Row numbers of each minibatch, shuffled anew for every pass."""
    cfg = agent.config
    group_size = getattr(cfg, "group_size", 1)
    for _ in range(cfg.num_epochs):
        order = torch.randperm(len(batch) // group_size, generator=agent.generator)
        for groups in order.chunk(cfg.num_minibatches):
            rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
            yield rows.to(batch.response_mask.device)


@torch.no_grad()
def training_logprobs(agent: Agent, batch: Batch) -> tuple[Batch, float]:
    """The old log-probs that a ratio is taken to, and how far sampling's were from them (mean, nats per token).

    In float32 those of the sampling pass are the forward's to 1e-5 and are kept. In bfloat16 the two passes round
    differently, the ratio would not begin at 1, and clipping would act on rounding errors: the training forward's own
    are taken.
    """
    if agent.policy.model.dtype == torch.float32:
        return batch, 0.0
    logprobs, values = torch.zeros_like(batch.logprobs), torch.zeros_like(batch.values)
    size = agent.config.micro_batch_size or max(1, len(batch) // agent.config.num_minibatches)
    pieces = torch.arange(len(batch), device=batch.ids.device).split(size)
    for rows in pieces[parallel.rank() :: parallel.size()]:
        part = batch.rows(rows)
        width = part.response_ids.shape[1]
        logprobs[rows, :width], values[rows, :width], _ = agent.policy(part)
    parallel.add_up([logprobs, values])
    mismatch = masked_mean((logprobs - batch.logprobs).abs(), batch.response_mask).item()
    return replace(batch, logprobs=logprobs, values=values), mismatch


def positive_kl_coef(agent: Agent, batch: Batch | None = None) -> float:
    """The environment's ``kl_coef``, for algorithms that mean nothing without a KL penalty.

    Args:
        agent: Whose environment is asked.
        batch: A rollout, whose log-probs of the reference are needed as well.

    Raises:
        ValueError: If it is 0, or the environment has none or does not tell the reference's log-probs.
    """
    name, kl_coef = type(agent).__name__, getattr(agent.envs.unwrapped, "kl_coef", 0.0)
    if not kl_coef > 0:
        raise ValueError(
            f"{name} needs an environment with kl_coef > 0, got {kl_coef:g}: without a KL penalty its loss has no "
            "meaning; make the environment with a reference (model=) and kl_coef=0.05, say"
        )
    if batch is not None and batch.ref_logprobs is None:
        raise ValueError(f'{name} needs the log-probs of the reference, info["ref_logprob"], which envs does not tell')
    return kl_coef


def token_scores(agent: Agent, batch: Batch) -> Tensor:
    """What each token was paid without any KL: the score at the end, dense terms as they fall due. (B, R), float32."""
    base = agent.envs.unwrapped
    # What kl_coef was multiplied with: the environment's estimate of the KL, or log pi_ref alone.
    price = batch.kl if getattr(base, "kl_term", "both") == "both" else -batch.ref_logprobs
    return torch.where(batch.response_mask, batch.rewards + getattr(base, "kl_coef", 0.0) * price, 0.0)


def train_metrics(found: dict[str, float], mismatch: float = 0.0) -> dict[str, float]:
    """What `optimise` found under the names that metrics have: ``train/loss``, ``train/n_updates`` and so on."""
    renamed = {"policy_loss": "policy_gradient_loss", "num_steps": "n_updates"}
    metrics = {f"train/{renamed.get(name, name)}": float(value) for name, value in found.items()}
    return metrics | {"train/logprob_mismatch": mismatch}
