"""Agents on the tasks whose optimum is known: the normalised score of what they have learnt, with intervals over seeds.

    python -m rlhf_gym.benchmarks.known_answers --agents ppo --policy tabular --out benchmarks/results/known_answers.jsonl
    python -m rlhf_gym.benchmarks.known_answers --table benchmarks/results/known_answers.jsonl

One JSON line per finished cell (agent, policy, task, kl_coef, seed); a cell that is there is not run again, so the same
command goes on after a kill. The second command measures nothing. 1 is optimal, 0 the reference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import rlhf_gym
from rlhf_gym.agents import AGENTS
from rlhf_gym.exact import POLICY_KINDS
from rlhf_gym.lm import generate, make_engine

from .cells import append_cell, mean_and_half_width, provenance, read_cells
from .contestants import load_agent
from .processes import run_cells
from .suites import EXACT, exact_metrics, make_policy

TASKS = {name: task.kl_coefs for name, task in EXACT.items()}
COLUMNS = (".1 (Lexicon 2)", ".3 (Lexicon 1)")


def main(argv: list[str] | None = None) -> int:
    """Run the missing cells and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.known_answers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--agents", nargs="+", default=["ppo"], choices=sorted(AGENTS))
    parser.add_argument("--policy", default="tabular", choices=POLICY_KINDS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=51_200)
    parser.add_argument("--num-envs", type=int, default=256, help="rows of the environment")
    parser.add_argument("--config", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the agents, in JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, one thread each")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="JSON lines, appended to")
    where.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file and measure nothing")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs must be >= 1, got {options.jobs}")
    try:
        done = read_cells(options.table or options.out)
        config = dict(map(read_setting, options.config))
    except ValueError as error:
        parser.error(str(error))
    if options.table:
        if not done:
            parser.error(f"{options.table} holds no cells; measure some with --out")
        print(as_markdown(done))
        return 0

    keys = [
        {"agent": agent, "policy": options.policy, "task": task, "kl_coef": kl_coef, "seed": seed,
         "episodes": options.episodes, "num_envs": options.num_envs, "config": config}
        for agent in options.agents for task in options.tasks for kl_coef in TASKS[task]
        for seed in range(options.num_seeds)
    ]  # fmt: skip
    found = [next((cell for cell in done if key.items() <= cell.items()), None) for key in keys]
    missing = [key for key, cell in zip(keys, found, strict=True) if cell is None]
    measured, start = [], time.perf_counter()
    for key, result in run_cells(run_cell, missing, options.jobs):
        measured.append(key | result | provenance())
        append_cell(options.out, measured[-1])
        print(progress_line(measured, len(missing), time.perf_counter() - start), file=sys.stderr, flush=True)
    print(as_markdown([cell for cell in found if cell] + measured))
    return 0


def read_setting(item: str) -> tuple[str, Any]:
    """``learning_rate=0.02`` as a name and a value.

    Raises:
        ValueError: If the value is not JSON.
    """
    name, _, value = item.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(
            f"--config takes NAME=VALUE with a value in JSON (text in double quotes), got {item!r}"
        ) from None


def progress_line(measured: Sequence[dict[str, Any]], total: int, seconds: float) -> str:
    """What has been found last, and how long the rest will take if it goes on like this."""
    cell, left = measured[-1], seconds / len(measured) * (total - len(measured))
    return (
        f"[{len(measured)}/{total}, {left / 60:.0f} min left] {cell['agent']} {cell['policy']} {cell['task']} "
        f"{cell['kl_coef']:g} seed {cell['seed']}: {cell['normalised']:.4f} in {cell['seconds']:.0f} s"
    )


def run_cell(
    agent: str, policy: str, task: str, kl_coef: float, seed: int, episodes: int, num_envs: int, config: dict[str, Any]
) -> dict[str, Any]:
    """Train once and measure exactly; returns the numbers."""
    envs = gym.make_vec(f"rlhf_gym/{task}-v0", num_envs=num_envs, kl_coef=kl_coef)
    solution = rlhf_gym.exact.solve(envs, kl_coef)
    # The budget is in episodes, an agent's in tokens: the optimal policy's mean length says how many that will be.
    total = int(episodes * mean_length(solution.policy, envs))
    start = time.perf_counter()
    learner = load_agent(agent)(envs, policy=make_policy(envs, policy, seed), seed=seed, **config)
    per_update = num_envs * getattr(learner.config, "num_rounds", 1)
    learner.learn(total, callback=lambda who, _: who.num_updates * per_update < episodes)
    seconds = time.perf_counter() - start
    found = rlhf_gym.exact.evaluate(learner, envs, kl_coef)
    references = solution.reference_objectives
    by_prompt = (found.objectives - references) / (solution.objectives - references)
    prompts = [prompt.text for prompt in envs.unwrapped.process.prompts]
    return {
        **exact_metrics(found),
        "normalised_by_prompt": dict(zip(prompts, by_prompt.tolist(), strict=True)) if len(prompts) > 1 else None,
        "tokens": learner.num_timesteps, "seconds": seconds,
    }  # fmt: skip


def mean_length(policy: Any, envs: Any, num_episodes: int = 2048) -> float:
    """Mean response length of a policy in tokens, from samples with a fixed seed."""
    process = envs.unwrapped.process
    prompts = [process.prompts[i % len(process.prompts)].ids for i in range(num_episodes)]
    uniforms = np.random.default_rng(0).random((num_episodes, process.max_response_tokens), dtype=np.float32)
    responses = generate(
        make_engine(policy, 256, process.max_tokens), prompts, max_response_tokens=process.max_response_tokens,
        eos_token_ids=process.eos_token_ids, uniforms=torch.from_numpy(uniforms), token_filter=process.token_filter,
    )  # fmt: skip
    return float(responses.response_mask.sum(1).double().mean())


def as_markdown(cells: Sequence[dict[str, Any]]) -> str:
    """The tables: normalised score, a row per agent, policy, settings, budget and KL coefficient; and per prompt."""
    tasks = [task for task in TASKS if any(cell["task"] == task for cell in cells)]
    rows, by_prompt = [], []
    for label, group in runs_of(cells):
        for which, coefficient in enumerate(COLUMNS):
            row = [c for c in group if c["kl_coef"] == TASKS[c["task"]][which]]
            if not row:
                continue
            values = [[c["normalised"] for c in row if c["task"] == task] for task in tasks]
            seconds = np.mean([c["seconds"] for c in row])
            rows.append([label, coefficient, *map(as_entry, values), f"{seconds:.0f}"])
            prompts = [c["normalised_by_prompt"] for c in row if c.get("normalised_by_prompt")]
            if prompts:
                by_prompt.append([label, coefficient, *(as_entry([p[name] for p in prompts]) for name in prompts[0])])
                names = list(prompts[0])
    tables = [
        "Normalised score: mean ± half of the 95 % interval over seeds, the worst seed in brackets. Seconds: mean of a "
        "run.",
        _table(["agent", "KL coefficient", *tasks, "seconds"], rows),
    ]
    if by_prompt:
        tables += ["Difficulty, prompt by prompt:", _table(["agent", "KL coefficient", *names], by_prompt)]
    return "\n\n".join(tables)


def runs_of(cells: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Cells by agent, policy, settings and budget, each with what a table says of it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        settings = "".join(f", {name}={value}" for name, value in sorted(cell["config"].items()))
        label = f"{cell['agent'].upper()}, {cell['policy']}{settings}, {cell['episodes']:,} episodes"
        label += f" in {cell['num_envs']} rows" if "num_envs" in cell else ""
        groups.setdefault(label, []).append(cell)
    return list(groups.items())


def as_entry(values: Sequence[float]) -> str:
    """``.9996 ± .0004 (.9991)``, and the number of seeds where it is not five."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f} (1 seed)"
    mean, half = mean_and_half_width(values)
    seeds = "" if len(values) == 5 else f", {len(values)} seeds"
    return f"{mean:.4f} ± {half:.4f} ({min(values):.4f}{seeds})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
