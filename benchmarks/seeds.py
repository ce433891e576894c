"""One ``rlhf-gym train`` command under several agents and seeds, as a table with intervals over the seeds.

    python -m rlhf_gym.benchmarks.seeds --agents ppo trpo --num-seeds 5 --out runs/stories -- \\
        --model DIR --prompts FILE.jsonl --reward file.py:function --kl-coef 0.1 --total-timesteps 250000

Everything after ``--`` goes to ``rlhf-gym train`` as it is. A cell (agent, seed) that has finished is not run again, so
an interrupted table goes on
where it was. Settings of one agent alone: ``--agent-config trpo:target_kl=0.02``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_gym.atomic import write_json
from rlhf_gym.cli import main as rlhf_gym_main

from .cells import write_figures


def main(argv: list[str] | None = None) -> int:
    """Run the cells that are missing, then print and write the table; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ours, train_flags = (arguments, []) if "--" not in arguments else _split(arguments)
    parser = argparse.ArgumentParser(prog="python -m rlhf_gym.benchmarks.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="+", default=["ppo"], help="names of rlhf-gym train --agent")
    parser.add_argument("--num-seeds", type=int, default=5, help="seeds 0, 1, ...")
    parser.add_argument(
        "--agent-config", nargs="*", default=[], metavar="AGENT:NAME=VALUE", help="settings of one agent"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--results", type=Path, help="JSON file for the table, for instance benchmarks/results/x.json")
    options = parser.parse_args(ours)

    cells = []
    for agent in options.agents:
        for seed in range(options.num_seeds):
            cell = run_cell(agent, seed, options.out / f"{agent}-{seed}", train_flags, options.agent_config)
            if cell is None:
                return 1
            cells.append(cell)
    table = {agent: summarise([c for c in cells if c["agent"] == agent]) for agent in options.agents}
    print(as_markdown(table))
    if options.results:
        write_figures(options.results, "seeds", arguments, {"table": table, "cells": cells})
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def run_cell(agent: str, seed: int, out: Path, flags: list[str], agent_config: list[str]) -> dict[str, Any] | None:
    """Train once unless that has been done; returns its evaluation, or None when the command failed."""
    done = out / "evaluation.json"
    if not done.exists():
        config = [item.partition(":")[2] for item in agent_config if item.startswith(f"{agent}:")]
        start = time.perf_counter()
        code = rlhf_gym_main(
            [
                "train",
                "--agent",
                agent,
                "--seed",
                str(seed),
                "--out",
                str(out),
                *flags,
                *(["--config", *config] if config else []),
            ]
        )
        if code:
            return None
        write_json(out / "seconds.json", time.perf_counter() - start)
    found = json.loads(done.read_text())
    return {"agent": agent, "seed": seed, "seconds": json.loads((out / "seconds.json").read_text()), **found}


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of each number after training, with a 95 % Student interval; before is the same for all seeds up
    to sampling."""
    from scipy.stats import t

    summary: dict[str, Any] = {"num_seeds": len(cells), "seconds": float(np.mean([cell["seconds"] for cell in cells]))}
    names = [name for name, value in cells[0]["after"].items() if isinstance(value, dict)]
    for when in ("before", "after"):
        for name in names:
            values = np.array([cell[when][name]["mean"] for cell in cells if cell[when].get(name)], dtype=float)
            if len(values) == 0:
                continue
            half = (
                t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
                if len(values) > 1
                else math.nan
            )
            summary[f"{when}/{name}"] = {
                "mean": values.mean(),
                "half_width": half,
                "min": values.min(),
                "max": values.max(),
            }
    return summary


def as_markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table: score before and after, KL and length after, seconds a run."""
    lines = [
        "| agent | score before | score after (95 % interval over seeds) | worst seed | KL, nats | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for agent, row in table.items():
        before, after = row["before/score"], row["after/score"]
        kl = row.get("after/kl", {"mean": math.nan})
        lines.append(
            f"| {agent} | {before['mean']:.3f} | {after['mean']:.3f} ± {after['half_width']:.3f} | {after['min']:.3f} | {kl['mean']:.2f} | "
            f"{row['after/length']['mean']:.1f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
