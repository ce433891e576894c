"""Agents on the packaged reviews: true sentiment, KL and grammaticality on held-out prompts, over seeds.

python -m rlhf_gym.benchmarks.tiny_reviews --agents ppo --num-seeds 5 --out benchmarks/results/tiny_reviews.json
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import AGENTS
from rlhf_gym.evaluation import evaluate
from rlhf_gym.tasks.tiny_reviews import grammaticality

from .cells import write_figures
from .seeds import summarise

HELD_OUT = {"prompts": "tiny-reviews/test", "num_episodes": 512, "others": {"grammatical": grammaticality}}


def main(argv: list[str] | None = None) -> int:
    """Train every agent with every seed, print the table, write it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.tiny_reviews", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--agents", nargs="+", default=["ppo"], choices=sorted(AGENTS))
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--kl-coef", type=float, default=0.03)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    cells = [run_cell(agent, seed, options) for agent in options.agents for seed in range(options.num_seeds)]
    table = {agent: summarise([cell for cell in cells if cell["agent"] == agent]) for agent in options.agents}
    print(as_markdown(table))
    if options.out:
        write_figures(options.out, "tiny_reviews", argv, {"table": table, "cells": cells})
    return 0


def run_cell(agent: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training run with its evaluations before and after."""
    envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=options.num_envs, kl_coef=options.kl_coef)
    module, _, name = AGENTS[agent].partition(":")
    before = evaluate(None, envs, seed=seed, **HELD_OUT).summary()
    start = time.perf_counter()
    # TRPO's learning rate is its critic's only and stays as it is.
    config = {} if agent == "trpo" else {"learning_rate": options.learning_rate}
    learner = getattr(importlib.import_module(module), name)(envs, seed=seed, **config).learn(options.total_timesteps)
    seconds = time.perf_counter() - start
    after = evaluate(learner, envs, seed=seed, **HELD_OUT).summary()
    print(
        f"{agent} seed {seed}: {after['score']['mean']:.3f}, kl {after['kl']['mean']:.2f}, {seconds:.0f} s",
        file=sys.stderr,
    )
    return {"agent": agent, "seed": seed, "seconds": seconds, "before": before, "after": after}


def as_markdown(table: dict[str, dict[str, Any]]) -> str:
    """A row per agent: means over seeds with 95 % intervals."""
    lines = [
        "| agent | true sentiment before | after | worst seed | KL, nats | grammatical before | after | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for agent, row in table.items():
        score, kl, grammatical = (row[f"after/{name}"] for name in ("score", "kl", "grammatical"))
        lines.append(
            f"| {agent} | {row['before/score']['mean']:.3f} | {score['mean']:.3f} ± {score['half_width']:.3f} | "
            f"{score['min']:.3f} | {kl['mean']:.2f} | {row['before/grammatical']['mean']:.3f} | "
            f"{grammatical['mean']:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
