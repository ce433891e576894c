"""A learning curve with the exact regret beside it, and the regret that samples alone certify.

    python -m rlhf_gym.benchmarks.learning_curve --out docs/images/learning_curve.png

One run of PPO with a tabular policy; half a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np

from rlhf_gym.agents import PPO
from rlhf_gym.evaluation import evaluate as sample
from rlhf_gym.exact import certificate, evaluate, solve

from .frontier import REFERENCE
from .known_answers import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_ENVS = 128


def measure(
    task: str, *, kl_coef: float, total_timesteps: int, learning_rate: float, every: int = 4, num_samples: int = 256
) -> dict[str, np.ndarray]:
    """One run, looked at before it begins and after every so many updates.

    Args:
        task: One of `TASKS`.
        kl_coef: beta.
        total_timesteps: Tokens to learn from.
        learning_rate: Of PPO.
        every: Updates between two looks.
        num_samples: Responses that are sampled for a look; they are not learnt from.

    Returns:
        Columns, one entry per look: ``timesteps``, the exact ``objective`` and ``regret``; and from the samples their
        mean of S, ``sampled_objective``, and ``certified_regret``, the variance of S over 2 beta.
    """
    envs = gym.make_vec(f"rlhf_gym/{task}-v0", num_envs=NUM_ENVS, kl_coef=kl_coef)
    rows: list[dict[str, float]] = []

    def look(agent: PPO) -> None:
        exact, drawn = evaluate(agent, envs), sample(agent, envs, num_episodes=num_samples, seed=agent.num_updates)
        found = certificate(
            drawn.scores, drawn.kl, np.zeros(num_samples), kl_coef=kl_coef, prompt_index=drawn.prompt_index
        )
        rows.append({
            "timesteps": agent.num_timesteps, "objective": exact.objective, "regret": exact.regret,
            "sampled_objective": found.objective, "certified_regret": found.regret_estimate,
        })  # fmt: skip

    agent = PPO(envs, policy="tabular", learning_rate=learning_rate)
    look(agent)
    agent.learn(total_timesteps, callback=lambda who, _: look(who) if who.num_updates % every == 0 else None)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def picture(columns: Mapping[str, np.ndarray], optimum: float, title: str) -> Figure:
    """The objective, and the regret on a logarithmic axis, against training tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = columns["timesteps"]
    dots = {"color": "#0072B2", "linestyle": "none", "marker": "o", "markersize": 3.5}
    left.axhline(optimum, color="#999999", linestyle="--", linewidth=1.2, label=f"J* = {optimum:.5f}")
    left.plot(x, columns["sampled_objective"], label="by 256 samples", **dots)
    left.plot(x, columns["objective"], color="black", linewidth=1.5, label="exact")
    left.plot(x[0], columns["objective"][0], **REFERENCE)
    left.set_ylabel("objective J")
    right.semilogy(x, columns["certified_regret"], label="Var[S] / 2β by 256 samples", **dots)
    right.semilogy(x, columns["regret"], color="black", linewidth=1.5, label="exact")
    right.set_ylabel("regret J* - J")
    for axes in (left, right):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, not 20000
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Train once and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.learning_curve", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG")
    parser.add_argument("--task", default="Lexicon", choices=list(TASKS))
    parser.add_argument("--kl-coef", type=float, default=1.0)
    parser.add_argument("--total-timesteps", type=int, default=500_000)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    options = parser.parse_args(argv)
    columns = measure(
        options.task, kl_coef=options.kl_coef, total_timesteps=options.total_timesteps,
        learning_rate=options.learning_rate,
    )  # fmt: skip
    optimum = solve(gym.make(f"rlhf_gym/{options.task}-v0"), options.kl_coef).objective
    title = f"PPO with a tabular policy on {options.task}, β = {options.kl_coef:g}"
    picture(columns, optimum, title).savefig(options.out, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
