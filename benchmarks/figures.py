"""Pictures of many agents in one table, without a legend of twenty colours.

Curves stand in small panels, one for each agent, with all the others in grey behind; rows and end points carry their
names. Colours are Okabe and Ito's and never the only sign.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_gym.plots import STYLES

from .outcomes import Run, Suite
from .statistics import Estimate, bootstrap, improvement, iqm, profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, Estimate]  # places, and what is found there
BLUE, ORANGE = STYLES[0]["color"], STYLES[1]["color"]
OTHERS: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
# Curves and pairs are many; their intervals need not be known to the last digit.
NUM_RESAMPLES = 500
NUM_POINTS = 41
LOWEST = -0.5  # scores below it stand at the edge: one agent that diverged must not squash the others
# Inches of a small panel, by how many are in a row.
PANELS = {1: (4.6, 2.5), 2: (4.4, 2.3), 3: (3.0, 1.9), 4: (2.28, 1.4)}
SMALLEST = 1e-6  # of the distance from the optimum; below it is rounding


def score_name(suite: Suite) -> str:
    """What a score of this suite is, for an axis."""
    return "score (0 reference, 1 best here)" if suite.relative else "normalised score (0 reference, 1 optimum)"


# ---- the interquartile mean


def iqm_intervals(suite: Suite) -> Figure:
    """A row for each agent: the IQM with its interval; and how far it is from the optimum, where that is known."""
    from matplotlib.figure import Figure

    found = {agent: bootstrap(list(suite.scores(agent).values())) for agent in suite.agents}
    figure = Figure(figsize=(9.6, 0.29 * len(found) + 1.3), layout="constrained")
    panels = figure.subplots(1, 1 if suite.relative else 2, sharey=True, squeeze=False).ravel()
    lowest = max(LOWEST, min(0.0, *(float(np.nanmin([e.value, e.low])) for e in found.values())))
    for row, (agent, estimate) in enumerate(found.items()):
        _interval(panels[0], row, estimate, lowest)
        if not suite.relative:
            ends = (estimate.value, estimate.high, estimate.low)
            _interval(panels[1], row, Estimate(*(np.maximum(1 - end, SMALLEST) for end in ends)), 0)
        failed, count = sum(run.failure is not None for run in suite.of(agent)), len(suite.of(agent))
        if failed:
            place = {"xycoords": ("axes fraction", "data"), "va": "center"}
            panels[-1].annotate(f"{failed} of {count} failed", (1.02, row), fontsize=8, **place)
    panels[0].set_yticks(range(len(found)), [_wrapped(agent, 34) for agent in found], fontsize=9)
    panels[0].set_ylim(len(found) - 0.4, -0.6)
    highest = max(1.0, *(float(np.nanmax([e.value, e.high])) for e in found.values()))
    panels[0].set_xlim(lowest - 0.04 * (1 - lowest), highest + 0.04 * (1 - lowest))
    panels[0].set_xlabel(f"IQM of the {score_name(suite)}", fontsize=9)
    panels[0].axvline(0, color="0.6", linewidth=0.8, zorder=0)
    for axes in panels[1:]:
        axes.set_xscale("log")
        axes.set_xlabel("1 - IQM (logarithmic; further right is better)", fontsize=9)
        axes.axvline(0.01, color="0.4", linestyle="--", linewidth=0.9, zorder=0)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        axes.annotate("IQM .99", (0.01, 1), xytext=(0, 2), fontsize=8, **place)
        axes.invert_xaxis()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def _interval(axes: Axes, row: int, estimate: Estimate, lowest: float) -> None:
    """A dot on a line, with an arrow where that goes on outside; a dot outside becomes an arrow with its number."""
    if estimate.value < lowest:
        axes.plot([lowest], [row], marker="<", color=ORANGE, markersize=7, clip_on=False)
        axes.annotate(
            f"{estimate.value:.1f}", (lowest, row), (8, 0), textcoords="offset points", fontsize=8, va="center"
        )
        return
    if math.isfinite(estimate.low):
        axes.plot([max(estimate.low, lowest), estimate.high], [row, row], color=BLUE, linewidth=2.6, alpha=0.45)
        if estimate.low < lowest:
            axes.plot([lowest], [row], marker="<", color=BLUE, markersize=5, clip_on=False)
    axes.plot([estimate.value], [row], marker="o", color=BLUE, markersize=5)


# ---- small panels


def efficiency(suite: Suite, by: str) -> Figure | None:
    """The IQM over all tasks while the agents learn, drawn at recorded points; flat for an agent that learns nothing.

    Args:
        suite: The runs.
        by: ``tokens`` or ``seconds``.

    Returns:
        The figure. None where no run has a curve of more than one point.
    """
    runs = {agent: _with_curves(suite.of(agent), by) for agent in suite.agents}
    grids = {agent: _grid(some, by) for agent, some in runs.items() if some}
    ends = [end for grid in grids.values() if len(grid) > 1 for end in (grid[0], grid[-1])]
    if not ends:
        return None
    curves: dict[str, Curve] = {}
    for agent, grid in grids.items():
        x = grid if len(grid) > 1 else np.array([min(ends), max(ends)])
        of_tasks = ([run for run in runs[agent] if run.task == task] for task in suite.tasks)
        tasks = [np.array([score_at(run, x, by) for run in some]) for some in of_tasks if some]
        curves[agent] = x, bootstrap(tasks, num_resamples=NUM_RESAMPLES)
    names = {"tokens": "training tokens", "seconds": "seconds of one run (logarithmic)"}
    ylabel = f"IQM of {'relative' if suite.relative else 'normalised'} score"
    return small_multiples(curves, names[by], ylabel, log=by == "seconds")


def score_at(run: Run, grid: np.ndarray, by: str) -> np.ndarray:
    """What a run scores at given tokens or seconds, in between on the line; after its end, its final score.

    A run that failed drops at its end, whatever it had reached; one that failed before it was measured counts its
    final score from the start.
    """
    x = _places(run, by)
    return np.interp(grid, x, run.scores, right=run.score) if len(x) else np.full(len(grid), run.score)


def first_reaching(runs: Sequence[Run], by: str, score: float) -> float:
    """The first recorded point of any of the runs by which the IQM is at a score; NaN where it does not come there.

    A run counts what it was last measured to score, so this is a point that was measured, and late by at most the
    distance of two: between two points nothing is known.

    Args:
        runs: Of one agent.
        by: ``tokens`` or ``seconds``.
        score: What to reach.
    """
    runs = _with_curves(runs, by)
    if not runs:
        return math.nan
    places = [_places(run, by) for run in runs]
    grid = np.unique(np.concatenate(places))
    grid = grid[grid >= _start(places)]
    measured = [_last_measured(run, grid, by) for run in runs]
    there = np.flatnonzero(iqm(np.array(measured), axis=0) >= score)
    return float(grid[there[0]]) if len(there) else math.nan


def _last_measured(run: Run, grid: np.ndarray, by: str) -> np.ndarray:
    """What a run was last measured to score, by tokens or seconds after its start; after its end, its final score."""
    x = _places(run, by)
    if len(x) == 0:
        return np.full(len(grid), run.score)
    return np.where(grid > x[-1], run.score, run.scores[np.searchsorted(x, grid, side="right") - 1])


def _with_curves(runs: Sequence[Run], by: str) -> list[Run]:
    """The runs with recorded points, and those that failed before their first; none where no run has any."""
    if not any(len(_places(run, by)) for run in runs):
        return []
    return [run for run in runs if len(_places(run, by)) or run.failure is not None]


def _places(run: Run, by: str) -> np.ndarray:
    """Rising tokens or seconds of a run's curve, empty where it has none."""
    x = run.tokens if by == "tokens" else run.seconds
    return np.array([]) if x is None else np.maximum.accumulate(x)


def _start(places: Sequence[np.ndarray]) -> float:
    """Where the last has its first point: before, a mean would be of other tasks than after."""
    return max(float(x[0]) for x in places if len(x))


def _grid(runs: Sequence[Run], by: str) -> np.ndarray:
    """Recorded tokens or seconds, as close as they were recorded; only the start where nothing was learnt.

    An even grid would begin far behind the first points where one of the runs took a hundred times as long.
    """
    places = [_places(run, by) for run in runs]
    start = _start(places)
    later = np.concatenate([x[1:] for x in places])
    later = later[later > start]
    if len(later) == 0:
        return np.array([start])
    grid = np.unique(np.quantile(later, np.linspace(0, 1, NUM_POINTS), method="nearest"))
    if by == "tokens":
        return np.array([start, *grid])
    # A logarithmic axis has no room for the start, milliseconds, where nothing is learnt yet; a line needs two ends.
    return grid if len(grid) > 1 else np.array([0.1, 1.0]) * grid


def profiles(suite: Suite) -> Figure:
    """Performance profiles: the share of an agent's runs above each score.

    Where 1 is the optimum the axis is the distance from it, logarithmic: good agents differ in their last hundredth.
    """
    scores = {agent: list(suite.scores(agent).values()) for agent in suite.agents}
    lowest, highest = min(run.score for run in suite.runs), max(run.score for run in suite.runs)
    grid = np.linspace(max(LOWEST, min(0.0, lowest)), max(1.0, highest), 2 * NUM_POINTS - 1)
    xlabel = score_name(suite)
    if not suite.relative:
        distances = np.geomspace(1.05 * max(1.0, 1 - lowest), 1e-4, 2 * NUM_POINTS - 1)
        grid, xlabel = 1 - distances, "1 - normalised score, logarithmic (0 optimum, 1 reference)"
    curves = {}
    for agent, tasks in scores.items():
        found = profile(tasks, grid, num_resamples=NUM_RESAMPLES)
        curves[agent] = (grid if suite.relative else distances), found
    ylabel = "share of runs above"
    return small_multiples(curves, xlabel, ylabel, log=not suite.relative, falling=not suite.relative, bottom=0.0)


def small_multiples(
    curves: Mapping[str, Curve],
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    falling: bool = False,
    bottom: float = -0.15,
) -> Figure:
    """A panel for each curve, four in a row, the other curves in grey behind it.

    Args:
        curves: Places and values with their interval, by what stands above the panel.
        xlabel: Name and unit of the common x axis.
        ylabel: The same of the y axis.
        log: Logarithmic x axis.
        falling: x axis from large to small.
        bottom: The y axis goes no lower, and curves may leave it there.
    """
    from matplotlib.ticker import EngFormatter, LogLocator

    titles = [_wrapped(label, 28) for label in curves]
    num_columns = min(4, len(curves))
    above = 0.1 + 0.15 * max(title.count("\n") + 1 for title in titles)
    width, height = PANELS[num_columns]
    margins = 0.1, 0.2, 0.08, above
    figure, panels = panel_grid(len(curves), num_columns, (width, height + above), margins, around=(0.62, 0.42))
    lowest, highest = (float(end([end(found.value) for _, found in curves.values()])) for end in (np.min, np.max))
    for i, (axes, title, (label, (grid, estimate))) in enumerate(zip(panels, titles, curves.items(), strict=True)):
        # One line with gaps: much smaller in a file than many. Half of the points is enough for what stands behind.
        others = [
            np.append(np.array([x, y.value])[:, np.r_[0 : len(x) : 2, -1]], [[np.nan]] * 2, 1)
            for o, (x, y) in curves.items() if o != label
        ]  # fmt: skip
        if others:
            axes.plot(*np.concatenate(others, axis=1), **OTHERS)
        axes.fill_between(grid, estimate.low, estimate.high, color=BLUE, alpha=0.25, linewidth=0, zorder=2)
        axes.plot(grid, estimate.value, color=BLUE, linewidth=1.8, zorder=3)
        axes.set_title(title, fontsize=9, fontweight="bold", pad=3)
        axes.grid(alpha=0.25)
        if i:
            axes.sharex(panels[0])
            axes.sharey(panels[0])
        axes.tick_params(labelsize=8, labelleft=i % num_columns == 0, labelbottom=i + num_columns >= len(curves))
    panels[0].set_ylim(max(bottom, min(0.0, lowest)) - 0.05, max(1.0, highest) + 0.05)
    if log:
        for axes in panels:
            axes.set_xscale("log")
            axes.minorticks_off()  # and powers of ten at the others: 0.0001 would run into the next panel's 100
        if max(grid.max() for grid, _ in curves.values()) < 100 * min(grid.min() for grid, _ in curves.values()):
            panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # of powers of ten there is only one or two
            panels[0].xaxis.set_major_formatter("{x:g}")
    elif max(grid[-1] for grid, _ in curves.values()) >= 1000:
        panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, not 20000
    if falling:
        panels[0].invert_xaxis()
    figure.supxlabel(xlabel, fontsize=9, y=0.06 / figure.get_figheight(), va="bottom")
    figure.supylabel(ylabel, fontsize=9, x=0.06 / figure.get_figwidth(), ha="left")
    return figure


def panel_grid(
    count: int,
    num_columns: int,
    panel: tuple[float, float],
    margins: tuple[float, float, float, float],
    around: tuple[float, float] = (0.0, 0.0),
) -> tuple[Figure, list[Axes]]:
    """Axes in rows, laid out by hand: constrained layout is slow for twenty, and unstable where names hang on points.

    Args:
        count: Panels.
        num_columns: In a row.
        panel: Width and height of a panel with its margins; all sizes are inches.
        margins: Left, below, right and above the axes within a panel.
        around: Left of all panels and below them.
    """
    from matplotlib.figure import Figure

    num_rows = -(-count // num_columns)
    width, height = around[0] + panel[0] * num_columns, around[1] + panel[1] * num_rows
    figure = Figure(figsize=(width, height))
    left, below, right, above = margins
    all_axes = []
    for i in range(count):
        row, column = divmod(i, num_columns)
        x, y = around[0] + column * panel[0] + left, height - (row + 1) * panel[1] + below
        size = panel[0] - left - right, panel[1] - below - above
        all_axes.append(figure.add_axes((x / width, y / height, size[0] / width, size[1] / height)))
    return figure, all_axes


# ---- pairs


def improvements(suite: Suite) -> dict[tuple[str, str], Estimate]:
    """How likely the first agent of a pair beats the second, over the tasks that both have runs on."""
    scores, found = {agent: suite.scores(agent) for agent in suite.agents}, {}
    for i, ours in enumerate(suite.agents):
        for theirs in suite.agents[i + 1 :]:
            tasks = [task for task in suite.tasks if task in scores[ours] and task in scores[theirs]]
            if tasks:
                pair = ([scores[agent][task] for task in tasks] for agent in (ours, theirs))
                found[ours, theirs] = p = improvement(*pair, num_resamples=NUM_RESAMPLES)
                found[theirs, ours] = Estimate(1 - p.value, 1 - p.high, 1 - p.low)
    return found


def improvement_map(suite: Suite) -> Figure:
    """Probabilities of improvement of all pairs in percent; bold where the interval leaves out one half."""
    from matplotlib.figure import Figure

    found, count = improvements(suite), len(suite.agents)
    names = [_wrapped(agent, 26) for agent in suite.agents]
    figure = Figure(figsize=(0.36 * max(count, 5) + 2.6, 0.36 * max(count, 5) + 1.9), layout="constrained")
    axes = figure.add_subplot()
    matrix = np.full((count, count), np.nan)
    for (ours, theirs), estimate in found.items():
        i, j = suite.agents.index(ours), suite.agents.index(theirs)
        matrix[i, j] = estimate.value
        clear = estimate.low > 0.5 or estimate.high < 0.5
        weight, colour = "bold" if clear else "normal", "white" if abs(estimate.value - 0.5) > 0.3 else "black"
        text = f"{100 * estimate.value:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, fontweight=weight, color=colour)
    # Orange and purple are told apart by all eyes, and the numbers stand on them.
    axes.imshow(matrix, cmap="PuOr", vmin=0, vmax=1)
    axes.set_xticks(range(count), names, rotation=90, fontsize=8)
    axes.set_yticks(range(count), names, fontsize=8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("... a run of the agent of the column", fontsize=9)
    axes.set_ylabel("% chance that a run of\nthe agent of the row beats ...", fontsize=9)
    return figure


def _wrapped(label: str, width: int) -> str:
    return "\n".join(textwrap.wrap(label, width)) or label
