"""Where agents whose objective is another one must end on the tasks with known answers, beside where they have ended.

    python -m rlhf_gym.benchmarks.predictions --results benchmarks/results/exact --longer benchmarks/results/exact_grpo \\
        --out benchmarks/results/predictions.json

No sampling and no training: the benchmark's own tasks, in about a minute and a half on one core. GRPO as published has a
fixed point (`.grpo_by_states`, with the settings of the benchmark). Others have only a limit, since they know nothing
of the KL: online DPO with hard labels and expert iteration the reference restricted to its best responses (the optimum
for kl_coef -> 0), Q-learning the greedy policy, which chooses among equally good tokens as the reference does. How fast
a limit is come to is another matter: what was reached is the budget's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_gym.agents.grpo import GRPOConfig
from rlhf_gym.exact import Evaluation, Solution, solve
from rlhf_gym.exact.graph import SCORE
from rlhf_gym.exact.solve import with_future

from .cells import mean_and_half_width, read_cells, write_figures
from .fixed_points import follow, measure
from .grpo_by_states import expected_gradient, make_states
from .suites import EXACT, SUITES, make_envs
from .tuning import preset

MEASURES = {"normalised": "normalised", "score": "reward", "kl": "kl"}  # our names, and a cell's
# The way to the fixed point is looked at after so many steps of the expected natural gradient.
LOOKS = (100, 300, 1000)
# Small enough that nothing but the highest score counts: that of the next best is worth e^-200 at most.
NEXT_TO_NOTHING = 1e-3


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and write them where asked to; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.predictions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tasks", nargs="+", default=list(EXACT), choices=list(EXACT))
    parser.add_argument("--results", type=Path, required=True, help="directory of `rlhf-gym benchmark --suite exact`")
    parser.add_argument("--longer", type=Path, help="another one, of GRPO with more tokens")
    parser.add_argument("--out", type=Path, help="JSON file for the tables, for instance benchmarks/results/x.json")
    options = parser.parse_args(argv)
    runs = read_cells(options.results / "results.jsonl")
    longer = read_cells(options.longer / "results.jsonl") if options.longer else []
    cells = []
    for task in options.tasks:
        for kl_coef in EXACT[task].kl_coefs:
            cells.append(predict(task, kl_coef) | reached(runs, longer, task, kl_coef))
            print(f"{task} {kl_coef:g}", file=sys.stderr)
    print(as_markdown(cells))
    if options.out:
        write_figures(options.out, "predictions", argv, {"cells": cells})
    return 0


def predict(task: str, kl_coef: float) -> dict[str, Any]:
    """The three ends on one task; ``way`` has points on the way to GRPO's."""
    envs = make_envs(SUITES["exact"], task, 8)
    states = make_states(envs, kl_coef, GRPOConfig(**preset("grpo", "tabular")))
    gradient_at, residual, way = partial(expected_gradient, states), torch.zeros_like(states.reference), {}
    # Over drawn groups the gradient has small jumps, at which the policy would go to and fro.
    tolerance = 1e-9 if all(prompt.is_exact for prompt in states.prompts) else 1e-7
    step, done = 1 / max(1.0, kl_coef), 0
    for look in (*LOOKS, 5000):
        found = follow(gradient_at, residual, step=step, tolerance=tolerance, max_iterations=look - done)
        residual, done = found.residual, look
        if look in LOOKS:
            way[str(look)] = _measures(measure(states, residual))
    solution = states.solution
    restricted = solve(envs, NEXT_TO_NOTHING)
    return {
        "task": task, "kl_coef": kl_coef, "optimum": solution.objective, "reference": solution.reference_objective,
        "grpo": _measures(measure(states, residual)), "way": way,
        "gradient_norm": found.gradient_norm, "converged": found.converged,
        "restricted": _scaled(solution, restricted.reward, restricted.kl),
        "greedy": _scaled(solution, *greedy(solution)),
    }  # fmt: skip


def _measures(found: Evaluation) -> dict[str, float]:
    return {name: getattr(found, key) for name, key in MEASURES.items()}


def _scaled(solution: Solution, score: float, kl: float) -> dict[str, float]:
    room = solution.objective - solution.reference_objective
    gained = score - solution.kl_coef * kl - solution.reference_objective
    return {"normalised": gained / room, "score": score, "kl": kl}


def greedy(solution: Solution) -> tuple[float, float]:
    """Score and KL of the policy that takes a token of the highest score to come, and the reference's choice of these."""
    graph = solution.graph
    best = [np.zeros_like(layer) for layer in solution.values]
    kls = [np.zeros_like(layer) for layer in solution.values]
    for t in reversed(range(len(graph.layers))):
        layer = graph.layers[t]
        scores = with_future(graph, t, layer.payoffs[SCORE], best)
        scores = np.where(layer.ref_logprobs > -np.inf, scores, -np.inf)
        best[t] = scores.max(1)
        chosen = np.where(scores > best[t][:, None] - 1e-6, np.exp(layer.ref_logprobs), 0.0)
        total = chosen.sum(1)
        future = with_future(graph, t, np.zeros_like(scores), kls)
        kls[t] = (chosen * future).sum(1) / total - np.log(total)
    return float(best[0][graph.roots].mean()), float(kls[0][graph.roots].mean())


def reached(
    runs: Sequence[dict[str, Any]], longer: Sequence[dict[str, Any]], task: str, kl_coef: float
) -> dict[str, Any]:
    """What the runs of tables have come to: of each measure the mean and half of its 95 % interval over seeds."""
    place = (task, kl_coef, "tabular", "ok")

    def ends(cells: Sequence[dict[str, Any]], agent: str) -> dict[str, Any] | None:
        some = [c for c in cells if c["agent"] == agent]
        mine = [c["metrics"] for c in some if (c["task"], c["kl_coef"], c["policy"], c["status"]) == place]
        if not mine:
            return None
        spread = {name: mean_and_half_width([m[key] for m in mine]) for name, key in MEASURES.items()}
        return {"seeds": len(mine), "tokens": mine[0]["tokens"], **spread}

    agents = ("grpo", "online-dpo", "expert-iteration", "q-learning")
    return {"reached": {agent: ends(runs, agent) for agent in agents}, "longer": ends(longer, "grpo")}


def as_markdown(cells: Sequence[dict[str, Any]]) -> str:
    """GRPO's fixed points, and the limits of the others."""
    lines = [
        "| task, KL coefficient | normalised score: fixed point | reached | with 2.4 million tokens | "
        "mean score: fixed point | reached | KL: fixed point | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        point, mine, more = cell["grpo"], cell["reached"]["grpo"], cell["longer"]
        lines.append(
            f"| {_name(cell)} | {_digits(point['normalised'])} | {_spread(mine, 'normalised')} | "
            f"{_digits(more['normalised'][0]) if more else ''} | {_digits(point['score'])} | {_spread(mine, 'score')} | "
            f"{_digits(point['kl'])} | {_spread(mine, 'kl')} |"
        )
    lines += [
        "",
        "| task, KL coefficient | the reference, on its best responses | online DPO, hard labels | expert iteration, best "
        "| the greedy policy | Q-learning |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        found = cell["reached"]
        entries = [_end(cell["restricted"]), _ends(found["online-dpo"]), _ends(found["expert-iteration"])]
        lines.append(
            " | ".join([f"| {_name(cell)}", *entries, _end(cell["greedy"]), f"{_ends(found['q-learning'])} |"])
        )
    return "\n".join(lines)


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['task']}, {_short(cell['kl_coef'])}"


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0") or "0"


def _digits(number: float, places: int = 4) -> str:
    """No zero before the point, as in the other tables, and no minus before a zero."""
    text = f"{round(number, places) + 0.0:.{places}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _spread(found: dict[str, Any] | None, name: str) -> str:
    return "" if found is None else f"{_digits(found[name][0])} ± {_digits(found[name][1])}"


def _end(found: dict[str, float]) -> str:
    return f"{_digits(found['normalised'], 3)} ({_digits(found['score'], 3)}, {_digits(found['kl'], 2)})"


def _ends(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    (normalised, half), (score, _), (kl, _) = (found[name] for name in MEASURES)
    return f"{_digits(normalised, 3)} ± {_digits(half, 3)} ({_digits(score, 3)}, {_digits(kl, 2)})"


if __name__ == "__main__":
    sys.exit(main())
