"""Tabular Q-learning with epsilon-greedy exploration, for tasks whose states can be listed.

    1. Responses are sampled by the epsilon-greedy policy of Q: with probability epsilon any token, else the best one.
    epsilon falls linearly from its first to its last value over the first part of the training.
    2. Q(s, a) <- Q(s, a) + alpha * (r + max_a' Q(s', a') - Q(s, a)) for each token, from the last one of a response
    to the first, so that a score reaches the beginning at once; alpha = 1 / n(s, a)^step_power with n the number of
    updates of that pair.

Objective: **E[score], and nothing about the KL**, however large kl_coef is: the environment's penalty is added back
to the rewards. Trained to the end, it is the best policy for kl_coef = 0, and what `rlhf_gym.exact.evaluate` finds as
its regret is the price of ignoring the KL. As a model (``policy_model``, what is saved) it is the greedy policy, the
reference renormalised on the best tokens where several are equally good, so that it stays as near to the reference as
a greedy policy can in each state. While it learns, the log-probs announced to the environment are those of the
epsilon-greedy policy, with which the tokens are drawn.

Exploration and learning only ever see tokens that the environment permits and the reference can produce.

Source:
    Watkins 1989; Watkins & Dayan 1992: Q converges to the optimal values if all pairs are tried again and again and
    sum alpha = inf, sum alpha^2 < inf (a step_power above .5, up to 1). Even-Dar & Mansour 2003: powers below 1 are
    faster.

Metrics beside those of every agent: ``train/epsilon``, ``train/td_error`` (mean absolute), ``train/num_pairs`` (pairs
of a state and a token that have been tried). The settings of gradient steps (learning_rate, num_epochs and the like)
and ref_kl_target have no effect: there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from rlhf_gym.exact import TabularForCausalLM
from rlhf_gym.exact.table import read_tokens

from .base import Agent
from .batch import Rollout
from .config import SHARE, AgentConfig, check_fields, one_of
from .updates import token_scores

# Values nearer than this are equally good: rewards are float32, and the KL is added back to them.
TIE = 1e-5


@dataclass(frozen=True, kw_only=True)
class QLearningConfig(AgentConfig):
    """Settings of Q-learning; of those of every agent ``num_rounds`` counts.

    Attributes:
        epsilon_start, epsilon_end: Share of tokens chosen to explore, at first and at last.
        exploration_fraction: The part of ``total_timesteps`` over which it falls.
        exploration: What they are drawn from: "uniform" (all permitted tokens alike) or "reference".
        step_power: Of alpha = 1 / n^step_power. 0 replaces the old value, which is right where the same token in the
            same state always pays the same; above .5 it averages.
    """

    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    exploration_fraction: float = 0.5
    exploration: str = "uniform"
    step_power: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            {
                "epsilon_start epsilon_end exploration_fraction step_power": SHARE,
                "exploration": one_of("uniform", "reference"),
            },
        )


class QLearning(Agent):
    """Tabular Q-learning; see the module's docstring and :class:`QLearningConfig`.

    Args:
        envs: A vector environment with known answers (`rlhf_gym.exact`).
        policy: "tabular" or None: one row of values per state of the environment. A `TabularForCausalLM` gives its
            states only.
        seed, audit_interval, **config: As in :class:`~rlhf_gym.agents.base.Agent`.

    Attributes:
        q_values: Q, 0 where nothing is known yet. Shape (S, V), float64.
        num_visits: Updates of each pair. Shape (S, V), int64.

    Raises:
        ValueError: If the policy is no table.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64)           # doctest: +SKIP
        >>> QLearning(envs, seed=0).learn(20_000).policy_model               # doctest: +SKIP
    """

    config_class = QLearningConfig

    def __init__(self, envs: VectorEnv, policy: Any = "tabular", seed: int = 0, **arguments: Any):
        super().__init__(envs, "tabular" if policy is None else policy, seed, **arguments)
        model = self.policy.model
        if not isinstance(model, TabularForCausalLM):
            raise ValueError(f'policy must be "tabular" (a table of values is learnt), got {policy!r}')
        token_filter, logits = self.policy.token_filter, model.lm_head.reference.cpu()
        permitted = token_filter.mask(logits)
        self._ref_logprobs = token_filter.logprobs(logits, permitted).double().numpy()
        self._permitted = self._ref_logprobs > -np.inf
        self.q_values = np.zeros(logits.shape)
        self.num_visits = np.zeros(logits.shape, dtype=np.int64)
        self._follow(0.0)

    def before_rollout(self) -> None:
        """Explores."""
        self._follow(self.epsilon)

    @property
    def epsilon(self) -> float:
        """Share of tokens chosen to explore, by schedule."""
        cfg, done = self.config, 1.0 - self.progress_remaining
        share = min(1.0, done / cfg.exploration_fraction) if cfg.exploration_fraction else 1.0
        return (1 - share) * cfg.epsilon_start + share * cfg.epsilon_end

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, model = rollout.batch, self.policy.model
        start = torch.full_like(batch.ids[:, 0], model.config.start_state)
        visited = read_tokens(model.transitions, start, batch.ids).cpu().numpy()  # the state after each token
        tokens, rewards = batch.response_ids.cpu().numpy(), token_scores(self, batch).double().cpu().numpy()
        ends, begins = batch.response_mask.sum(1).tolist(), batch.prompt_lengths.tolist()
        q, visits, errors = self.q_values, self.num_visits, []
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            future = 0.0
            for t in reversed(range(end)):
                state, token = visited[row, begin - 1 + t], tokens[row, t]
                visits[state, token] += 1
                errors.append(rewards[row, t] + future - q[state, token])
                q[state, token] += errors[-1] / visits[state, token] ** self.config.step_power
                future = q[state, self._permitted[state]].max()
        metrics = {
            "train/epsilon": self.epsilon,
            "train/td_error": float(np.abs(errors).mean()),
            "train/num_pairs": float((visits > 0).sum()),
        }
        self._follow(0.0)
        return metrics

    def _follow(self, epsilon: float) -> None:
        """Makes the model the epsilon-greedy policy of Q."""
        q = np.where(self._permitted, self.q_values, -np.inf)
        best = q >= q.max(1, keepdims=True) - TIE
        reference = np.exp(self._ref_logprobs)
        others = (
            reference
            if self.config.exploration == "reference"
            else self._permitted / self._permitted.sum(1, keepdims=True)
        )
        greedy = np.where(best, reference, 0.0)
        probs = (1 - epsilon) * greedy / greedy.sum(1, keepdims=True) + epsilon * others
        with np.errstate(divide="ignore"):
            logprobs = torch.from_numpy(np.log(probs))
        head = self.policy.model.lm_head
        reference_logits = head.reference.cpu()
        residual = self.policy.token_filter.temperature * logprobs - reference_logits
        # Where the reference is -inf already, -inf minus -inf would be NaN.
        head.residual.data.copy_(torch.where(reference_logits == -torch.inf, 0.0, residual))

    def save(self, directory: str | Path) -> None:
        """As :meth:`~rlhf_gym.agents.base.Agent.save`; the model is the greedy policy."""
        self.state = {"q_values": self.q_values.tolist(), "num_visits": self.num_visits.tolist()}
        super().save(directory)

    @classmethod
    def load(cls, directory: str | Path, env: VectorEnv, *, fsdp: bool = False) -> QLearning:
        """As :meth:`~rlhf_gym.agents.base.Agent.load`."""
        agent: Any = super().load(directory, env, fsdp=fsdp)
        agent.q_values = np.array(agent.state["q_values"], dtype=np.float64)
        agent.num_visits = np.array(agent.state["num_visits"], dtype=np.int64)
        agent._follow(0.0)
        return agent
