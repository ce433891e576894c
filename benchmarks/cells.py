"""A table that is measured cell by cell: a JSON line for each, so that what was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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


def run_cells(
    function: Callable[..., dict[str, Any]], keys: Sequence[dict[str, Any]], jobs: int = 1
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Calls ``function(**key)`` for every key, on one thread each.

    Threads add up in another order when there are more of them; with one, a result does not depend on ``jobs``.

    Args:
        function: A function of a module. Its randomness comes from its arguments.
        keys: Arguments of the calls.
        jobs: Processes side by side. 1: in this process.

    Yields:
        A key and its result, as they are finished.
    """
    if jobs == 1:
        for key in keys:
            yield key, _on_one_thread(function, key)
        return
    # Read by the libraries when a process imports them.
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_on_one_thread, function, key): key for key in keys}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # An error or Ctrl-C in one: those that wait would otherwise still be run.
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _on_one_thread(function: Callable[..., dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        return function(**key)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % Student interval; NaN for a single value."""
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(half)
