"""Tables of a benchmark: a row for each agent, as texts; for Markdown and for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .figures import first_reaching
from .outcomes import Run, Suite, Task, settings
from .statistics import Estimate, bootstrap, failure_rate, mean

REACHED = 0.9  # the score of "tokens to .9"
BY = ("tokens", "seconds")  # what learning is counted in
# Of an evaluation; those that a task has become columns.
METRICS = {
    "score": "score", "kl": "KL (nats)", "objective": "objective", "proxy": "proxy", "gold": "gold",
    "length": "length (tokens)", "reward_calls": "reward calls",
}  # fmt: skip


class Table(NamedTuple):
    """A header, and rows of as many texts."""

    header: list[str]
    rows: list[list[str]]


def overview(suite: Suite) -> Table:
    """All tasks together, the best agent first."""
    header = ["agent", "IQM [95 % interval]", "mean", "worst run", "failed (95\N{NO-BREAK SPACE}%)"]
    header += [f"{by} to {REACHED:g}" for by in BY] + ["median seconds a run", "runs"]
    rows, most = [], max(len(suite.of(agent)) for agent in [*suite.agents, *suite.unrated])
    for agent in suite.agents:
        runs = suite.of(agent)
        scores = [run.score for run in runs]
        # Not their mean: one process that was suspended for an hour would be all that it says.
        seconds = [run.total_seconds for run in runs if math.isfinite(run.total_seconds)]
        rows.append([
            agent, in_brackets(bootstrap(list(suite.scores(agent).values()))), f"{np.mean(scores):.4f}",
            f"{min(scores):.4f}", _failed(runs), *(_amount(first_reaching(runs, by, REACHED)) for by in BY),
            _amount(float(np.median(seconds)) if seconds else math.nan),
            str(len(runs)) + (f" of {most}" if len(runs) < most else ""),
        ])  # fmt: skip
    return Table(header, rows)


def in_brackets(estimate: Estimate) -> str:
    """``0.9982 [0.9970, 0.9991]``."""
    between = f" [{estimate.low:.4f}, {estimate.high:.4f}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:.4f}{between}"


def _failed(runs: Sequence[Run]) -> str:
    failed = sum(run.failure is not None for run in runs)
    rate = failure_rate(failed, len(runs))
    return f"{failed} ({100 * rate.low:.0f} to {100 * rate.high:.0f} %)"


def _amount(x: float) -> str:
    """A number of tokens or seconds, to two digits: the points of a curve lie further apart than a third would say."""
    if math.isnan(x):
        return "-"
    rounded = float(f"{x:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 or rounded == 0 else f"{rounded:#.2g}"


def by_task(suite: Suite, tasks: Sequence[Task]) -> Table:
    """Scores: mean over seeds ± half of Student's interval; of agents that are not rated the raw mean score."""
    rows = [[agent, *(_entry(suite.of(agent, task), _score) for task in tasks)] for agent in suite.agents]
    rows += [[agent, *(_entry(suite.of(agent, task), _raw_score, "raw ") for task in tasks)] for agent in suite.unrated]
    return Table(["agent", *map(str, tasks)], rows)


def regrets(suite: Suite, tasks: Sequence[Task]) -> Table | None:
    """J* - J of the runs that could be evaluated; None where no optimum is known."""
    if not any(math.isfinite(run.metric("regret")) for task in tasks for run in suite.runs_on(task)):
        return None
    rows = [
        [agent, *(_entry(suite.of(agent, task), _metric("regret"), form=_short) for task in tasks)]
        for agent in suite.agents
    ]
    return Table(["agent", *map(str, tasks)], rows)


def measures(suite: Suite, task: Task) -> Table:
    """Everything that was measured on a task, raw: means over the runs that could be evaluated."""
    runs = suite.runs_on(task)
    names = [name for name in METRICS if any(math.isfinite(run.metric(name)) for run in runs)]
    rows = []
    for agent in [*suite.agents, *suite.unrated]:
        mine = suite.of(agent, task)
        if mine:
            forms = {"reward_calls": "{:,.0f}".format}
            rows.append(
                [agent, *(_entry(mine, _metric(name), form=forms.get(name, "{:.4g}".format)) for name in names)]
            )
    return Table(["agent", *(METRICS[name] for name in names)], rows)


def failures(suite: Suite) -> Table:
    """What went wrong, how often and where, and what those runs count."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in suite.runs:
        if run.failure is not None:
            groups.setdefault((run.agent, run.failure), []).append(run)
    rows = []
    for (agent, failure), runs in groups.items():
        seeds: dict[Task, list[str]] = {}
        for run in runs:
            seeds.setdefault(run.task, []).append(str(run.seed))
        where = "; ".join(f"{task}: seed {', '.join(found)}" for task, found in seeds.items())
        scores = [run.score for run in runs]
        low, high = f"{min(scores):.3g}", f"{max(scores):.3g}"
        rows.append([agent, failure, where, low if low == high else f"{low} to {high}"])
    return Table(["agent", "failure", "runs", "counted as"], rows)


def settings_of(suite: Suite) -> Table:
    """What each agent was run with."""
    rows = []
    for agent in [*suite.agents, *suite.unrated]:
        runs = suite.of(agent)
        each = [settings(run.cell) for run in runs]
        names = list(dict.fromkeys(name for one in each for name in one))
        texts = []
        for name in names:
            values = {json.dumps(one.get(name)) for one in each}
            texts.append(f"{name}={values.pop()}" if len(values) == 1 else f"{name} by task")
        called, policies = ({str(run.cell.get(name)) for run in runs} for name in ("agent", "policy"))
        rows.append([agent, ", ".join(sorted(called)), ", ".join(sorted(policies)), ", ".join(texts)])
    return Table(["agent", "--agents", "--policy", "settings"], rows)


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def _score(run: Run) -> float:
    return run.score


def _metric(name: str) -> Callable[[Run], float]:
    return lambda run: run.metric(name)


def _raw_score(run: Run) -> float:
    return run.metric("score") if "score" in run.cell.get("metrics", {}) else run.metric("reward")


def _fixed(number: float) -> str:
    return f"{number:.4f}"


def _short(number: float) -> str:
    """Two digits, ``8.1e-5`` or ``0.0011``."""
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if 0 < abs(number) < 1e-3 else f"{number:.2g}"


def _entry(
    runs: Sequence[Run], value: Callable[[Run], float], kind: str = "", form: Callable[[float], str] = _fixed
) -> str:
    """``0.9996 ± 0.0004`` and a second line ``(1 failed)``; the spread only where there is more than one seed."""
    values = [number for number in map(value, runs) if math.isfinite(number)]
    failed = sum(run.failure is not None for run in runs)
    note = f"\n({failed} failed)" if failed else ""
    if not values:
        return "-" + note
    found = mean(values)
    half = "" if len(values) == 1 else " ± " + form(found.high - found.value)
    return f"{kind}{form(found.value)}{half}{note}"
