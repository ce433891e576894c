"""Settings of the agents: what is known to work, and equal tuning for all by random search.

Every agent gets the same number of random draws (one that comes twice is run once), each trained on every task with one
seed that the benchmark does not use. The best by the mean over tasks (of the normalised score; without a known optimum
of score - kl_coef * KL) is then the agent's configuration in the benchmark.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_gym.agents import AGENTS

from .cells import failed_score
from .contestants import VARIANTS

SEED = 1_000_000  # of all tuning runs; the benchmark's count from 0


class LogUniform(NamedTuple):
    """A number whose logarithm is equally likely everywhere between those of two bounds."""

    low: float
    high: float


# Of an optimiser of the policy: a table wants larger steps than a language model.
LEARNING_RATES = {
    "tabular": LogUniform(3e-3, 0.3),
    "transformer": LogUniform(2e-4, 2e-2),
    "lstm": LogUniform(2e-4, 2e-2),
    "reference": LogUniform(3e-5, 1e-3),
}
# How often a rollout is gone over or divided, and how far a critic is trusted.
COUNTS, LAMBDAS = [1, 2, 4], [0.9, 0.95, 1.0]
FRACTIONS = [0.2, 0.5, 0.8]  # of a run, spent on exploring less and less
# Agent -> what is searched beside its learning rate (None: nothing learns at one): a range, or a list to choose from.
# Agents that are not here, anybody's among them, have their learning rate tuned.
SPACES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ppo", "nlpo"), {"num_epochs": COUNTS, "gae_lambda": LAMBDAS}),
    "soft-q": {"num_epochs": COUNTS, "td_lambda": LAMBDAS},
    **dict.fromkeys(("sb3-ppo", "maskable-ppo", "recurrent-ppo"), {"n_epochs": COUNTS, "gae_lambda": LAMBDAS}),
    # Its network is no table, whatever the policy.
    "mlp-ppo": {"learning_rate": LEARNING_RATES["transformer"], "n_epochs": COUNTS, "gae_lambda": LAMBDAS},
    "a2c": {"gae_lambda": LAMBDAS},
    **dict.fromkeys(
        ("rloo", "grpo", "vargrad", "expert-iteration", "online-dpo"),
        {"num_epochs": COUNTS, "num_minibatches": COUNTS},
    ),
    **dict.fromkeys(("reinforce", "remax"), {"num_minibatches": COUNTS}),  # one pass: nothing is clipped
    **dict.fromkeys(("dqn", "qrdqn"), {"replay_ratio": [0.5, 1.0, 2.0], "exploration_fraction": FRACTIONS}),
    # Its learning rate is the critic's.
    "trpo": {
        "learning_rate": LogUniform(1e-3, 1e-1), "relative_damping": [True],
        "target_kl": LogUniform(3e-3, 0.1), "cg_damping": LogUniform(0.03, 1.0),
    },
    "best-of-n": {"learning_rate": None, "num_candidates": [2, 4, 8, 16, 32, 64]},
    "q-learning": {
        "learning_rate": None, "step_power": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "exploration_fraction": FRACTIONS,
    },
}  # fmt: skip
# Without tuning: the step that suits a policy, found with PPO (for a reference with RLOO: one step per rollout) ...
RATES = {"tabular": 0.02, "transformer": 1e-3, "lstm": 2e-3, "reference": 6e-4}
# ... and for (agent, policy) what is known to be better, found by hand with a seed or two. All others have their own
# defaults.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("reinforce", "tabular"): {"learning_rate": 0.05},
    ("rloo", "tabular"): {"learning_rate": 0.04},
    ("remax", "tabular"): {"learning_rate": 0.03},
    ("grpo", "tabular"): {"learning_rate": 0.1},
    ("dr-grpo", "tabular"): {"learning_rate": 0.045, "num_minibatches": 4},
    ("vargrad", "tabular"): {"learning_rate": 0.01},
    ("expert-iteration", "tabular"): {"learning_rate": 0.05},
    ("expert-iteration-optimal", "tabular"): {"learning_rate": 0.03},
    ("online-dpo", "tabular"): {"learning_rate": 0.05},
    ("online-dpo-soft", "tabular"): {"learning_rate": 0.02, "num_epochs": 4},
    ("sb3-ppo", "tabular"): {"learning_rate": 0.03},
    ("maskable-ppo", "tabular"): {"learning_rate": 0.03},
    ("a2c", "tabular"): {"learning_rate": 0.2},  # one step per rollout
    # Fewer and larger steps than their defaults, which cost ten times as much and end at the same policy.
    ("dqn", "tabular"): {"learning_rate": 0.05, "batch_size": 1024, "replay_ratio": 1.0},
    ("qrdqn", "tabular"): {"learning_rate": 0.05, "batch_size": 1024, "replay_ratio": 1.0},
    ("trpo", "tabular"): {"relative_damping": True, "cg_damping": 0.1, "target_kl": 0.01},
    # Several steps per rollout want smaller ones; so do those who are soon far from the reference.
    ("ppo", "reference"): {"learning_rate": 2e-4},
    ("nlpo", "reference"): {"learning_rate": 2e-4},
    ("vargrad", "reference"): {"learning_rate": 2e-4},
    ("soft-q", "reference"): {"learning_rate": 5e-5},
    ("expert-iteration", "reference"): {"learning_rate": 2e-4},
    ("online-dpo", "reference"): {"learning_rate": 2e-4},
    ("sb3-ppo", "reference"): {"learning_rate": 3e-4},
    ("maskable-ppo", "reference"): {"learning_rate": 3e-4, "top_k": 16},
    # More updates than its default of one per episode and row.
    ("trpo", "reference"): {"n_steps": 24},
    ("dqn", "reference"): {"learning_rate": 2e-4, "replay_ratio": 0.5},
    ("dqn-reference", "reference"): {"learning_rate": 2e-4, "replay_ratio": 0.5},
    ("qrdqn", "reference"): {"learning_rate": 2e-4, "replay_ratio": 0.5},
}


def preset(agent: str, policy: str) -> dict[str, Any]:
    """An agent's settings where neither the command line nor the tuning says otherwise."""
    base, own = VARIANTS.get(agent, (agent, {}))
    learns_at_a_rate = base in AGENTS and "learning_rate" not in _space(agent)
    common = {"learning_rate": RATES[policy]} if learns_at_a_rate and policy in RATES else {}
    return own | PRESETS.get((agent, policy), common)


def _space(agent: str) -> dict[str, Any]:
    return SPACES.get(agent) or SPACES.get(VARIANTS.get(agent, (agent, {}))[0], {})


def draw(agent: str, policy: str, number: int, fixed: dict[str, Any]) -> dict[str, Any]:
    """An agent's random configuration of this number: its preset, with what is searched drawn anew.

    It does not depend on how many there are.

    Args:
        agent, policy: Which space.
        number: 0, 1, ...
        fixed: Settings that are given, and not searched.
    """
    rng = np.random.default_rng([zlib.crc32(agent.encode()), number])
    found = preset(agent, policy)
    for name, space in ({"learning_rate": LEARNING_RATES[policy]} | _space(agent)).items():
        if space is None:
            continue
        if isinstance(space, LogUniform):
            # Three digits, so that a configuration can be read and typed.
            found[name] = float(f"{math.exp(rng.uniform(math.log(space.low), math.log(space.high))):.3g}")
        else:
            found[name] = space[int(rng.integers(len(space)))]
    return found | fixed


def best(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The configuration with the best mean over the cells of one agent's tuning; the first of equal ones.

    A failed cell counts no more than the reference, as in the tables (`failed_score`); one without a measure, because
    it failed before there was any, minus infinity.
    """
    values: dict[str, list[float]] = {}
    for cell in cells:
        values.setdefault(json.dumps(cell["config"]), []).append(_score(cell))
    return json.loads(max(values, key=lambda config: sum(values[config]) / len(values[config])))


def _score(cell: dict[str, Any]) -> float:
    """Normalised score, or the objective where no optimum is known. There a cell begins at the reference's."""
    records = [*cell["curve"], cell["metrics"]]
    is_known = any("normalised" in record for record in records)

    def score(record: dict[str, Any]) -> float:
        if is_known or "objective" in record:
            return record.get("normalised" if is_known else "objective", math.nan)
        return record.get("score", math.nan) - cell["kl_coef"] * record.get("kl", math.nan)

    seen = [value for value in map(score, records) if math.isfinite(value)]
    if not seen:
        return -math.inf
    return seen[-1] if cell["status"] == "ok" else failed_score(seen, 0.0 if is_known else seen[0])
