"""The picture of the known answers: mean score against KL, the best that is possible, best-of-N, and where agents end.

    python -m rlhf_gym.benchmarks.frontier --results benchmarks/results/known_answers.jsonl \\
        --out docs/images/frontier.png
    python -m rlhf_gym.benchmarks.frontier --goodhart docs/images/goodhart.png

Curves are exact, and so are the agents' end points where ``exact`` is true in the results. 10 seconds on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from rlhf_gym.exact import BestOfN, Frontier, best_of_n, frontier, solve
from rlhf_gym.plots import STYLES

from .cells import read_cells
from .known_answers import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As multiples of the task's smaller coefficient: from nearly free of KL to nearly at the reference.
PRICES = np.geomspace(0.2, 300, 240)
# Between whole numbers, too, F^N is the distribution function of a policy; the dots are the powers of two.
NS = np.geomspace(1, 256, 16 * 8 + 1)
FRONTIER: dict[str, Any] = {"color": "black", "linewidth": 1.6, "zorder": 3}
BEST_OF_N: dict[str, Any] = {"color": "#E69F00", "linestyle": (0, (5, 1.5)), "linewidth": 1.8, "zorder": 4}
BOUND: dict[str, Any] = {"color": "#999999", "linestyle": ":", "linewidth": 1.4, "zorder": 2}
GOLD: dict[str, Any] = {"color": "#56B4E9", "linestyle": "-.", "linewidth": 1.8, "zorder": 3}
RING: dict[str, Any] = {
    "color": "black",
    "marker": "o",
    "markersize": 10,
    "fillstyle": "none",
    "linestyle": "none",
    "zorder": 5,
}
PEAK: dict[str, Any] = {"color": "black", "marker": "v", "markersize": 5, "zorder": 6}
REFERENCE: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 10, "linestyle": "none", "zorder": 6}


@dataclass(frozen=True)
class Curves:
    """What is known about a task.

    Attributes:
        frontier: At `PRICES` times the smaller of the table's coefficients.
        marked: At the table's coefficients.
        best_of_n: For N in `NS`.
        reference: Mean score of the reference.
    """

    frontier: Frontier
    marked: Frontier
    best_of_n: BestOfN
    reference: float


def curves_of(task: str, coefficients: Sequence[float] | None = None) -> Curves:
    """The curves of a registered task, one of `TASKS`; marked at its coefficients there, or at those that are given."""
    env, coefficients = gym.make(f"rlhf_gym/{task}-v0"), coefficients or TASKS[task]
    reference = solve(env, coefficients[0]).reference_objective
    prices = PRICES * min(coefficients)
    return Curves(frontier(env, prices.tolist()), frontier(env, coefficients), best_of_n(env, NS.tolist()), reference)


def popular_bound(n: np.ndarray) -> np.ndarray:
    """log N - (N - 1) / N: what the KL of best-of-N is often said to be; it is that only without ties."""
    return np.log(n) - (n - 1) / n


def longest_runs(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cells by agent and policy ("PPO, tabular"), of each task and coefficient only those with the most episodes."""

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return cell["agent"], cell["policy"], cell["task"], cell["kl_coef"]

    most: dict[tuple[Any, ...], int] = {}
    for cell in cells:
        most[key(cell)] = max(most.get(key(cell), 0), cell["episodes"])
    runs: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["episodes"] == most[key(cell)]:
            runs.setdefault(f"{cell['agent'].upper()}, {cell['policy']}", []).append(cell)
    return runs


def picture(cells: Sequence[dict[str, Any]], tasks: Sequence[str] = tuple(TASKS)) -> Figure:
    """A panel for each task, three in a row, with one legend below.

    Args:
        cells: Of `rlhf_gym.benchmarks.known_answers`; there may be none.
        tasks: Names of the tasks.
    """
    from matplotlib.figure import Figure

    num_columns = min(3, len(tasks))
    num_rows = -(-len(tasks) // num_columns)
    figure = Figure(figsize=(3.9 * num_columns, 3.1 * num_rows + 0.6), layout="constrained")
    runs = longest_runs(cells)
    for i, task in enumerate(tasks):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        curves = curves_of(task)
        ends = {label: [cell for cell in group if cell["task"] == task] for label, group in runs.items()}
        draw_task(axes, curves, max((cell["kl"] for group in ends.values() for cell in group), default=0.0))
        for j, (label, group) in enumerate(ends.items()):
            # Smaller and smaller: where all have reached the optimum, each is seen within the one before.
            draw_ends(axes, curves.marked, group, label, STYLES[j % len(STYLES)] | {"markersize": max(3.5, 7 - j)})
        axes.set_title(task, fontsize=11, fontweight="bold")
        if i % num_columns == 0:
            axes.set_ylabel("mean score of a response")
        if i >= len(tasks) - num_columns:
            axes.set_xlabel("KL to the reference (nats per response)")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    labels = sorted(handles, key=lambda label: label in runs)  # the agents last
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def draw_task(axes: Axes, curves: Curves, furthest: float) -> None:
    """Everything about a task but the agents, whose KL goes up to ``furthest``."""
    known, marked, best = curves.frontier, curves.marked, curves.best_of_n
    right = 1.1 * max(marked.kl.max(), min(best.kl.max(), known.kl.max()), furthest)
    # From the reference, which no finite price comes to, to the edge of the panel, where the frontier may be flat.
    inside = known.kl[::-1] <= right
    kl = np.concatenate([[0.0], known.kl[::-1][inside], [right]])
    reward = np.concatenate([[curves.reference], np.interp(kl[1:], known.kl[::-1], known.reward[::-1])])
    gold = {name: values[::-1][inside] for name, values in known.metrics.items()}
    lowest = min([curves.reference, *(values.min() for values in gold.values())])
    height = reward[-1] - lowest
    bottom, top = lowest - 0.06 * height, reward[-1] + 0.16 * height
    axes.plot([0], [curves.reference], label="reference", clip_on=False, **REFERENCE)
    axes.plot(kl, reward, label="frontier (exact)", **FRONTIER)
    axes.plot(marked.kl, marked.reward, label="optimum at a KL coefficient β", **RING)
    for kl_coef, x, y in zip(marked.kl_coef, marked.kl, marked.reward, strict=True):
        text = f"β = {kl_coef:g}".replace("0.", ".")
        axes.annotate(text, (x, y), (2, 9), textcoords="offset points", ha="right", fontsize=8)
    axes.fill_between(kl, reward, top, color="0.93", linewidth=0, label="beyond any policy's reach")
    axes.plot(best.kl, best.reward, label="best-of-N, N = 1 to 256 (exact)", **BEST_OF_N)
    powers = np.log2(NS) % 1 == 0
    axes.plot(best.kl[powers], best.reward[powers], ".", color=BEST_OF_N["color"], markersize=6, zorder=4)
    axes.plot(popular_bound(NS), best.reward, label="the same with KL log N - (N-1)/N", **BOUND)
    for values in gold.values():
        peak = int(values.argmax())
        x, y = kl[1 + peak], values[peak]
        axes.plot(kl[1:-1], values, label="gold score on the frontier", **GOLD)
        axes.plot(x, y, **PEAK)
        axes.annotate(f"gold is best\nat KL {x:.2f}", (x, y), (-6, -26), textcoords="offset points", fontsize=8)
    axes.set(xlim=(-0.02 * right, right), ylim=(bottom, top))
    axes.grid(alpha=0.25)


def draw_ends(axes: Axes, optima: Frontier, cells: Sequence[dict[str, Any]], label: str, style: dict[str, Any]) -> None:
    """Where the seeds of an agent ended, each with a thin line to the optimum that it was after."""
    for cell in cells:
        goal = int(np.flatnonzero(optima.kl_coef == cell["kl_coef"])[0])
        line = [cell["kl"], optima.kl[goal]], [cell["reward"], optima.reward[goal]]
        axes.plot(*line, color=style["color"], linewidth=0.7, zorder=6)
    axes.plot(
        [cell["kl"] for cell in cells], [cell["reward"] for cell in cells], label=label, color=style["color"],
        marker=style["marker"], markersize=style["markersize"], markeredgecolor="white", markeredgewidth=0.5,
        linestyle="none", zorder=7,
    )  # fmt: skip


def goodhart_picture() -> Figure:
    """Proxy and gold of the Goodhart task along the frontier, with the gold's peak."""
    from matplotlib.figure import Figure

    curves = curves_of("Goodhart").frontier
    gold = curves.metrics["gold"]
    peak = int(gold.argmax())
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curves.kl, curves.reward, label="proxy: what is paid for", **FRONTIER)
    axes.plot(curves.kl, gold, label="gold: what was meant", **GOLD)
    axes.plot(curves.kl[peak], gold[peak], **PEAK)
    axes.annotate(
        f"gold is best at a KL of {curves.kl[peak]:.2f} nats",
        (curves.kl[peak], gold[peak]), (-4, 9), textcoords="offset points", fontsize=9,
    )  # fmt: skip
    axes.set(xlabel="KL to the reference (nats per response)", ylabel="mean score of a response", xlim=(0, 4))
    axes.set_ylim(-1.5, 4.6)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Draw what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_gym.benchmarks.frontier", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="end points of agents, from rlhf_gym.benchmarks.known_answers")
    parser.add_argument("--out", type=Path, help="PNG or SVG with a panel per task")
    parser.add_argument("--goodhart", type=Path, metavar="FILE", help="PNG or SVG of the Goodhart task alone")
    options = parser.parse_args(argv)
    if not (options.out or options.goodhart):
        parser.error("nothing to draw: give --out, --goodhart or both")
    try:
        cells = read_cells(options.results) if options.results else []
    except ValueError as error:
        parser.error(str(error))
    if options.results and not cells:
        parser.error(f"{options.results} holds no cells; measure some with rlhf_gym.benchmarks.known_answers")
    if options.out:
        picture(cells).savefig(options.out, dpi=130)
    if options.goodhart:
        goodhart_picture().savefig(options.goodhart, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
