"""From Stable-Baselines3's callbacks to ours: metrics after each update, under the names that all agents share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from .audit import buffer_batch

if TYPE_CHECKING:
    from .agent import SB3Agent

# Stable-Baselines3's names -> those of TRL and of the batched agents, for the same numbers.
_SYNONYMS = {
    "train/kl_divergence_loss": ("train/approx_kl",),
    "train/approx_kl": ("policy/approxkl_avg",),
    "train/clip_fraction": ("policy/clipfrac_avg",),
    "train/policy_gradient_loss": ("loss/policy_avg",),
    "train/policy_loss": ("loss/policy_avg",),
    "train/value_loss": ("loss/value_avg",),
}


class StopLearning(Exception):
    """A callback has had enough. Never leaves ``SB3Agent.learn``."""


class Report(BaseCallback):
    """Calls ``callback(agent, metrics)`` after each update and draws the progress bar.

    SB3 has no hook there: the next one after an update is the start of the next rollout, or the end of learning.

    Args:
        agent: The agent that learns.
        callbacks: Each is called with the agent and the metrics; False stops.
        progress_bar: Whether to draw the bar.
    """

    def __init__(self, agent: SB3Agent, callbacks: Sequence[Callable[..., Any]], progress_bar: bool) -> None:
        super().__init__()
        self.agent, self.callbacks, self.show = agent, callbacks, progress_bar
        self.episodes: list[dict[str, Any]] = []
        self._rollout_ended = False
        self.audit = agent.make_audit()
        self._audited: dict[str, float] = {}
        # Of each step so far, what the audit cannot read in the buffer.
        self._ref_logprobs: list[list[float]] = []
        self._scores: list[list[float]] = []
        self._seen: Any = None

    def _on_training_start(self) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=self.agent.total_timesteps,
            initial=self.num_timesteps,
            unit="tok",
            unit_scale=True,
            disable=not self.show,
            dynamic_ncols=True,
        )
        self._first, self._start = self.num_timesteps, time.perf_counter()
        self._marks = [self._start] * 3  # when the rollout began, when it ended, and when the update began
        self._logprob_sums = np.zeros(self.training_env.num_envs)

    def _on_rollout_start(self) -> None:
        self._after_update()
        self.agent.begin_rollout()
        self._ref_logprobs, self._scores = [], []
        self._marks[0] = time.perf_counter()

    def _on_step(self) -> bool:
        dones, infos = self._last_step()
        if not len(infos):
            return True
        if "log_probs" in self.locals:
            self._logprob_sums += self.locals["log_probs"].detach().cpu().numpy().reshape(-1)
        for i in np.flatnonzero(dones):
            if "episode" in infos[i]:
                self.episodes.append(infos[i] | {"logprob": float(self._logprob_sums[i])})
            self._logprob_sums[i] = 0
        self._ref_logprobs.append([info.get("ref_logprob", np.nan) for info in infos])
        self._scores.append([info.get("score", np.nan) for info in infos])
        self._bar.update(self.training_env.num_envs)
        return True

    def _last_step(self) -> tuple[Any, Any]:
        """Dones and infos of a step; none where it has been seen already."""
        if "infos" in self.locals:
            return self.locals["dones"], self.locals["infos"]
        step = self.training_env.last_step  # evolution strategies show no locals, and call once per row
        seen, self._seen = self._seen, step
        return ((), ()) if step is seen else step

    def _knows_logprobs(self) -> bool:
        """Whether the algorithm's log-probs are those of tokens; several actions may stand for one."""
        venv = self.training_env
        shared = venv.has_attr("needs_all_logprobs") and any(venv.get_attr("needs_all_logprobs"))
        return "log_probs" in self.locals and not shared

    def _on_rollout_end(self) -> None:
        self._rollout_ended = True
        self._marks[1] = time.perf_counter()
        if self.audit.is_on and self.episodes:
            batch = buffer_batch(
                self.model.rollout_buffer,
                np.array(self._ref_logprobs, np.float32),
                np.array(self._scores, np.float32),
                self.agent.envs.unwrapped.max_response_tokens,
            )
            self._audited = self.audit(batch, self.agent.num_updates, len(self.episodes))
        self._marks[2] = time.perf_counter()

    def _on_training_end(self) -> None:
        self._after_update()

    def close(self) -> None:
        """Ends the progress bar, however learning ended."""
        if hasattr(self, "_bar"):
            self._bar.close()

    def _after_update(self) -> None:
        if not self._rollout_ended:
            return
        self._rollout_ended = False
        metrics = self._metrics() | self._audited
        self._audited = {}
        self._bar.set_postfix(
            score=f"{metrics['objective/scores']:.3f}", kl=f"{metrics['objective/kl']:.2f}", refresh=False
        )
        self.agent.end_update(metrics["objective/kl"], len(self.episodes))
        self.episodes = []
        if any([call(self.agent, metrics) is False for call in self.callbacks]):  # a list: all of them are called
            raise StopLearning

    def _metrics(self) -> dict[str, float]:
        now, episodes = time.perf_counter(), self.episodes

        def mean(values: Sequence[float]) -> float:
            return float(np.mean(values)) if values else float("nan")

        returns = [e["episode"]["r"] for e in episodes]
        scores = [e.get("score", e["episode"]["r"]) for e in episodes]
        ended_by_eos = [e.get("stop_reason") in ("eos", 1) for e in episodes]
        metrics = {
            "time/total_timesteps": float(self.num_timesteps),
            "time/fps": (self.num_timesteps - self._first) / max(now - self._start, 1e-9),
            "time/time_elapsed": now - self._start,
            "time/rollout": self._marks[1] - self._marks[0],
            "time/audit": self._marks[2] - self._marks[1],
            "time/update": now - self._marks[2],
            "rollout/ep_rew_mean": mean(returns),
            "rollout/ep_len_mean": mean([e["episode"]["l"] for e in episodes]),
            "rollout/eos_rate": mean(ended_by_eos),
            "objective/scores": mean(scores),
            "objective/scores_std": float(np.std(scores)) if scores else float("nan"),
            "objective/rlhf_reward": mean(returns),
            "objective/non_score_reward": mean(returns) - mean(scores),
            "objective/kl": mean([e["kl"] for e in episodes if "kl" in e]) if any("kl" in e for e in episodes) else 0.0,
            "val/num_eos_tokens": float(sum(ended_by_eos)),
        }
        if hasattr(self.model, "exploration_rate"):
            metrics["rollout/exploration_rate"] = float(self.model.exploration_rate)
        if self._knows_logprobs():
            metrics["objective/entropy"] = -mean([e["logprob"] for e in episodes])
        kl_coef = getattr(self.agent.envs.unwrapped, "kl_coef", None)
        if kl_coef is not None:
            metrics["objective/kl_coef"] = kl_coef
        for name in sorted({key for e in episodes for key in e if key.startswith("score/")}):
            term = [e[name] for e in episodes if name in e and not np.isnan(e[name])]
            if term:
                metrics[f"objective/scores/{name.removeprefix('score/')}"] = mean(term)
        for name, value in self.logger.name_to_value.items():
            if name.startswith("train/"):
                metrics[name] = float(value)
        for name, others in _SYNONYMS.items():
            for other in others:
                if name in metrics:
                    metrics.setdefault(other, metrics[name])
        return metrics
