"""What popular estimators of the policy gradient converge to, exactly: the regret of their fixed points.

    python -m rlhf_gym.benchmarks.estimators --out benchmarks/results/estimators.json --figure docs/images/estimators.png

No sampling and no tuning: the agents' own loss functions, in expectation over all responses (`.fixed_points`). What is
left at the fixed point is not noise but another objective. It takes about a minute on one core. Why they differ:

* KL in the reward, k1: the gradient of the objective itself. A weight of 1/length does no harm while the advantages are
  taken over a baseline: at the optimum every response has the same score minus KL, and all advantages are 0.
* KL in the reward, full: a reward acts on the tokens before it, and a state's full KL is the same whichever token is
  drawn there. So what a token does to the KL of its own state goes missing; with the full KL in the loss as well that
  part is back, and the sum is exact.
* KL in the reward, k3: in each state the policy goes down KL(pi || pi_ref), as it should, and *up* KL(pi_ref || pi),
  which has no end. A rare token is punished, so it becomes rarer.
* KL in the loss: see `rlhf_gym.agents.functional.kl_in_loss`.
* The mean of a group that contains the response itself makes advantages smaller by (n - 1) / n, and so the KL in the
  loss dearer; the leave-one-out mean does not.
* Divided by the group's std, a binary score p turns into 2 arcsin sqrt(p) in large groups, whose slope at p = 1 is
  infinite. With a KL coefficient of .3 nothing stops the policy before p = 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.exact import ngram_from_table
from rlhf_gym.plots import STYLES

from .cells import write_figures
from .fixed_points import Estimator, Task, fixed_point, make_task, measure, unregularised_regrets

EOS = "<eos>"
# The second Brackets is the first with the probabilities of the two brackets exchanged. The chance of a balanced
# response, and with it the optimum, is the same; what an estimator with another objective makes of it is not.
TASKS: dict[str, Callable[[], Any]] = {
    "WoAiNi": lambda: gym.make("rlhf_gym/WoAiNi-v0"),
    "Brackets": lambda: gym.make("rlhf_gym/Brackets-v0", max_response_tokens=8),
    "Brackets, ) likelier": lambda: gym.make(
        "rlhf_gym/Brackets-v0",
        max_response_tokens=8,
        model=ngram_from_table({"": {"(": 0.35, ")": 0.45, EOS: 0.2}}, eos=EOS),
    ),
    "Recall, 3 words": lambda: gym.make("rlhf_gym/Recall-v0", max_response_tokens=6, num_states=3),
}

_DR_GRPO: dict[str, Any] = {"advantages": "group", "baseline": "group_mean"}
_GRPO: dict[str, Any] = {"advantages": "group", "baseline": "group_mean", "divide_by_std": True}
_K2: dict[str, Any] = {"kl_loss": ("k2", "sequence")}
_K3: dict[str, Any] = {"kl_loss": ("k3", "token")}
ESTIMATORS: dict[str, list[Estimator]] = {
    "KL in the reward": [
        Estimator("k1, reward-to-go (REINFORCE)", kl_reward="k1"),
        Estimator("k1, GAE .95, exact critic, token mean (PPO)", kl_reward="k1", advantages="gae", mode="token_mean"),
        Estimator("k1, leave-one-out (RLOO)", kl_reward="k1", advantages="group"),
        Estimator("k1, leave-one-out, 1/length", kl_reward="k1", advantages="group", mode="sequence_mean"),
        Estimator("k1, minus the mean of groups of 8 (Dr. GRPO)", kl_reward="k1", group_size=8, mode="constant", **_DR_GRPO),
        Estimator("k1, no baseline, 1/length", kl_reward="k1", mode="sequence_mean"),
        Estimator("full KL and, per token, in the loss", kl_reward="exact", kl_loss=("exact", "token")),
        Estimator("full KL", kl_reward="exact"),
        Estimator("k3", kl_reward="k3"),
    ],
    "KL in the loss": [
        Estimator("k2 per sequence", kl_loss=("k2", "sequence")),
        Estimator("k2 per token", kl_loss=("k2", "token")),
        Estimator("full KL per token", kl_loss=("exact", "token")),
        Estimator("k3 per token", kl_loss=("k3", "token")),
        Estimator("k3 per sequence", kl_loss=("k3", "sequence")),
        Estimator("k1", kl_loss=("k1", "token")),
    ],
    "group advantages, k2 per sequence": [
        Estimator("leave-one-out, groups of 8", advantages="group", group_size=8, **_K2),
        Estimator("minus the mean of groups of 8", advantages="group", group_size=8, baseline="group_mean", **_K2),
        Estimator("the same, divided by their std", group_size=8, **_GRPO, **_K2),
        Estimator("divided by the std of groups of 1024", group_size=1024, **_GRPO, **_K2),
    ],
    "group advantages, k3 per token": [
        Estimator("GRPO as published: std of 8, 1/length", group_size=8, mode="sequence_mean", **_GRPO, **_K3),
        Estimator("DAPO: std of 8, token mean", group_size=8, mode="token_mean", **_GRPO, **_K3),
        Estimator("the same without groups of equals", group_size=8, mode="token_mean", dynamic_sampling=True, **_GRPO, **_K3),
        Estimator("Dr. GRPO: mean of 8, no std, constant", group_size=8, mode="constant", **_DR_GRPO, **_K3),
    ],
}  # fmt: skip
NOT_REGULARISED = ("KL in the loss", "k1")
MANY_FIXED_POINTS = (("KL in the reward", "full KL"), NOT_REGULARISED)


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write it and its picture where asked to; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.estimators", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--kl-coef", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="JSON file for the table, for instance benchmarks/results/x.json")
    parser.add_argument("--figure", type=Path, help="PNG file for the picture")
    options = parser.parse_args(argv)
    cells, tasks = [], []
    for name in options.tasks:
        task = make_task(TASKS[name](), options.kl_coef)
        tasks.append(describe(name, task))
        for family, estimators in ESTIMATORS.items():
            cells += [run_cell(name, task, family, estimator) for estimator in estimators]
    print(as_markdown(tasks, cells))
    if options.out:
        settings = {family: [asdict(estimator) for estimator in rows] for family, rows in ESTIMATORS.items()}
        found = {"tasks": tasks, "estimators": settings, "cells": cells}
        write_figures(options.out, "estimators", argv, found)
    if options.figure:
        draw(tasks, cells).savefig(options.figure, dpi=150)
    return 0


def describe(name: str, task: Task) -> dict[str, Any]:
    """What the fixed points of a task are held against."""
    solution = task.solution
    lowest, highest = unregularised_regrets(task)
    return {
        "task": name,
        "max_response_tokens": task.mask.shape[1],
        "kl_coef": solution.kl_coef,
        "optimum": solution.objective,
        "reference_regret": solution.objective - solution.reference_objective,
        "unregularised_regrets": [lowest, highest],
    }


def run_cell(name: str, task: Task, family: str, estimator: Estimator) -> dict[str, Any]:
    """Follow one estimator on one task; returns the numbers."""
    found = fixed_point(task, estimator)
    there = measure(task, found.residual)
    return {
        "task": name, "family": family, "estimator": estimator.name, "regret": there.regret,
        "normalised": there.normalised, "reward": there.reward, "kl": there.kl, "gradient_norm": found.gradient_norm,
        "iterations": found.iterations, "converged": found.converged,
    }  # fmt: skip


def as_markdown(tasks: list[dict[str, Any]], cells: list[dict[str, Any]]) -> str:
    """Regret and, in brackets, the normalised score of each fixed point: a row per estimator."""
    by_key = {(cell["family"], cell["estimator"], cell["task"]): cell for cell in cells}
    header = [f"{task['task']} (J* {task['optimum']:.3f})" for task in tasks]
    lines = ["| estimator | " + " | ".join(header) + " |", "|---|" + "---|" * len(tasks)]
    for family, estimators in ESTIMATORS.items():
        lines.append(f"| **{family}** |" + " |" * len(tasks))
        for estimator in estimators:
            row = [by_key[family, estimator.name, task["task"]] for task in tasks]
            numbers = [f"{_unsigned(c['regret'])} ({_unsigned(c['normalised'])})" for c in row]
            lines.append(f"| {estimator.name}{mark(row)} | " + " | ".join(numbers) + " |")
    lengths = ", ".join(f"{task['task']} {task['max_response_tokens']}" for task in tasks)
    ranges = "; ".join("{} {:.3f} to {:.3f}".format(t["task"], *t["unregularised_regrets"]) for t in tasks)
    return "\n".join(
        [
            *lines,
            "",
            "Regret J* - J of the fixed point and, in brackets, its normalised score: 1 is optimal, 0 the reference. "
            f"KL coefficient {tasks[0]['kl_coef']:g}. Longest response, tokens: {lengths}.",
            "",
            "† Many fixed points; shown is the one that the natural gradient comes to from the reference. The full KL in "
            "the reward leaves the choice between equally good tokens free. k1 in the loss does not regularise at all: "
            f"every policy that earns the most is a fixed point, with a regret of: {ranges}.",
            "",
            "‡ No fixed point: the gradient does not vanish while one token after the other is given up. Shown is the "
            "regret where this leads.",
        ]
    )


def _unsigned(number: float) -> str:
    """Three decimals, and no -0.000."""
    return f"{round(number, 3) + 0.0:.3f}"


def mark(row: list[dict[str, Any]]) -> str:
    """The remark that a row needs: see the end of `as_markdown`."""
    if (row[0]["family"], row[0]["estimator"]) in MANY_FIXED_POINTS:
        return " †"
    return "" if all(cell["converged"] for cell in row) else " ‡"


def draw(tasks: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Any:
    """Regret of each fixed point, a panel per task; the dashed line is the regret of not training at all."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    names = [(family, estimator.name) for family, estimators in ESTIMATORS.items() for estimator in estimators]
    figure = Figure(figsize=(3.6 + 1.6 * len(tasks), 5.4), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        own = {(cell["family"], cell["estimator"]): cell for cell in cells if cell["task"] == task["task"]}
        for style, family in zip(STYLES, ESTIMATORS, strict=True):
            places = [place for place, (which, _) in enumerate(names) if which == family]
            regrets = [max(own[names[place]]["regret"], 0.0) for place in places]
            points = {"marker": style["marker"], "color": style["color"], "zorder": 3}
            axis.hlines(places, 0, regrets, color=style["color"], linewidth=2)
            axis.plot(regrets, places, linestyle="", label=family, clip_on=False, **points)
        span = task["unregularised_regrets"]
        all_of_k1 = {"color": "black", "linestyle": ":", "linewidth": 1.5, "label": "fixed points of k1 in the loss"}
        axis.hlines(names.index(NOT_REGULARISED), *span, **all_of_k1)
        axis.axvline(task["reference_regret"], color="black", linewidth=1, linestyle="--", label="not training")
        axis.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        axis.set(xlim=(-0.002, 5), xlabel="regret J* - J", xticks=[0, 0.01, 0.1, 1])
        axis.set_xticklabels(["0", ".01", ".1", "1"])
        axis.set_title(f"{task['task']}\nJ* = {task['optimum']:.3f}", fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    marks = [mark([c for c in cells if (c["family"], c["estimator"]) == key]) for key in names]
    axes[0].set_yticks(range(len(names)), [name + sign for (_, name), sign in zip(names, marks, strict=True)])
    axes[0].invert_yaxis()
    axes[0].set_ylabel("estimator")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
