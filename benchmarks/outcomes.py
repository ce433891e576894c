"""A benchmark's directory as runs with one score each: what the statistics, the tables and the pictures read.

``results.jsonl`` has a line for each finished cell, ``timings.jsonl`` what it took, under the same key.

The score of a run is, on tasks whose optimum is known, the normalised score (0 the reference, 1 optimal). On others
it is the objective E[score] - beta KL on the same kind of scale: 0 the reference, 1 the best mean of an agent there.

A run that failed is a result. It leaves one with the reference, so it scores 0, or what it was last seen to score if
that is less: to crash is never better than to be bad, and what was good on the way is lost with the policy.

An agent that shows no policy (only ``predict``) has no KL, so its runs have a mean score but no objective. It is not
rated: the tables show what is known of it, and it is left out of the statistics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cells import failed_score, read_cells
from .known_answers import TASKS
from .runner import RESULTS, TIMINGS, as_text, read_results
from .statistics import iqm

AT_REFERENCE = 1e-3  # nats within which a policy has not left the reference


class Task(NamedTuple):
    """A task with its KL coefficient; one stratum of the statistics."""

    name: str
    kl_coef: float

    def __str__(self) -> str:
        return f"{self.name}, β = {self.kl_coef:g}"


@dataclass(frozen=True)
class Run:
    """A finished cell.

    Attributes:
        agent: Its label, the same for all runs that belong together.
        task: Task and KL coefficient.
        seed: Seed.
        failure: None, or why it failed: ``nan``, ``kl``, ``exception: ...``.
        score: See the module. Finite, also where it failed; NaN for an agent that is not rated.
        tokens: Training tokens at the points of its learning curve, rising. Shape (K,); may be empty.
        scores: The score there. Shape (K,).
        seconds: Seconds there, None where they were not recorded. Shape (K,).
        total_seconds: What the whole run took, NaN where that was not recorded.
        cell: The line of the file.
    """

    agent: str
    task: Task
    seed: int
    failure: str | None
    score: float
    tokens: np.ndarray
    scores: np.ndarray
    seconds: np.ndarray | None
    total_seconds: float
    cell: dict[str, Any]

    def metric(self, name: str) -> float:
        """A number of its evaluation, NaN where there is none."""
        return _number(self.cell.get("metrics"), name)


@dataclass(frozen=True)
class Suite:
    """The runs of a suite.

    Attributes:
        name: Its name.
        runs: In the order of their agents, tasks and seeds.
        agents: Labels of those that are rated, the best first (by the IQM of the scores).
        unrated: Labels of the others.
        tasks: In the order of the known answers, then by name.
        relative: Whether some scores are relative to the best agent here, because no optimum is known.
    """

    name: str
    runs: Sequence[Run]
    agents: Sequence[str]
    unrated: Sequence[str]
    tasks: Sequence[Task]
    relative: bool

    def of(self, agent: str, task: Task | None = None) -> list[Run]:
        """The runs of an agent, on one task or on all."""
        return [run for run in self.runs if run.agent == agent and task in (None, run.task)]

    def groups(self) -> list[list[Task]]:
        """Tasks that fit beside each other, none twice: the columns of a table, the panels of a figure."""
        groups: list[list[Task]] = []
        for task in self.tasks:
            if not groups or len(groups[-1]) == 6 or task.name in {other.name for other in groups[-1]}:
                groups.append([])
            groups[-1].append(task)
        return groups

    def runs_on(self, task: Task) -> list[Run]:
        """The runs of all agents on a task."""
        return [run for run in self.runs if run.task == task]

    def scores(self, agent: str) -> dict[Task, np.ndarray]:
        """Scores of an agent's runs on each task on which it has any."""
        found = {task: np.array([run.score for run in self.of(agent, task)]) for task in self.tasks}
        return {task: scores for task, scores in found.items() if len(scores)}


def read_suites(directory: str | Path) -> list[Suite]:
    """Everything in a benchmark's directory, a torn last line left out.

    Raises:
        ValueError: If there is no finished cell, or a line is not one.
    """
    path, timings_path = Path(directory) / RESULTS, Path(directory) / TIMINGS
    if not path.is_file():
        raise ValueError(f"there is no {path}; give what rlhf-gym benchmark --out has written, once a cell is finished")
    cells = {as_text(cell): cell for cell in read_results(path)}
    if not cells:
        raise ValueError(f"{path} holds no finished cells; measure some with rlhf-gym benchmark --out {directory}")
    timings = {as_text(line): line for line in read_cells(timings_path)}
    suites: dict[str, list[dict[str, Any]]] = {}
    for cell in cells.values():
        suites.setdefault(cell["suite"], []).append(cell)
    return [_suite(name, suites[name], timings) for name in sorted(suites)]


def _suite(name: str, cells: Sequence[dict[str, Any]], timings: Mapping[str, Mapping[str, Any]]) -> Suite:
    labels = label_cells(cells)
    tasks = sorted({Task(cell["task"], cell["kl_coef"]) for cell in cells}, key=_task_order)
    runs, relative = [], False
    for task in tasks:
        here = [(label, cell) for label, cell in zip(labels, cells, strict=True) if _task(cell) == task]
        known = task.name in TASKS or any("normalised" in (cell.get("metrics") or {}) for _, cell in here)
        scale = None if known else _relative_scale(here)
        relative |= not known
        runs += [_run(label, cell, timings.get(as_text(cell)), scale) for label, cell in here]
    unrated = sorted({run.agent for run in runs if not math.isfinite(run.score)})
    pooled = {label: [run.score for run in runs if run.agent == label] for label in set(labels) - set(unrated)}
    agents = sorted(pooled, key=lambda label: (-iqm(np.array(pooled[label])), label))
    order = [*agents, *unrated]
    runs.sort(key=lambda run: (order.index(run.agent), tasks.index(run.task), run.seed))
    return Suite(name, runs, agents, unrated, tasks, relative)


def label_cells(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each cell: the agent's name, and only so much else as tells it from the others.

    Of ``module:Class`` the class, where no other is called so. Policy and settings are named where the same agent comes
    with several; an agent that is tuned for each task is still one agent: settings split it only where one task and
    seed was run with more than one.
    """
    policies: dict[str, set[str]] = {}
    variants: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for cell in cells:
        policies.setdefault(cell["agent"], set()).add(cell.get("policy"))
        variants.setdefault((cell["agent"], cell.get("policy")), []).append(cell)
    split = {}
    for key, group in variants.items():
        runs = [(_task(cell), cell["seed"]) for cell in group]
        split[key] = _differing(map(settings, group)) if len(set(runs)) < len(runs) else []
    classes = [name.rpartition(":")[2] for name in policies]
    short = {name: name.rpartition(":")[2] for name in policies}
    names = {name: each if classes.count(each) == 1 else name for name, each in short.items()}
    labels = []
    for cell in cells:
        parts = [names[cell["agent"]]] + ([str(cell.get("policy"))] if len(policies[cell["agent"]]) > 1 else [])
        mine = settings(cell)
        parts += [f"{name}={mine.get(name)}" for name in split[cell["agent"], cell.get("policy")]]
        labels.append(", ".join(parts))
    return labels


def settings(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What an agent was run with: its configuration, rows of the environment, budget."""
    others = {name: cell.get(name) for name in ("num_envs", "budget_tokens", "budget_seconds")}
    return {name: value for name, value in others.items() if value is not None} | (cell.get("config") or {})


def _differing(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """Names whose value is not the same in all."""
    dicts = list(dicts)
    names = {name: None for each in dicts for name in each}
    return [name for name in names if len({json.dumps(each.get(name)) for each in dicts}) > 1]


def _task(cell: Mapping[str, Any]) -> Task:
    return Task(cell["task"], cell["kl_coef"])


def _task_order(task: Task) -> tuple[Any, ...]:
    """The sharp coefficients of all tasks, then the soft ones: half as many columns are then of one kind."""
    if task.kl_coef in TASKS.get(task.name, ()):
        return (TASKS[task.name].index(task.kl_coef), list(TASKS).index(task.name), task)
    return (len(TASKS), 0, task)


def _relative_scale(cells: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[float, float]:
    """Objective of the reference and the best mean over an agent's runs."""
    starts: list[float] = []
    ends: dict[str, list[float]] = {}
    for label, cell in cells:
        for point in cell.get("curve") or []:
            # Where an agent has not moved yet; one that does not begin at the reference has a KL from the first.
            if point.get("tokens") == 0 and abs(point.get("kl") or 0.0) < AT_REFERENCE:
                starts.append(_objective(point, cell["kl_coef"]))
        if cell.get("status") == "ok":
            ends.setdefault(label, []).append(_objective(cell.get("metrics") or {}, cell["kl_coef"]))
    starts = [value for value in starts if math.isfinite(value)]
    best = max((np.nanmean(values) for values in ends.values() if np.isfinite(values).any()), default=math.nan)
    zero = float(np.mean(starts)) if starts else 0.0
    return zero, float(best) if best > zero else zero + 1.0


def _run(
    label: str, cell: dict[str, Any], timing: Mapping[str, Any] | None, scale: tuple[float, float] | None
) -> Run:  # fmt: skip
    metrics = cell.get("metrics") or {}

    def score(record: Mapping[str, Any]) -> float:
        if scale is None:
            return _number(record, "normalised")
        return (_objective(record, cell["kl_coef"]) - scale[0]) / (scale[1] - scale[0])

    points = [(point.get("tokens"), score(point)) for point in cell.get("curve") or []]
    seconds = (timing or {}).get("curve_seconds")
    seconds = list(seconds) if seconds and len(seconds) == len(points) else None
    total = _number((timing or {}).get("seconds"), "total")
    last = score(metrics)
    failure = (cell.get("failure") or "unknown") if cell["status"] != "ok" else None
    has_no_kl = cell["kl_coef"] > 0 and metrics.get("kl") is None and metrics.get("normalised") is None
    if failure is None and not (math.isfinite(last) or has_no_kl):
        failure = "nan"
    if failure is not None:
        seen = [value for _, value in points if math.isfinite(value)] + [last] * math.isfinite(last)
        last = failed_score(seen)
    whole = [i for i, (_, value) in enumerate(points) if math.isfinite(value)]
    return Run(
        label, _task(cell), cell["seed"], failure, last,
        np.array([points[i][0] for i in whole], dtype=float), np.array([points[i][1] for i in whole], dtype=float),
        None if seconds is None else np.array([seconds[i] for i in whole], dtype=float), total, cell,
    )  # fmt: skip


def _objective(record: Mapping[str, Any], kl_coef: float) -> float:
    """E[score] - beta KL of a curve's point or of an evaluation, NaN where it is not there."""
    value = _number(record, "objective")
    if not math.isfinite(value):
        penalty = kl_coef * _number(record, "kl") if kl_coef else 0.0
        value = _number(record, "score" if "score" in record else "reward") - penalty
    return value


def _number(record: Mapping[str, Any] | None, name: str) -> float:
    value = (record or {}).get(name)
    return float(value) if isinstance(value, int | float) else math.nan
