"""Pictures of what the agents paid for their score: reward against KL, with the exact frontier, and gold against proxy.

An agent is a point, the mean of its runs, with its name beside the panel and a thin line to it. On tasks with a known
optimum those that have reached it carry no name: twenty names on one point say less than none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_gym.plots import STYLES

from .figures import panel_grid
from .frontier import FRONTIER, REFERENCE, RING, Curves, curves_of, draw_task
from .known_answers import TASKS
from .outcomes import AT_REFERENCE, Run, Suite, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REACHED = 0.99  # normalised score from which on an agent stands at the optimum
BEYOND = 1.2  # a panel without a frontier ends at so many times the largest KL that did not cost more than it brought
PATH: dict[str, Any] = {"color": "0.85", "linewidth": 0.6, "zorder": 1}
AGENT: dict[str, Any] = {
    "marker": "o", "color": STYLES[0]["color"], "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.5,
    "linestyle": "none", "zorder": 7,
}  # fmt: skip
# In inches: a panel, what its axis and title need, a line of the names beside it, a letter of them.
PANEL, LEFT, BELOW, ABOVE, LINE, LETTER = (4.9, 3.25), 0.62, 0.48, 0.3, 0.108, 0.055


@dataclass(frozen=True)
class Point:
    """Where the runs of an agent ended on a task, on average.

    Attributes:
        x: Mean of the runs that have a finite value; so is ``y``.
        y: See ``x``.
        label: What stands beside the panel; empty for none.
        failed: Whether a run failed; such a point is a cross.
        beyond: Whether it lies beyond the panel and stands at its edge; such a point is an arrow.
    """

    x: float
    y: float
    label: str
    failed: bool = False
    beyond: bool = False


def reward_against_kl(suite: Suite, tasks: Sequence[Task] | None = None) -> Figure:
    """A panel for each task: mean score against KL; known tasks with their frontier, others with the agents' paths."""
    tasks = tasks or suite.tasks
    ends = [_ends(suite, task, ("kl",), ("score", "reward"), name_all=False) for task in tasks]
    figure, panels = _panels(len(tasks), legend=0.75 if any(task.name in TASKS for task in tasks) else 0.4)
    for i, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        if task.name in TASKS:
            _draw_known(axes, curves_of(task.name, [task.kl_coef]), ends[i])
        else:
            _draw_paths(axes, suite, task, "kl", "score")
            _end_where_it_pays(axes, suite, task, ends[i])
        right, top = axes.get_xlim()[1], axes.get_ylim()[1]
        ends[i] = [_at_edge(point, right, top) if point.x > right else point for point in ends[i]]
        _draw_points(axes, ends[i])
        axes.set_title(str(task), fontsize=10, fontweight="bold")
        axes.set_xlabel("KL to the reference (nats per response)", fontsize=9)
        axes.set_ylabel("mean score of a response", fontsize=9)
    _leave_room(figure, panels, ends)
    _legend(figure)
    return figure


def gold_against_proxy(suite: Suite) -> Figure | None:
    """A panel for each task with a gold score: what was meant against what was paid for. None where there is none."""
    tasks = [task for task in suite.tasks if any(math.isfinite(run.metric("gold")) for run in suite.runs_on(task))]
    if not tasks:
        return None
    ends = [_ends(suite, task, ("proxy", "score", "reward"), ("gold",), name_all=True) for task in tasks]
    figure, panels = _panels(len(tasks), legend=0.4)
    _leave_room(figure, panels, ends)
    for axes, task, points in zip(panels, tasks, ends, strict=True):
        if task.name in TASKS:
            known = curves_of(task.name, [task.kl_coef])
            if "gold" in known.frontier.metrics:
                frontier, marked = known.frontier, known.marked
                axes.plot(frontier.reward, frontier.metrics["gold"], label="along the frontier (exact)", **FRONTIER)
                axes.plot(marked.reward, marked.metrics["gold"], label="optimum of the proxy at β", **RING)
        else:
            _draw_paths(axes, suite, task, "score", "gold")
        _draw_points(axes, points)
        axes.set_title(str(task), fontsize=10, fontweight="bold")
        axes.set_xlabel("proxy: mean score that is paid for", fontsize=9)
        axes.set_ylabel("gold: mean score that is meant", fontsize=9)
    _legend(figure)
    return figure


def _ends(suite: Suite, task: Task, x: Sequence[str], y: Sequence[str], *, name_all: bool) -> list[Point]:
    """The agents that have the numbers on a task: of the names in ``x`` and in ``y`` the first that is there."""
    points = []
    for agent in suite.agents:
        runs = suite.of(agent, task)
        pairs = np.array([[_first(run, names) for names in (x, y)] for run in runs]).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(1)]
        if len(pairs) == 0:
            continue
        failed = sum(run.failure is not None for run in runs)
        there = not (name_all or failed or suite.relative) and min(run.score for run in runs) >= REACHED
        label = "" if there else agent + (f" ({failed} failed)" if failed else "")
        points.append(Point(float(pairs[:, 0].mean()), float(pairs[:, 1].mean()), label, failed > 0))
    return points


def _first(run: Run, names: Sequence[str]) -> float:
    """The first of these metrics that the run has, NaN where it has none."""
    return next((value for value in map(run.metric, names) if math.isfinite(value)), math.nan)


def _panels(count: int, legend: float) -> tuple[Figure, list[Axes]]:
    """Two in a row, with room for a legend below (inches, as wide as two)."""
    legend *= 1 if count > 1 else 1.4
    figure, panels = panel_grid(count, min(2, count), PANEL, (LEFT, BELOW, 0.15, ABOVE), around=(0, legend))
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    return figure, panels


def _leave_room(figure: Figure, panels: Sequence[Axes], drawn: Sequence[Sequence[Point]]) -> None:
    """Make the panels narrower by the longest name beside one of them."""
    room = min(2.0, 0.3 + LETTER * max((len(point.label) for points in drawn for point in points), default=0))
    for axes in panels:
        x, y, _, height = axes.get_position().bounds
        axes.set_position((x, y, (PANEL[0] - LEFT - room) / figure.get_figwidth(), height))


def _draw_known(axes: Axes, curves: Curves, points: Sequence[Point]) -> None:
    """The frontier, as far as there are points but not much further than the optimum."""
    far = 1.5 * float(curves.marked.kl.max())
    draw_task(axes, curves, min(far, max((point.x for point in points), default=far)))
    bottom, top = axes.get_ylim()
    lowest = min((point.y for point in points), default=top)
    axes.set_ylim(min(bottom, lowest - 0.06 * (top - bottom)), top)


def _end_where_it_pays(axes: Axes, suite: Suite, task: Task, points: Sequence[Point]) -> None:
    """Ends the KL axis where runs are worth less than the reference: those that got lost must not squash the others."""
    kls = [run.metric("kl") for run in suite.runs_on(task) if run.score >= 0 and run.failure is None]
    right = BEYOND * max((kl for kl in kls if math.isfinite(kl)), default=0.0)
    if 0 < right < axes.get_xlim()[1]:
        axes.set_xlim(-0.04 * right, right)
        starts = [float(np.asarray(line.get_ydata())[0]) for line in axes.lines]
        heights = [point.y for point in points] + starts
        margin = 0.06 * (max(heights) - min(heights))
        axes.set_ylim(min(heights) - margin, max(heights) + margin)


def _at_edge(point: Point, right: float, top: float) -> Point:
    """A point beyond the right of a panel, where it can be drawn; its name says where it is.

    The frontier may be above the panel that far out. The panel is not raised for it: that would squash all the others.
    """
    place = f"KL {point.x:.2g}, score {point.y:.2g}" if point.y > top else f"KL {point.x:.3g}"
    label = f"{point.label}: {place}" if point.label else ""
    return Point(right, min(point.y, top), label, point.failed, beyond=True)


def _draw_paths(axes: Axes, suite: Suite, task: Task, x: str, y: str) -> None:
    """Where the agents went while they learnt, run by run, and where they began."""
    starts, label = [], "while they learn"
    for run in suite.runs_on(task):
        curve = run.cell.get("curve") or []
        points = [(point[x], point[y]) for point in curve if point.get(x) is not None and point.get(y) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **PATH)
            label = ""
            if curve[0].get("tokens") == 0 and abs(curve[0].get("kl") or 0.0) < AT_REFERENCE:
                starts.append(points[0])
    if starts:
        axes.plot(*np.mean(starts, axis=0)[:, None], label="reference", **REFERENCE)


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    """The agents; crosses for those with failed runs, arrows beyond the panel; names on the right, in the order of their height."""
    for kind, style, label in (
        ((False, False), {}, "an agent"),
        ((False, True), {"marker": ">"}, "an agent beyond the panel"),
        ((True, False), {"marker": "X", "color": STYLES[1]["color"]}, "some runs failed"),
        ((True, True), {"marker": ">", "color": STYLES[1]["color"]}, "some runs failed, beyond the panel"),
    ):
        some = [point for point in points if (point.failed, point.beyond) == kind]
        if some:
            axes.plot(
                [point.x for point in some], [point.y for point in some], clip_on=False, label=label, **(AGENT | style)
            )
    named = sorted((point for point in points if point.label), key=lambda point: point.y)
    bottom, top = axes.get_ylim()
    gap = LINE / (PANEL[1] - BELOW - ABOVE)
    line = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
    places = spread([(point.y - bottom) / (top - bottom) for point in named], gap)
    for point, place in zip(named, places, strict=True):
        axes.annotate(
            point.label, (point.x, point.y), (1.04, place), textcoords="axes fraction", fontsize=7, va="center",
            annotation_clip=False, arrowprops=line, zorder=6,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as needed for a gap between neighbours, within 0 to 1 while they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.0))
    ceiling = max(1.0, gap * (len(placed) - 1))
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _legend(figure: Figure) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    columns = 4 if len(figure.axes) > 1 else 2
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=columns, frameon=False, fontsize=8)
