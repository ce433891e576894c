"""A benchmark's directory as pictures, tables in Markdown and one self-contained page; ``rlhf-gym plot DIR``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_gym.atomic import write_text
from rlhf_gym.report import Section, html_report

from .figures import efficiency, improvement_map, iqm_intervals, profiles
from .outcomes import RESULTS, Run, Suite, Task, read_suites
from .statistics import bootstrap
from .tables import (
    BY,
    REACHED,
    Table,
    as_markdown,
    by_task,
    failures,
    in_brackets,
    measures,
    overview,
    regrets,
    settings_of,
)
from .tradeoffs import gold_against_proxy, reward_against_kl

RULES = (
    "Every run counts. A failed run leaves one with the reference, so it scores 0, or what it was last seen to score "
    "if that is less. The IQM is the mean of the middle half of an agent's runs on all tasks; its interval comes from "
    "runs drawn again within each task (stratified bootstrap, Agarwal et al. 2021)."
)
KNOWN = "Scores are normalised: 0 is the reference, 1 the exact optimum."
RELATIVE = (
    "No optimum is known, so the score of a run is its objective (mean score less β times its KL) on a scale where 0 "
    "is the reference and 1 the best agent's mean on that task in this table: it changes when a better agent joins."
)
COLUMNS = (
    f"Tokens and seconds to {REACHED:g}: the first recorded point of a learning curve by which the IQM of the scores "
    "last measured is there, to two digits. Nothing is known between two points, so it may be late by their distance. "
    "Seconds are those of learning, on the machine below and with what else ran on it."
)
FEW = 5  # seeds; resampling fewer finds too little of their spread


def write_report(directory: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write ``report.html``, ``table.md`` and a PNG for each picture.

    Args:
        directory: What ``rlhf-gym benchmark`` has written; it may still be at work.
        out: Where to; None is the same directory.

    Returns:
        The files, the page first.

    Raises:
        ValueError: If there is nothing to show, see `read_suites`.
    """
    suites = read_suites(directory)
    out = Path(directory if out is None else out)
    out.mkdir(parents=True, exist_ok=True)
    sections, markdown, files = [], [], []
    for suite in suites:
        markdown.append(f"## {suite.name}")
        for name, section in sections_of(suite):
            if section.figure is not None:
                files.append(out / f"{suite.name}-{name}.png")
                section.figure.savefig(files[-1], dpi=130)
            if section.rows:
                markdown += [f"### {section.title}", section.text, as_markdown(section.header, section.rows)]
            title = f"{suite.name}: {section.title}" if len(suites) > 1 else section.title
            sections.append(dataclasses.replace(section, title=title))
    page = html_report("Agents on one table", " ".join(map(finding, suites)), sections, measured_with(suites))
    write_text(out / "report.html", page)
    write_text(out / "table.md", "\n\n".join(filter(None, [*markdown, measured_with(suites)])) + "\n")
    return [out / "report.html", out / "table.md", *files]


def finding(suite: Suite) -> str:
    """A suite in a sentence or two."""
    failed = sum(run.failure is not None for run in suite.runs)
    names = len({task.name for task in suite.tasks})
    text = (
        f"`{suite.name}`: {_count(len(suite.agents) + len(suite.unrated), 'agent')} on {_count(names, 'task')}, "
        f"{_count(len(suite.runs), 'run')}, of which {failed} failed."
    )
    if suite.agents:
        best = bootstrap(list(suite.scores(suite.agents[0]).values()))
        text += f" Best: {suite.agents[0]}, IQM {in_brackets(best)}."
    most = max(len(suite.of(agent)) for agent in [*suite.agents, *suite.unrated])
    short = [agent for agent in [*suite.agents, *suite.unrated] if len(suite.of(agent)) < most]
    if short:
        text += f" Not finished, and so not to be compared yet: {', '.join(short)}."
    return text


def sections_of(suite: Suite) -> Iterator[tuple[str, Section]]:
    """The parts of a suite: a name for the picture's file, and the part."""
    if suite.agents:
        known = f"{RULES}\n\n{RELATIVE if suite.relative else KNOWN}"
        if min(len(scores) for agent in suite.agents for scores in suite.scores(agent).values()) < FEW:
            known += f" There are fewer than {FEW} seeds: such intervals are too narrow."
        sampled = [agent for agent in suite.agents if any(_is_estimate(run) for run in suite.of(agent))]
        if sampled:
            known += f" Normalised scores of {', '.join(sampled)} are partly estimates from samples."
        known += f"\n\n{COLUMNS}"
        caption = "Interquartile mean of an agent's runs: dot; its 95 % interval: line. Arrows: what goes on, or is, off the axis."
        yield "iqm", Section("All tasks together", known, iqm_intervals(suite), caption, *overview(suite), numbers=True)
        small = "Blue: the agent named above the panel, with its 95 % interval. Grey: the others. "
        ended = (
            "Straight lines between points that were measured. A run that has ended keeps its final score, and a "
            "failed one what it counts; an agent that learns nothing is a flat line"
        )
        captions = {
            "tokens": f"{small}Score by the training tokens generated. {ended}; budgets differ between tasks. What is "
            "far below the reference is not shown.",
            "seconds": f"{small}Score by the time of learning, without that of measuring. {ended}. Seconds depend on "
            "the machine, and on how many runs shared it. What is far below the reference is not shown.",
        }
        for by, title in zip(BY, ("Sample efficiency", "Time efficiency"), strict=True):
            picture = efficiency(suite, by)
            if picture is not None:
                yield by, Section(title, "", picture, captions[by])
        than = "score more than the value on the x axis"
        if not suite.relative:
            than = "are nearer to the optimum than the value on the x axis, which falls to the right"
        caption = f"{small}The share of an agent's runs that {than}: higher is better."
        yield "profiles", Section("Performance profiles", "", profiles(suite), caption)
        if len(suite.agents) > 1:
            caption = (
                "Probability that a run of one agent scores more than a run of another on the same task, the mean over "
                "tasks; ties are half. Bold: the 95 % interval leaves out 50 %. It says how often, not by how much."
            )
            yield "improvement", Section("Pair by pair", "", improvement_map(suite), caption)
        yield from _tradeoffs(suite)
    yield from _tables(suite)


def _is_estimate(run: Run) -> bool:
    """Whether its distance from a known optimum was estimated from samples."""
    metrics = run.cell.get("metrics") or {}
    return "normalised" in metrics and metrics.get("exact") is False


def _tradeoffs(suite: Suite) -> Iterator[tuple[str, Section]]:
    groups = suite.groups()
    caption = (
        "Mean score against KL to the reference; a point is the mean of an agent's runs. An arrow at the right edge is "
        "one further out, with its KL beside its name."
    )
    if suite.relative:
        caption += " Where no optimum is known a panel ends soon after the KL that is worth its price."
    else:
        caption += (
            " Nothing can be above the frontier. An agent without a name has reached a normalised score of .99 in "
            "every run."
        )
    for i, tasks in enumerate(groups):
        name = f"kl-{i + 1}" if len(groups) > 1 else "kl"
        yield name, Section(f"Reward against KL{_part(i, groups)}", "", reward_against_kl(suite, tasks), caption)
    picture = gold_against_proxy(suite)
    if picture is not None:
        caption = (
            "The score that was meant against the score that was paid for; a point is the mean of an agent's runs. To "
            "the right and down: the proxy rises and the gold falls."
        )
        yield "gold", Section("Gold against proxy", "", picture, caption)


def _tables(suite: Suite) -> Iterator[tuple[str, Section]]:
    groups = suite.groups()
    means = "Means over seeds ± half of Student's 95 % interval"
    for i, tasks in enumerate(groups):
        part = _part(i, groups)
        yield "", _section(f"Task by task{part}", f"Scores. {means}.", by_task(suite, tasks))
        found = regrets(suite, tasks)
        if found:
            text = f"J* - J. {means}; failed runs as far as they could be measured."
            yield "", _section(f"Regret to the optimum{part}", text, found)
    if suite.relative:
        for task in suite.tasks:
            text = f"As measured. {means}; failed runs as far as they could be."
            yield "", _section(str(task), text, measures(suite, task))
    if suite.unrated:
        text = (
            f"{', '.join(suite.unrated)}: no policy to read, only actions, so the KL is unknown and with it the "
            "objective. The mean score without any penalty stands in the tables by task as `raw`."
        )
        yield "", Section("Not rated", text)
    if any(run.failure is not None for run in suite.runs):
        text = "`kl`: too far from the reference; `nan`: weights or measures that are no finite numbers."
        yield "", _section("Runs that failed", text, failures(suite), numbers=False)
    yield "", _section("Settings", "", settings_of(suite), numbers=False)


def _section(title: str, text: str, table: Table, numbers: bool = True) -> Section:
    return Section(title, text, header=table.header, rows=table.rows, numbers=numbers)


def measured_with(suites: Sequence[Suite]) -> str:
    """Commits, versions and machines of the cells, and how to have them again."""
    cells = [run.cell for suite in suites for run in suite.runs]
    parts = []
    for name in ("commit", "python", "machine"):
        values = sorted({str(cell[name]) for cell in cells if cell.get(name)})
        parts += [f"{name} {', '.join(values)}"] if values else []
    versions = sorted({f"{name} {value}" for cell in cells for name, value in (cell.get("versions") or {}).items()})
    return (
        f"Measured with {'; '.join([*parts, ', '.join(versions)])}. Made by `rlhf-gym plot` from `{RESULTS}`; "
        "`rlhf-gym benchmark --out DIR --rerun LINE` runs the cell of a line of it again and compares."
    )


def _part(i: int, groups: Sequence[Sequence[Task]]) -> str:
    return f" ({i + 1} of {len(groups)})" if len(groups) > 1 else ""


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")
