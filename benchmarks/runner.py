"""A benchmark: agents x tasks x KL coefficients x seeds in a directory, of which what is missing is run.

results.jsonl   a line for each finished cell: its key, what was found, and what it was measured with. Nothing in it
                depends on time or order, and a finished run leaves it sorted: interrupted and resumed, it ends as the
                same bytes.
timings.jsonl   a line for each finished cell: its key and seconds
tuning.jsonl    the cells of the tuning, as in results.jsonl

A cell that is there is not run again, so the same command goes on after a kill.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tuning
from .cells import append_cell, provenance, read_cells, write_cells
from .contestants import file_hash, known_name, load_agent
from .processes import run_cells
from .progress import Progress, as_words
from .suites import Suite, make_envs, make_policy, model_hash, suite_named
from .training import describe, run_cell

RESULTS, TIMINGS, TUNING = "results.jsonl", "timings.jsonl", "tuning.jsonl"
KEY = (
    "suite", "agent", "policy", "task", "kl_coef", "seed", "num_envs", "budget_tokens", "budget_seconds", "config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured. None: the suite's own.

    Attributes:
        suite: Its name.
        agents: Their names, see `load_agent`.
        settings: Of each agent, given by the user.
        num_seeds: Seeds 0, 1, ...
        tasks: Some of the suite's.
        policy: What is trained.
        num_envs: Rows of the environment.
        budget_tokens, budget_seconds: Of each cell; whichever is spent first ends it.
        tune: Random configurations of each agent; 0: none, and the presets of `tuning`.
        stories: Directory of the model of the task Stories.
    """

    suite: str
    agents: Sequence[str]
    settings: dict[str, dict[str, Any]]
    num_seeds: int = 10
    tasks: Sequence[str] = ()
    policy: str | None = None
    num_envs: int | None = None
    budget_tokens: int | None = None
    budget_seconds: float | None = None
    tune: int = 0
    stories: str | None = None

    def __post_init__(self) -> None:
        suite = self.contents
        for name, given, known in (("tasks", self.tasks, suite.tasks), ("policy", [self.policy], suite.policies)):
            for one in given:
                if one is not None and one not in known:
                    near = difflib.get_close_matches(one.lower(), {each.lower(): each for each in known}, n=1)
                    hint = (
                        f"; did you mean {next(each for each in known if each.lower() == near[0])!r}?" if near else ""
                    )
                    hint = "; give --stories the directory of its model" if one == "Stories" else hint
                    raise ValueError(
                        f"--{name} of the suite {self.suite} must be of {', '.join(known)}, got {one!r}{hint}"
                    )

    @property
    def contents(self) -> Suite:
        """The suite itself."""
        return suite_named(self.suite, self.stories)

    @property
    def policy_kind(self) -> str:
        """What is trained."""
        return self.policy or self.contents.policies[0]

    def keys(self, configs: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """A key for each cell; seeds change slowest, so that an unfinished table has something of everything."""
        suite = self.contents
        return [
            {
                "suite": self.suite, "agent": agent, "policy": self.policy_kind, "task": task, "kl_coef": kl_coef,
                "seed": seed, "num_envs": self.num_envs or suite.num_envs,
                "budget_tokens": self.budget_tokens or suite.tasks[task].budget_tokens,
                "budget_seconds": self.budget_seconds, "config": config,
            }
            for seed in seeds for task in self.tasks or suite.tasks for kl_coef in suite.tasks[task].kl_coefs
            for agent in self.agents for config in configs[agent]
        ]  # fmt: skip


def run(plan: Plan, out: Path, *, jobs: int, progress: Progress, allow_mixed: bool = False) -> list[dict[str, Any]]:
    """Tunes where that is asked for, runs what is missing, and sorts the files.

    Args:
        plan: What is to be measured.
        out: The directory; it may hold cells of other plans, which stay.
        jobs: Processes side by side.
        progress: Is told of every cell.
        allow_mixed: Add to cells that were measured with another commit or other versions.

    Returns:
        All cells of ``results.jsonl``.

    Raises:
        ValueError: If an agent cannot be made, another run is at work in the directory, cells would be mixed, or an
            agent's file or the model of Stories has changed.
    """
    with _directory(out), _locked(out):
        now, names = provenance(), {agent: known_name(agent) for agent in plan.agents}
        measure = functools.partial(_measure, plan, out, now, jobs=jobs, progress=progress, allow_mixed=allow_mixed)
        if plan.tune:
            drawn = {
                agent: [tuning.draw(name, plan.policy_kind, n, plan.settings[agent]) for n in range(plan.tune)]
                for agent, name in names.items()
            }
            swept = measure(TUNING, plan.keys(drawn, [tuning.SEED]))
            configs = {
                agent: [tuning.best([cell for cell in swept if cell["agent"] == agent])] for agent in plan.agents
            }
            for agent, (config,) in configs.items():
                progress.say(f"tuned {agent}, the best of {len(drawn[agent])}: {as_words(config)}")
        else:
            configs = {
                agent: [tuning.preset(name, plan.policy_kind) | plan.settings[agent]] for agent, name in names.items()
            }
        measure(RESULTS, plan.keys(configs, range(plan.num_seeds)))
        return read_cells(out / RESULTS)


def _measure(
    plan: Plan, out: Path, now: dict[str, Any], name: str, wanted: Sequence[dict[str, Any]], *,
    jobs: int, progress: Progress, allow_mixed: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The cells of these keys in their order, from the file or measured into it now."""
    done = {as_text(cell): cell for cell in read_results(out / name)}
    keys = list({as_text(key): key for key in wanted}.values())
    missing = [key for key in keys if as_text(key) not in done]
    used = _used(keys, plan.stories)
    _refuse_others(out / name, done.values(), used)
    if missing:
        if not allow_mixed:
            _refuse_mixing(out / name, list(done.values()), now)
        check_agents(plan, missing)
    with progress.of(name.partition(".")[0], keys, [cell for cell in map(done.get, map(as_text, keys)) if cell], jobs):
        cells = run_cells(functools.partial(run_cell, stories=plan.stories), missing, jobs, died=_of_dead_process)
        with contextlib.closing(cells):  # type: ignore[type-var] # a generator
            for key, found in cells:
                timing = {name: found.pop(name) for name in ("seconds", "curve_seconds")}
                hashes = {what: used[what] for what in (key["agent"], key["task"]) if what in used}
                cell = key | found | {"sha256": hashes} | now
                append_cell(out / TIMINGS, key | timing)
                append_cell(out / name, cell)  # last: a cell that is there has its timing
                done[as_text(key)] = cell
                progress.finished(cell, timing["seconds"])
    write_cells(out / name, list(done.values()), _order)
    write_cells(out / TIMINGS, list({as_text(line): line for line in read_cells(out / TIMINGS)}.values()), _order)
    return [done[as_text(key)] for key in keys]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished cells of a file, a torn last line left out.

    Raises:
        ValueError: If a line is not a benchmark's.
    """
    cells = read_cells(path)
    for cell in cells:
        missing = [name for name in ("suite", "agent", "task", "kl_coef", "seed", "status") if name not in cell]
        if missing:
            raise ValueError(
                f"{path} holds a line without {missing[0]!r}, so it is no benchmark's: {json.dumps(cell)[:80]}"
            )
    return cells


def as_text(cell: dict[str, Any]) -> str:
    """A cell's key as a text, equal for equal keys."""
    return json.dumps([cell.get(name) for name in KEY], sort_keys=True)


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What lines are sorted by: cells that differ in nothing but the seed stand together."""
    names = ("suite", "agent", "policy", "task", "kl_coef", "num_envs", "budget_tokens")
    budget = cell["budget_seconds"] or 0.0
    return *(cell[name] for name in names), budget, json.dumps(cell["config"], sort_keys=True), cell["seed"]


def check_agents(plan: Plan, keys: Sequence[dict[str, Any]]) -> None:
    """Makes each agent once, so that what is wrong with it is told now and not by a table of failures.

    Raises:
        ValueError: Naming the agent and its settings.
    """
    for key in {key["agent"]: key for key in keys}.values():
        make = load_agent(key["agent"])
        envs = make_envs(plan.contents, key["task"], key["num_envs"], kl_coef=key["kl_coef"])
        try:
            make(envs, policy=make_policy(envs, key["policy"], 0), seed=0, **key["config"])
        except Exception as error:
            settings = "".join(f", {name}={value}" for name, value in key["config"].items())
            raise ValueError(
                f"--agents {key['agent']} cannot be made as Agent(envs, policy=model, seed=0{settings}): "
                f"{describe(error).partition(': ')[2]}"
            ) from error


def rerun(out: Path, line: int, stories: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Runs a finished cell again.

    Args:
        out: The directory.
        line: Of ``results.jsonl``, from 1.
        stories: As in `Plan`.

    Returns:
        The cell, and what is not the same now, measures with both values; nothing where all numbers are equal.

    Raises:
        ValueError: If there is no such line, or what it used is not there or not the same.
    """
    cells = read_cells(out / RESULTS)
    if not 1 <= line <= len(cells):
        raise ValueError(f"--rerun takes lines of {out / RESULTS}, which has {len(cells)}, got {line}")
    cell = cells[line - 1]
    if cell["task"] not in suite_named(cell["suite"], stories).tasks:
        raise ValueError(
            f"--rerun {line} is a cell of the task {cell['task']}; give --stories the directory of its model"
        )
    _refuse_others(out / RESULTS, [cell], _used([cell], stories))
    ((_, found),) = run_cells(functools.partial(run_cell, stories=stories), [{name: cell[name] for name in KEY}])
    different = [name for name in ("status", "failure", "curve") if found[name] != cell[name]]
    for name in dict.fromkeys((*cell["metrics"], *found["metrics"])):
        now, then = found["metrics"].get(name), cell["metrics"].get(name)
        different += [] if now == then else [f"{name} {now} (was {then})"]
    return cell, different


def _of_dead_process(key: dict[str, Any], code: int) -> dict[str, Any]:
    failure = f"exception: ProcessDied: twice, with exit code {code}"
    found = {"settings": {}, "status": "failed", "failure": failure, "metrics": {}, "curve": []}
    return found | {"seconds": {}, "curve_seconds": []}


def _used(keys: Sequence[dict[str, Any]], stories: str | None) -> dict[str, str]:
    """What cells use beyond this package: the hash of each agent's file and, as "Stories", of the model of that task."""
    found = {agent: file_hash(agent) for agent in dict.fromkeys(key["agent"] for key in keys)}
    if stories is not None and any(key["task"] == "Stories" for key in keys):
        found["Stories"] = model_hash(stories)
    return {name: digest for name, digest in found.items() if digest is not None}


def _refuse_others(path: Path, cells: Iterable[dict[str, Any]], used: dict[str, str]) -> None:
    """Whatever --allow-mixed says: that is for one agent on other versions, and this is another agent of its name."""
    for cell in cells:
        for name, then in cell.get("sha256", {}).items():  # cells of old have none
            if used.get(name, then) != then:
                raise ValueError(
                    f"{path} holds cells of another {name} (SHA-256 {then}, now {used[name]}). Choose another --out, put "
                    "back what they were measured with, or delete those lines, and they are measured again"
                )


def _refuse_mixing(path: Path, cells: Sequence[dict[str, Any]], now: dict[str, Any]) -> None:
    def flat(record: dict[str, Any]) -> dict[str, Any]:
        return {name: record.get(name) for name in ("commit", "python", "machine")} | (record.get("versions") or {})

    for cell in cells:
        then, here = flat(cell), flat(now)
        changed = [f"{name} {then.get(name)} (now {value})" for name, value in here.items() if then.get(name) != value]
        if changed:
            raise ValueError(
                f"{path} holds cells measured with {', '.join(changed)}: their numbers may differ. Choose another "
                "--out, or add --allow-mixed to put new cells beside them (each says what it was measured with)"
            )


@contextlib.contextmanager
def _directory(out: Path) -> Iterator[None]:
    """Makes the directory, and takes it away again where a refusal leaves it empty."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; results need a directory, choose another one")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except ValueError:
        if is_new:
            with contextlib.suppress(OSError):  # something is in it
                out.rmdir()
        raise


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Two runs in a directory would measure the same cells. The lock ends with its process, whatever ends that."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another benchmark is at work in {out}; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(folder)
