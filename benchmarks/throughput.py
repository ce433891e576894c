"""How many tokens a second this machine does, phase by phase, on the packaged reviews.

    python -m rlhf_gym.benchmarks.throughput --num-envs 64 --out throughput.json

Each figure is the median of several repeats after one that warms up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import PPO
from rlhf_gym.atomic import write_json
from rlhf_gym.runs import machine


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-envs", type=int, default=64, help="rows")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each phase")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(argv)
    figures = measure(options.num_envs, options.repeats)
    print(f"{torch.get_num_threads()} threads, {options.num_envs} rows, medians of {options.repeats}")
    for name, (tokens, seconds) in figures.items():
        print(f"{name:<42} {tokens / seconds:>10,.0f} tokens/s {seconds * 1000:>10,.1f} ms")
    if options.out:
        rows = {name: {"tokens": tokens, "seconds": seconds} for name, (tokens, seconds) in figures.items()}
        write_json(
            options.out,
            {"num_envs": options.num_envs, "threads": torch.get_num_threads(), **machine(), "figures": rows},
        )


def measure(num_envs: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median (tokens, seconds) of each phase, by name."""
    envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=num_envs)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    vocab_size = envs.single_action_space.n

    def steps() -> int:
        for _ in range(16):
            envs.step(rng.integers(0, vocab_size, num_envs))
        return 16 * num_envs

    agent = PPO(gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=num_envs, kl_coef=0.05), seed=0)
    agent.envs.reset(seed=0)
    agent.total_timesteps = 10**9
    rollout: Any = None

    def collect() -> int:
        nonlocal rollout
        rollout = agent.collector.collect()
        return rollout.num_tokens

    def update() -> int:
        agent.update(rollout)
        return rollout.num_tokens

    return {
        "envs.step with the cached reference": _median(steps, repeats),
        "rollout: tokens, log-probs, values, rewards": _median(collect, repeats),
        "PPO update, 4 epochs": _median(update, repeats),
    }


def _median(phase: Callable[[], int], repeats: int) -> tuple[float, float]:
    """Tokens and seconds of the repeat whose speed is the median one; the first, which warms up, is not counted."""
    phase()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = phase()
        found.append((tokens, time.perf_counter() - start))
    speed = statistics.median_low(tokens / seconds for tokens, seconds in found)
    return next(pair for pair in found if pair[0] / pair[1] == speed)


if __name__ == "__main__":
    main()
