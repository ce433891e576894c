"""Stable-Baselines3's DQN and sb3-contrib's QR-DQN as agents.

They learn Q(s, a) from a replay buffer, explore with probability epsilon, and end with the greedy policy of Q, which is
deterministic. QR-DQN learns quantiles of the return instead of its mean and is greedy in their mean.

Objective: with ``kl_coef=0`` E[score]. With ``kl_coef > 0`` E[score] - kl_coef * KL(pi || pi_ref) over *deterministic*
policies: the agent announces the log-prob that its own choice has, 0, so the reward is score + kl_coef * log pi_ref(a).
The best of them writes the response with the largest score + kl_coef * log pi_ref, and its regret is
-kl_coef * log pi*(of that response), where pi* is the optimal policy (EXACT: pi_ref exp(score / kl_coef) / Z): little
where the optimum is sharp, much where it is spread over many responses. An entropy that would make up for it is what
these algorithms do not have; soft Q-learning does (``rlhf_gym.agents.SoftQ``).

Uniform exploration is the negative control of the benchmark: among many tokens it finds what is rewarded too rarely.
``exploration="reference"`` is the remedy that keeps the algorithm as it is.

What is evaluated and saved (``policy_model``), and what ``predict`` gives, ``deterministic`` or not, is the greedy
policy: epsilon is exploration and no part of what has been learnt. ``objective/kl`` is the environment's account of the
training episodes: minus the sum of log pi_ref, exploring actions included.

Source:
    Mnih et al. 2015 (DQN); Dabney et al. 2018, arXiv:1710.10044 (QR-DQN). Differs from the libraries': exploring rows are
    drawn one by one, among allowed tokens (``exploration.py``); gamma is 1; the target network follows once per rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sb3_contrib
import stable_baselines3
from safetensors.torch import load_file, save_file
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from ..audit import Audit
from ..config import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SHARE, check_fields, one_of
from .agent import SB3Agent, longest_response, starting_model
from .buffers import CompactReplayBuffer
from .exploration import EXPLORATIONS, as_certain, with_token_exploration
from .policy import policy_kwargs
from .q_policy import GreedyLM, LMQPolicy


@dataclass(frozen=True, kw_only=True)
class DQNConfig:
    """Settings of DQN; the names are Stable-Baselines3's.

    Attributes:
        learning_rate: Of Adam, at the start.
        lr_schedule: "linear" (to 0 at ``total_timesteps``) or "constant".
        buffer_size: Transitions that are kept.
        learning_starts: Tokens that are written at random first.
        batch_size: Transitions per gradient step.
        gamma: Discount per token. 1: the objective is a sum over the response.
        train_freq: Steps of the environment from one round of learning to the next; None is the longest response.
        gradient_steps: Per round; None: as many as learn from each transition ``replay_ratio`` times.
        replay_ratio: See ``gradient_steps``.
        target_update_interval: Tokens after which the target network follows; None is once per round.
        tau: How far it follows.
        exploration: "uniform" (over allowed tokens) or "reference" (a draw from the reference).
        exploration_fraction: Share of ``total_timesteps`` over which epsilon falls linearly.
        exploration_initial_eps, exploration_final_eps: From where to where.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    learning_rate: float = 1e-3
    lr_schedule: str = "linear"
    buffer_size: int = 100_000
    learning_starts: int = 0
    batch_size: int = 256
    gamma: float = 1.0
    train_freq: int | None = None
    gradient_steps: int | None = None
    replay_ratio: float = 8.0
    target_update_interval: int | None = None
    tau: float = 1.0
    exploration: str = "uniform"
    exploration_fraction: float = 0.5
    exploration_initial_eps: float = 1.0
    exploration_final_eps: float = 0.05
    max_grad_norm: float = 10.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "learning_rate": NOT_NEGATIVE,
                "lr_schedule": one_of("linear", "constant"),
                "exploration": one_of(*EXPLORATIONS),
                "buffer_size batch_size": COUNT,
                "train_freq gradient_steps target_update_interval": COUNT_OR_NONE,
                "learning_starts": NOT_NEGATIVE,
                "gamma tau exploration_fraction exploration_initial_eps exploration_final_eps": SHARE,
                "replay_ratio max_grad_norm": POSITIVE,
            },
        )


@dataclass(frozen=True, kw_only=True)
class QRDQNConfig(DQNConfig):
    """Settings of QR-DQN, and those of ``DQNConfig``.

    Attributes:
        n_quantiles: Of the distribution of returns.
    """

    n_quantiles: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"n_quantiles": COUNT})


class ValueAgent(SB3Agent):
    """DQN, QR-DQN or a subclass of one of them, with a language model as the trunk of its Q-network."""

    policy_class = LMQPolicy

    def fit_algorithm(self, algorithm: Any) -> type[OffPolicyAlgorithm]:
        """The algorithm with our exploration; TypeError for one that is no DQN."""
        kinds = (stable_baselines3.DQN, sb3_contrib.QRDQN)
        if not (isinstance(algorithm, type) and issubclass(algorithm, kinds)):
            raise TypeError(f"algorithm must be DQN, QRDQN or a subclass of one of them, got {algorithm!r}")
        return with_token_exploration(algorithm)

    def make_policy(self, policy: Any, arguments: dict[str, Any]) -> None:
        """Puts ``policy_kwargs`` into the algorithm's arguments."""
        source, self.tokenizer = starting_model(self.envs.unwrapped, policy)
        quantiles = {}
        if issubclass(self.algorithm_class, sb3_contrib.QRDQN):
            quantiles = {"n_quantiles": arguments.pop("n_quantiles", 25)}
        arguments["policy_kwargs"] = (
            policy_kwargs(self.envs, source, **quantiles) | arguments.pop("policy_kwargs", {})
        )  # fmt: skip

    def make_venv(self) -> VecEnv:
        """The environment as the algorithm wants it, told that the policy is deterministic."""
        return as_certain(super().make_venv())

    def complete(self, arguments: dict[str, Any], venv: VecEnv) -> None:
        """Fills in how often and how much is learnt and the buffer, and takes out what is not the algorithm's."""
        if self.buffer_class is not None:
            arguments.setdefault("replay_buffer_class", self.buffer_class)
        complete_replay(arguments, venv.num_envs, longest_response(self.envs))
        self.exploration = arguments.pop("exploration", "uniform")

    def make_audit(self) -> Audit:
        """None of sampled log-probs, for there are none."""
        return Audit(self.envs, None, 0)

    @property
    def _announces(self) -> bool:
        return False  # `AnnounceCertainty` does

    @property
    def policy_model(self) -> Any:
        """The greedy policy as a language model, a copy; a table where the Q-function is one."""
        network = self.algorithm.policy.network
        return network.greedy_table() or GreedyLM(network)

    def begin_rollout(self) -> None:
        """Called before each rollout."""
        self.algorithm.exploration = self.exploration
        super().begin_rollout()

    def save_policy(self, folder: Path) -> None:
        """The greedy policy as a ``from_pretrained`` model, and both networks."""
        network = self.algorithm.policy.network
        (network.greedy_table() or network.greedy_weights()).save_pretrained(folder)
        tensors = {name: p.clone() for name, p in self.algorithm.policy.state_dict().items()}
        save_file(tensors, folder / "q_networks.safetensors")

    def load_policy(self, folder: Path) -> None:
        """Both networks."""
        self.algorithm.policy.load_state_dict(load_file(folder / "q_networks.safetensors"))


def complete_replay(arguments: dict[str, Any], num_envs: int, max_response_tokens: int) -> None:
    """Fills in, in place, what an off-policy algorithm leaves to the size of the environment."""
    batch_size, ratio = arguments.setdefault("batch_size", 256), arguments.pop("replay_ratio", 8.0)
    if arguments.get("train_freq") is None:
        arguments["train_freq"] = max_response_tokens
    per_round = arguments["train_freq"] * num_envs
    if arguments.get("gradient_steps") is None:
        arguments["gradient_steps"] = max(1, round(ratio * per_round / batch_size))
    if arguments.get("target_update_interval") is None:
        arguments["target_update_interval"] = per_round
    arguments["buffer_size"] = max(arguments.get("buffer_size") or 100_000, num_envs)
    arguments.setdefault("learning_starts", 0)


class DQN(ValueAgent):
    """Stable-Baselines3's DQN; see the module's docstring and `DQNConfig`."""

    algorithm_class = stable_baselines3.DQN
    config_class = DQNConfig
    buffer_class = CompactReplayBuffer


class QRDQN(ValueAgent):
    """sb3-contrib's QR-DQN; see the module's docstring and `QRDQNConfig`."""

    algorithm_class = sb3_contrib.QRDQN
    config_class = QRDQNConfig
    buffer_class = CompactReplayBuffer
