"""How fast this machine trains and generates, side by side with peers in the same run.

    python -m rlhf_gym.benchmarks.throughput                                  # all cases but the heaviest
    python -m rlhf_gym.benchmarks.throughput ppo-small rollout --rounds 5 --out benchmarks/results/throughput.json
    python -m rlhf_gym.benchmarks.throughput --table benchmarks/results/throughput.json    # README's, of what is there

Each side is a process of its own, and they take turns: one round of everyone, then the next, so that a slower moment of
the machine is everyone's. Figures are medians; a ratio is one of medians of the same run. What the machine can do is
measured before each case. TRL is installed, once per version, into an environment of its own (``--peer-python`` names
one that is there already).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf_gym.atomic import write_json

from .cells import provenance
from .throughput_cases import CASES, GPU_CASES, ON_REQUEST, Side
from .throughput_floors import against_hardware, machine_rates
from .throughput_tables import readme_table, table

PEERS = Path(__file__).with_name("throughput_peers.py")
# What a peer's environment holds.
_VERSIONS = """
import importlib.metadata, json
print(json.dumps({name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}))
"""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [name for name in CASES if name not in ON_REQUEST]
    parser.add_argument(
        "cases", nargs="*", metavar="CASE",
        help=f"some of {', '.join(CASES)}; when left out, all but {', '.join(sorted(ON_REQUEST))} (18 GiB of memory; a GPU)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument(
        "--peer-python", type=Path, action="append", default=[], metavar="PYTHON",
        help="Python of an environment with a TRL that is asked for; may be given once per version",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="also write the figures to this JSON file, beside those of other cases"
    )
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the README's table of such a file")
    options = parser.parse_args(argv)
    if options.table:
        print("\n".join(readme_table(json.loads(options.table.read_text()))))
        return
    for name in options.cases:
        if name not in CASES:
            parser.error(f"CASE must be one of {', '.join(CASES)}, got {name!r}")
        if name in GPU_CASES and not torch.cuda.is_available():
            parser.error(f"CASE {name} needs a CUDA device, and torch finds none; leave it out")
    # Not resolved: a virtual environment's Python is a link.
    pythons = {installed(python.absolute())["trl"]: python.absolute() for python in options.peer_python}
    for name in options.cases or usual:
        sides = CASES[name]
        peers = sorted({side.peer for side in sides if side.peer})
        for trl in peers:
            pythons[trl] = pythons.get(trl) or peer_python(trl)
        rates = machine_rates(options.threads, "cuda" if name in GPU_CASES else "cpu")
        answers = measure(sides, pythons, options.rounds, options.threads)
        found = {side.name: summary(side, answers[side.name], rates) for side in sides}
        print(f"\n{name}: {options.threads} threads, " + ", ".join(f"{key} {rate:.3g}" for key, rate in rates.items()))
        print("\n".join(table(sides, found)), flush=True)
        if options.out:
            kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
            kept[name] = {
                "sides": found,
                "rates": rates,
                "threads": options.threads,
                "rounds": options.rounds,
                "peers": [installed(pythons[trl]) for trl in peers],
                **provenance(),
            }
            write_json(options.out, kept)


def measure(sides: list[Side], pythons: dict[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """Each side's answers over the rounds, by its name; the first round is not counted.

    Args:
        sides: Who is asked.
        pythons: Python of the environment of each TRL that the sides name.
        rounds: Answers of each.
        threads: Of each.
    """
    answers: dict[str, Any] = {side.name: [] for side in sides}
    with contextlib.ExitStack() as stack:
        # A side that is heavy in memory runs when the others are gone.
        together = not any(side.alone for side in sides)
        workers = {side.name: stack.enter_context(worker(side, pythons, threads)) for side in sides} if together else {}
        for number in range(rounds + 1) if together else []:
            for side in sides:
                found = workers[side.name]()
                if number:
                    answers[side.name].append(found)
    if not together:
        for side in sides:
            with worker(side, pythons, threads) as ask:
                answers[side.name] = [ask() for _ in range(rounds + 1)][1:]
    return answers


def summary(side: Side, answers: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
    """Medians of a side's answers, with all its seconds."""
    seconds = [each["seconds"] for each in answers]
    phases = {
        name: statistics.median(each["phases"][name] for each in answers) for name in answers[0].get("phases", {})
    }
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": statistics.median(sum(each["lengths"]) / each["seconds"] for each in answers),
        "memory_mib": max(each["memory_mib"] for each in answers),
        "phases": phases,
        **against_hardware(side.case, answers, rates),
        "all_seconds": [round(each, 4) for each in seconds],
    }


@contextlib.contextmanager
def worker(side: Side, pythons: dict[str, Path], threads: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """The process of a side, once it is ready: a function that takes one measurement.

    Raises:
        RuntimeError: If the process ends; with its last words.
    """
    if side.peer:
        command = [str(pythons[side.peer]), "-I", str(PEERS)]
    else:
        command = [sys.executable, "-m", "rlhf_gym.benchmarks.throughput_ours"]
    # OpenMP waits as it does by default: threads spin for a moment and then sleep. So whoever waits for its turn takes
    # nothing of the other's time, and many small operations do not pay for waking threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_WAIT_POLICY", None)
    # The errors go to a file: nobody reads along, and a pipe that is full would stop the process.
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "errors"), "w+") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(side.case | {"threads": threads})], env=environment, text=True,
            cwd=folder if side.peer else None, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip

        def line() -> str:
            found = process.stdout.readline()
            if not found:
                errors.seek(0)
                raise RuntimeError(f"{side.name} has ended: {errors.read().strip()[-2000:]}")
            return found

        def ask() -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("go\n")
                process.stdin.flush()
            return json.loads(line())

        try:
            line()
            yield ask
        finally:
            process.kill()
            process.wait()


def installed(python: Path) -> dict[str, str]:
    """Versions of TRL and of what it stands on in an environment."""
    done = subprocess.run([str(python), "-I", "-c", _VERSIONS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"--peer-python must have trl, torch and transformers, got {python}: {done.stderr.strip()[-300:]}"
        )
    return json.loads(done.stdout)


def peer_python(trl: str) -> Path:
    """Python of a peers' environment, which is made when it is not there: this torch, and that TRL."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "rlhf_gym" / f"trl-{trl}-py{platform.python_version()}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        print(f"installing trl=={trl} into {folder}, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first and pinned: left to itself pip takes the build for GPUs.
        subprocess.run([*install, f"torch=={version('torch').partition('+')[0]}"], check=True)
        subprocess.run([*install, f"trl=={trl}"], check=True)
        (folder / "complete").touch()
    return python


if __name__ == "__main__":
    main()
