"""What a benchmark says while it runs: a table that is drawn anew on a terminal, else a line for each finished cell."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Progress:
    """Counts cells as they are finished.

    Args:
        is_drawn: Whether to draw the table, on stderr; None: where that is a terminal.
    """

    def __init__(self, is_drawn: bool | None = None):
        self.is_drawn = sys.stderr.isatty() if is_drawn is None else is_drawn
        self.cells: list[dict[str, Any]] = []
        self.keys: Sequence[dict[str, Any]] = ()
        self._live: Any = None

    @contextlib.contextmanager
    def of(
        self, title: str, keys: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]], jobs: int
    ) -> Iterator[None]:
        """Inside, cells are run.

        Args:
            title: What for.
            keys: Of all cells.
            done: Cells that were there before.
            jobs: How many are run side by side.
        """
        self.title, self.keys, self.cells, self.jobs = title, keys, list(done), jobs
        self._before, self._started = len(done), time.perf_counter()
        self._took: dict[str, list[tuple[float, int]]] = {}  # agent -> seconds and tokens of its cells
        if not self.is_drawn or len(done) == len(keys):
            yield
            return
        from rich.console import Console
        from rich.live import Live

        with Live(get_renderable=self.table, console=Console(stderr=True), refresh_per_second=1) as self._live:
            yield

    def finished(self, cell: dict[str, Any], seconds: dict[str, float]) -> None:
        """One more cell."""
        self.cells.append(cell)
        took = seconds.get("total", 0.0), cell["metrics"].get("tokens", 0)
        self._took.setdefault(cell["agent"], []).append(took)
        if not self.is_drawn:
            print(self.line(cell, took[0]), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line between two tables."""
        print(text, file=sys.stderr, flush=True)

    def seconds_left(self) -> float | None:
        """If cells go on to take what those of the same agent have taken; None before the first is finished."""
        elapsed, new = time.perf_counter() - self._started, len(self.cells) - self._before
        if not new:
            return None
        # Of all that was spent, measurements and starts of processes too, an agent's cells have their share.
        sums = {agent: sum(seconds for seconds, _ in took) for agent, took in self._took.items()}
        trained = {agent: total / len(self._took[agent]) for agent, total in sums.items()}
        all_trained = sum(sums.values())
        factor = elapsed / max(all_trained, 1e-9)
        typical = all_trained / new
        ahead = sum(
            (self._count(self.keys, agent) - self._count(self.cells, agent)) * trained.get(agent, typical)
            for agent in dict.fromkeys(key["agent"] for key in self.keys)
        )
        return ahead * factor

    def line(self, cell: dict[str, Any], seconds: float) -> str:
        """What has been found last, and how long the rest may take."""
        count = f"{len(self.cells)}/{len(self.keys)}, {as_duration(self.seconds_left())} left"
        measure = "" if "normalised" in cell["metrics"] else "score "
        found = cell["failure"] or f"{measure}{value_of(cell):.4f}".replace("-0.0000", "0.0000")
        what = f"{cell['agent']} {cell['task']} {cell['kl_coef']:g} seed {cell['seed']}"
        if self.title == "tuning":
            what += f", {as_words(cell['config'])}"
        return f"{self.title} [{count}] {what}: {found} in {seconds:.0f} s"

    def table(self) -> Any:
        """A row per agent: cells, failures, the mean of what they reached, and speed."""
        from rich.markup import escape
        from rich.table import Table

        left, seconds = self.seconds_left(), time.perf_counter() - self._started
        caption = f"{as_duration(seconds)} gone" + ("" if left is None else f", about {as_duration(left)} left")
        table = Table(
            title=self.title, caption=f"{caption}, {self.jobs} at a time; Ctrl-C stops, the same command goes on"
        )
        for name in ("agent", "cells", "failed", "mean", "s a cell", "tokens/s"):
            table.add_column(name, justify="left" if name == "agent" else "right")
        for agent in dict.fromkeys(key["agent"] for key in self.keys):
            cells, took = [cell for cell in self.cells if cell["agent"] == agent], self._took.get(agent, [])
            values = [value_of(cell) for cell in cells if cell["failure"] is None]
            total = sum(seconds for seconds, _ in took)
            table.add_row(
                escape(agent), f"{len(cells)}/{self._count(self.keys, agent)}", str(len(cells) - len(values)),
                f"{np.mean(values):.3f}" if values else "", f"{total / len(took):.1f}" if took else "",
                f"{sum(tokens for _, tokens in took) / total:,.0f}" if total else "",
            )  # fmt: skip
        return table

    @staticmethod
    def _count(cells: Sequence[dict[str, Any]], agent: str) -> int:
        return sum(cell["agent"] == agent for cell in cells)


def value_of(cell: dict[str, Any]) -> float:
    """What a table shows of a cell: the normalised score, or without a known optimum the score."""
    names = ("normalised", "score", "reward")
    return next((cell["metrics"][name] for name in names if name in cell["metrics"]), np.nan)


def as_words(config: Mapping[str, Any]) -> str:
    """Settings as they are given on the command line."""
    return " ".join(f"{name}={value}" for name, value in config.items()) or "its own settings"


def as_duration(seconds: float | None) -> str:
    """``2 h 05 min``, ``7 min`` or ``42 s``."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
