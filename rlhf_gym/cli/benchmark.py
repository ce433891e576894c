"""``rlhf-gym benchmark``: agents x tasks x seeds in a directory, of which what is missing is run."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rlhf_gym.cli.options import Benchmark
from rlhf_gym.cli.setup import quiet_transformers


def run(options: Benchmark) -> int:
    """Run the missing cells, or some again; returns the exit code."""
    from rlhf_gym.benchmarks.contestants import settings_of
    from rlhf_gym.benchmarks.progress import Progress
    from rlhf_gym.benchmarks.runner import RESULTS, Plan
    from rlhf_gym.benchmarks.runner import run as run_plan

    quiet_transformers()
    out = Path(options.out).expanduser()
    if options.rerun is not None:
        return max(run_again(out, line, options.stories) for line in options.rerun)
    plan = Plan(
        suite=options.suite,
        agents=options.agents,
        settings=settings_of(options.agents, options.config),
        num_seeds=options.seeds,
        tasks=options.tasks,
        policy=options.policy,
        num_envs=options.num_envs,
        budget_tokens=options.budget_tokens,
        budget_seconds=options.budget_seconds,
        tune=options.tune,
        stories=options.stories,
    )
    progress = Progress(options.progress_bar and sys.stderr.isatty())
    try:
        cells = run_plan(plan, out, jobs=options.jobs, progress=progress, allow_mixed=options.allow_mixed)
    except KeyboardInterrupt:
        finished = f"{len(progress.cells)} of {len(progress.keys)} cells of {progress.title} are in {out}"
        raise KeyboardInterrupt(f"interrupted; {finished}, and the same command goes on") from None
    print("\n".join(summary(cells, out / RESULTS)))
    return 0


def summary(cells: list[dict[str, Any]], path: Path) -> list[str]:
    """How many cells there are, which have failed, and whether they belong together, a line each."""
    failures = Counter((cell["agent"], cell["failure"]) for cell in cells if cell["failure"])
    lines = [f"{path}: {len(cells)} cells, {failures.total()} failed; rlhf-gym plot {path.parent} draws them"]
    lines += [f"{agent} failed {count} times: {failure}" for (agent, failure), count in sorted(failures.items())]
    commits = Counter(str(cell["commit"]) for cell in cells)
    if len(commits) > 1:
        parts = ", ".join(f"{commit} ({count})" for commit, count in sorted(commits.items()))
        lines.append(f"they were measured with {len(commits)} commits: {parts}")
    return lines


def run_again(out: Path, line: int, stories: str | None) -> int:
    """Print whether a cell's numbers are the same again; returns the exit code."""
    from rlhf_gym.benchmarks.runner import rerun

    cell, different = rerun(out, line, stories)
    what = f"line {line}: {cell['agent']} {cell['task']} {cell['kl_coef']:g} seed {cell['seed']}"
    print(f"{what}: {'not the same: ' + ', '.join(different) if different else 'the same numbers again'}", flush=True)
    return 1 if different else 0
