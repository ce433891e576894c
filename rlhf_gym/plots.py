"""Pictures of a run: what the policy earns and how far it has gone, readable in print and by the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by line style and marker as well: a grey print must still say which is which.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": ":", "marker": "^"},
    {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
)
SMOOTH_FROM = 40  # updates from which on curves are smoothed
PANELS = (
    ("objective/scores", "mean score of a response"),
    ("objective/kl", "mean KL to the reference (nats)"),
)


def curves(runs: Mapping[str, Mapping[str, Sequence[float]]], panels: Sequence[tuple[str, str]] = PANELS) -> Figure:
    """Metrics against training tokens, a panel for each.

    Args:
        runs: Columns of each run's metrics, see :func:`rlhf_gym.runs.read_metrics`, by the run's label.
        panels: Name of a metric and what its axis says; a metric that no run has is left out.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import EngFormatter

    panels = [panel for panel in panels if any(panel[0] in columns for columns in runs.values())] or list(panels[:1])
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    for i, (metric, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for (name, columns), style in zip(runs.items(), STYLES * len(runs), strict=False):
            if metric in columns:
                known = [i for i, value in enumerate(columns[metric]) if value == value]
                x, y = ([columns[column][i] for i in known] for column in ("timesteps", metric))
                if len(x) >= SMOOTH_FROM:  # the batches are noisy: they stay visible behind their running mean
                    axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=1)
                    y = running_mean(y, len(x) // 20)
                axes.plot(x, y, label=name, markevery=max(1, len(x) // 8), markersize=4, **style)
        axes.set(xlabel="training tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, not 20000
        if len(runs) > 1:
            axes.legend()
    return figure


def over_optimisation(rounds: Mapping[str, Sequence[Mapping[str, float]]], ends: Sequence[Mapping[str, Any]]) -> Figure:
    """What is paid and what is true against the KL, while each round's policy trains, and where the rounds end.

    Args:
        rounds: Points with ``kl``, ``proxy`` and ``gold`` (where it is known) in the order of training, by label.
        ends: Held-out means with intervals of the base model and each round, as ``agents/loop.py`` writes them.
    """
    from matplotlib.figure import Figure

    has_gold = any("gold" in point for points in rounds.values() for point in points)
    panels = [("proxy", "reward model's score (paid)")] + ([("gold", "gold score (true)")] if has_gold else [])
    figure = Figure(figsize=(4.2 * (len(panels) + has_gold), 3.4), layout="constrained")
    for i, (name, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels) + has_gold, i + 1)
        for (title, points), style in zip(rounds.items(), STYLES * len(rounds), strict=False):
            window = max(1, len(points) // 12)
            x, y = (running_mean([point[column] for point in points], window) for column in ("kl", name))
            axes.plot(x, y, label=title, markevery=max(1, len(x) // 6), markersize=4, **style)
        axes.set(xlabel="mean KL to the reference (nats)", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    if has_gold:
        axes = figure.add_subplot(1, len(panels) + 1, len(panels) + 1)
        means = [end["gold"]["mean"] for end in ends]
        low, high = ([end["gold"][side] for end in ends] for side in ("low", "high"))  # None for a single prompt
        below, above = (
            [0 if b is None else abs(a - b) for a, b in zip(means, side, strict=True)] for side in (low, high)
        )
        axes.errorbar(range(len(ends)), means, yerr=(below, above), capsize=4, **STYLES[0])
        axes.set(xlabel="round (0: base model)", ylabel="gold score on held-out prompts", xticks=range(len(ends)))
        axes.grid(alpha=0.3)
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of up to ``window`` values on either side of each and itself; NaN entries are left out."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window) : i + window + 1] if v == v]
        means.append(sum(near) / len(near) if near else float("nan"))
    return means


def histogram(groups: Mapping[str, Any], label: str) -> Figure:
    """Distributions of one number side by side, as shares of each group's responses."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups.values()])
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1, 11)
    width = (edges[1] - edges[0]) / (len(groups) + 0.5)
    hatches = ("", "//", "..", "xx")
    for i, (name, group) in enumerate(groups.items()):
        counts, _ = np.histogram(group, edges)
        place = edges[:-1] + (i + 0.75) * width
        colour = STYLES[i % len(STYLES)]["color"]
        axes.bar(place, counts / len(group), width, label=name, color=colour, hatch=hatches[i % 4], edgecolor="white")
    axes.set(xlabel=label, ylabel="share of responses")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    return figure


def plot_run(
    runs: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    panels: Sequence[tuple[str, str]] = PANELS,
) -> None:
    """Write the ``curves`` of some runs as a PNG."""
    curves(runs, panels).savefig(path, dpi=150)


def as_svg(figure: Any) -> bytes:
    """A figure as SVG, the same bytes each time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "rlhf_gym"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
