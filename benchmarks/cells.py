"""A table that is measured cell by cell: a JSON line for each, so that what was interrupted goes on where it was."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_gym.atomic import write_json, write_text

# What a commit has to touch for numbers to be other ones: code, and the weights, texts and prompts beside it.
CODE = (
    ":/*.py", ":/rlhf_gym", ":/examples", ":/pyproject.toml", ":/setup.cfg", ":/constraints.txt",
    ":(top,exclude)tests",
)  # fmt: skip


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a file, in its order; none where there is no file.

    A last line without its end, which a killed process leaves behind, is not a cell.

    Raises:
        ValueError: If another line is no JSON object.
    """
    cells = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            cell = json.loads(line) if line.endswith("\n") else {}
        except json.JSONDecodeError:
            cell = None
        if not isinstance(cell, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object; restore the file, or delete that line")
        cells += [cell] if cell else []
    return cells


def append_cell(path: Path, cell: dict[str, Any]) -> None:
    """Adds one line, whole or not at all for `read_cells`; a torn line before it is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        # One write: lines of two processes that measure into the same file do not mix.
        file.write(json.dumps(cell).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_cells(path: Path, cells: Sequence[dict[str, Any]], order: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces the file by these cells, sorted by ``order``, in one step: it then depends on their content alone."""
    write_text(path, "".join(json.dumps(cell) + "\n" for cell in sorted(cells, key=order)))


def provenance() -> dict[str, Any]:
    """What figures are measured with. ``commit`` is the last of the package that touched its code, with ``-dirty`` where
    that has been changed since; None where it is installed from no checkout of its own."""
    packages = ("torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "machine": platform.machine(),
    }


def write_figures(path: Path, name: str, argv: Sequence[str] | None, found: Mapping[str, Any]) -> None:
    """Writes what ``python -m rlhf_gym.benchmarks.<name>`` measured: its command, its `provenance` and the figures.

    Args:
        path: A JSON file.
        name: The module's.
        argv: What it was called with; None for the command line's.
        found: The figures.
    """
    command = shlex.join(["python", "-m", f"rlhf_gym.benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)])
    write_json(path, {"command": command, **provenance(), **found})


def _commit() -> str | None:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # there is no git
            return None
        return None if done.returncode else done.stdout.strip()

    # An installed package may lie in a checkout of something else.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    changed = git("diff", "--quiet", "HEAD", "--", ":/*.py") is None
    return f"{git('log', '-1', '--format=%h', '--', *CODE)}{'-dirty' if changed else ''}"


def failed_score(seen: Sequence[float], reference: float = 0.0) -> float:
    """What a failed cell counts: it leaves one with the reference, or worse.

    Args:
        seen: What it was seen to score, the last at the end.
        reference: What the reference scores.
    """
    return min(reference, seen[-1]) if seen else reference


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % Student interval; NaN for a single value."""
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(half)
