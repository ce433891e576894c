"""Agents on the tasks whose optimum is known: the normalised score of what they have learnt, with intervals over seeds.

    python -m rlhf_gym.benchmarks.known_answers --agents ppo --policy tabular --num-seeds 5 --out benchmarks/results/known_answers.jsonl

One JSON line per finished cell (agent, policy, task, kl_coef, seed); a cell that is there is not run again. 1 is optimal, 0 the reference.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import rlhf_gym
from rlhf_gym.agents import AGENTS
from rlhf_gym.lm import generate, make_engine

from .seeds import provenance

# Task -> the two KL coefficients of the table: a sharp and a soft optimum (scores of Lexicon are ten times as large).
TASKS = {
    "WoAiNi": (0.1, 0.3), "Brackets": (0.1, 0.3), "Lexicon": (2.0, 1.0), "Recall": (0.1, 0.3), "Goodhart": (0.1, 0.3), "Difficulty": (0.1, 0.3),
}  # fmt: skip
NUM_ENVS = 128


def main(argv: list[str] | None = None) -> int:
    """Run the missing cells and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.known_answers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--agents", nargs="+", default=["ppo"], choices=sorted(AGENTS))
    parser.add_argument("--policy", default="tabular", choices=["tabular", "transformer", "lstm"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=51_200)
    parser.add_argument("--config", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the agents, in JSON")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    options = parser.parse_args(argv)
    config = {item.partition("=")[0]: json.loads(item.partition("=")[2]) for item in options.config}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    cells = []
    for agent in options.agents:
        for task in options.tasks:
            for kl_coef in TASKS[task]:
                for seed in range(options.num_seeds):
                    key = {
                        "agent": agent,
                        "policy": options.policy,
                        "task": task,
                        "kl_coef": kl_coef,
                        "seed": seed,
                        "episodes": options.episodes,
                        "config": config,
                    }
                    cell = next((c for c in done if all(c.get(name) == value for name, value in key.items())), None)
                    if cell is None:
                        cell = (
                            key
                            | run_cell(agent, options.policy, task, kl_coef, seed, options.episodes, config)
                            | provenance()
                        )
                        with options.out.open("a") as file:
                            file.write(json.dumps(cell) + "\n")
                        print(
                            f"{agent} {task} {kl_coef:g} seed {seed}: {cell['normalised']:.4f} in {cell['seconds']:.0f} s",
                            file=sys.stderr,
                            flush=True,
                        )
                    cells.append(cell)
    print(as_markdown(cells))
    return 0


def run_cell(
    agent: str, policy: str, task: str, kl_coef: float, seed: int, episodes: int, config: dict[str, Any]
) -> dict[str, Any]:
    """Train once and measure exactly; returns the numbers."""
    envs = gym.make_vec(f"rlhf_gym/{task}-v0", num_envs=NUM_ENVS, kl_coef=kl_coef)
    solution = rlhf_gym.exact.solve(envs, kl_coef)
    # The budget is in episodes, an agent's in tokens: the optimal policy's mean length says how many that will be.
    total = int(episodes * mean_length(solution.policy, envs))
    module, _, name = AGENTS[agent].partition(":")
    start = time.perf_counter()
    learner = getattr(importlib.import_module(module), name)(envs, policy=policy, seed=seed, **config)
    learner.learn(total, callback=lambda who, _: who.num_updates * NUM_ENVS < episodes)
    seconds = time.perf_counter() - start
    found = rlhf_gym.exact.evaluate(learner, envs, kl_coef)
    return {
        "normalised": found.normalised, "objective": found.objective, "optimum": solution.objective, "reward": found.reward, "kl": found.kl,
        "regret": found.regret, "exact": found.exact, "standard_error": found.standard_error, "tokens": learner.num_timesteps, "seconds": seconds,
    }  # fmt: skip


def mean_length(policy: Any, envs: Any, num_episodes: int = 2048) -> float:
    """Mean response length of a policy in tokens, from samples with a fixed seed."""
    process = envs.unwrapped.process
    prompts = [process.prompts[i % len(process.prompts)].ids for i in range(num_episodes)]
    uniforms = np.random.default_rng(0).random((num_episodes, process.max_response_tokens), dtype=np.float32)
    import torch

    responses = generate(
        make_engine(policy, 256, process.max_tokens), prompts, max_response_tokens=process.max_response_tokens,
        eos_token_ids=process.eos_token_ids, uniforms=torch.from_numpy(uniforms), token_filter=process.token_filter,
    )  # fmt: skip
    return float(responses.response_mask.sum(1).double().mean())


def as_markdown(cells: list[dict[str, Any]]) -> str:
    """Mean normalised score over seeds with its 95 % Student interval, a row per agent and KL coefficient."""
    from scipy.stats import t

    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    lines = ["| agent | KL coefficient | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for agent in dict.fromkeys(cell["agent"] for cell in cells):
        for which, label in enumerate(("first (.1; Lexicon 2)", "second (.3; Lexicon 1)")):
            row = []
            for task in tasks:
                values = np.array(
                    [
                        c["normalised"]
                        for c in cells
                        if (c["agent"], c["task"], c["kl_coef"]) == (agent, task, TASKS[task][which])
                    ]
                )
                half = (
                    t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
                    if len(values) > 1
                    else math.nan
                )
                row.append(f"{values.mean():.4f} ± {half:.4f}")
            lines.append(f"| {agent} | {label} | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
