"""What agents tell while they learn: the progress bar and the metrics that every algorithm has.

Two families of names go out together: Stable-Baselines3's (``rollout/``, ``time/``, ``train/``) and TRL's
(``objective/``), so that either's plots work. Every ``audit_interval``-th update has ``audit/`` too, see ``audit.py``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .base import Agent
    from .batch import Rollout


def rollout_metrics(agent: Agent, rollout: Rollout) -> dict[str, float]:
    """Metrics of a rollout.

    ``rollout/ep_rew_mean`` is the mean of the summed rewards (score minus KL penalty), ``objective/scores`` that of the
    scores alone, ``objective/kl`` the mean KL of whole responses in nats, ``objective/non_score_reward`` what the KL
    penalty took, ``objective/scores/<term>`` and ``objective/metric/<name>`` the means of the reward's terms and of the
    environment's metrics over the responses to which they apply, ``objective/entropy`` minus the mean log-prob of whole responses.
    """
    batch = rollout.batch
    lengths = batch.response_mask.sum(1).float()
    returns, kl = batch.rewards.sum(1), batch.kl.sum(1)
    metrics = {
        "time/total_timesteps": float(agent.num_timesteps),
        "rollout/ep_rew_mean": returns.mean().item(),
        "rollout/ep_len_mean": lengths.mean().item(),
        "rollout/eos_rate": batch.ended_by_eos.float().mean().item(),
        "objective/scores": batch.scores.mean().item(),
        "objective/scores_std": batch.scores.std(correction=0).item(),
        "objective/rlhf_reward": returns.mean().item(),
        "objective/non_score_reward": (returns - batch.scores).mean().item(),
        "objective/kl": kl.mean().item(),
        "objective/entropy": -batch.logprobs.sum(1).mean().item(),
        "val/num_eos_tokens": batch.ended_by_eos.float().sum().item(),
    }
    kl_coef = getattr(agent.envs.unwrapped, "kl_coef", None)
    if kl_coef is not None:
        metrics["objective/kl_coef"] = kl_coef
    for family, columns in (("scores", rollout.terms), ("metric", rollout.metrics)):
        for name, column in columns.items():
            values = column.cpu().numpy() if hasattr(column, "cpu") else np.asarray(column)
            if not np.isnan(values).all():
                metrics[f"objective/{family}/{name}"] = float(np.nanmean(values))
    return metrics


class Progress:
    """A progress bar over tokens, and the clock behind ``time/``.

    Args:
        total: Tokens in all.
        done: Tokens before this call.
        show: Whether to draw the bar.
    """

    def __init__(self, total: int, done: int, show: bool):
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, disable=not show, dynamic_ncols=True, smoothing=0.1
        )
        self._start, self._tokens = time.perf_counter(), 0
        self._marks = [self._start] * 3

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def start_rollout(self) -> None:
        """The rollout begins."""
        self._marks[0] = time.perf_counter()

    def tokens(self, count: int) -> None:
        """So many more tokens were generated."""
        self._tokens += count
        self._bar.update(count)

    def start_audit(self) -> None:
        """The rollout is there; it is looked at, which takes no time where nothing is due."""
        self._marks[1] = time.perf_counter()

    def start_update(self) -> None:
        """The update begins."""
        self._marks[2] = time.perf_counter()

    def end_update(self, rollout: Rollout) -> dict[str, float]:
        """Close one round; returns ``time/`` metrics (seconds; ``time/fps`` is tokens per second since ``learn``
        began)."""
        now = time.perf_counter()
        batch = rollout.batch
        self._bar.set_postfix(
            score=f"{batch.scores.mean().item():.3f}", kl=f"{batch.kl.sum(1).mean().item():.2f}", refresh=False
        )
        return {
            "time/fps": self._tokens / max(now - self._start, 1e-9),
            "time/time_elapsed": now - self._start,
            "time/rollout": self._marks[1] - self._marks[0],
            "time/audit": self._marks[2] - self._marks[1],
            "time/update": now - self._marks[2],
        }
