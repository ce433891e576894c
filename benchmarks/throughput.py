"""How fast this machine trains and generates, side by side with peers in the same run.

    python -m rlhf_gym.benchmarks.throughput                                  # all cases
    python -m rlhf_gym.benchmarks.throughput ppo-small rollout --rounds 5 --out benchmarks/results/throughput.json

Each side is a process of its own, and they take turns: one round of everyone, then the next, so that a slower moment of
the machine is everyone's. Figures are medians; a ratio is one of medians of the same run. TRL is installed, once, into an
environment of its own (``--peer-python`` names one that is there already).
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
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf_gym.atomic import write_json

from .cells import provenance
from .throughput_cases import CASES, Side

PEERS = Path(__file__).with_name("throughput_peers.py")
TRL = "1.12.0"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; all when left out")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--peer-python", type=Path, help=f"Python of an environment with trl=={TRL}")
    parser.add_argument(
        "--out", type=Path, help="also write the figures to this JSON file, beside those of other cases"
    )
    options = parser.parse_args(argv)
    for name in options.cases:
        if name not in CASES:
            parser.error(f"CASE must be one of {', '.join(CASES)}, got {name!r}")
    rates = machine_rates(options.threads)
    print(f"{options.threads} threads; " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()), flush=True)
    for name in options.cases or CASES:
        sides = CASES[name]
        peer = options.peer_python or (peer_python() if any(side.peer for side in sides) else None)
        found = measure(sides, peer, options.rounds, options.threads)
        print(f"\n{name}\n" + "\n".join(table(sides, found)), flush=True)
        if options.out:
            kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
            kept[name] = {
                "sides": found,
                "rates": rates,
                "threads": options.threads,
                "rounds": options.rounds,
                **provenance(),
            }
            write_json(options.out, kept)


def measure(sides: list[Side], peer: Path | None, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Each side's medians over the rounds, by its name; the first round is not counted."""
    answers: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    with contextlib.ExitStack() as stack:
        # A side that is heavy in memory runs when the others are gone.
        together = not any(side.alone for side in sides)
        workers = {side.name: stack.enter_context(worker(side, peer, threads)) for side in sides} if together else {}
        for number in range(rounds + 1) if together else []:
            for side in sides:
                found = ask(workers[side.name], side)
                if number:
                    answers[side.name].append(found)
    if not together:
        for side in sides:
            with worker(side, peer, threads) as process:
                answers[side.name] = [ask(process, side) for _ in range(rounds + 1)][1:]
    return {name: summary(found) for name, found in answers.items()}


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a side's answers, with all its seconds."""
    seconds = [each["seconds"] for each in answers]
    phases = {
        name: statistics.median(each["phases"][name] for each in answers) for name in answers[0].get("phases", {})
    }
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": statistics.median(each["tokens"] / each["seconds"] for each in answers),
        "memory_mib": max(each["memory_mib"] for each in answers),
        "phases": phases,
        "all_seconds": [round(each, 4) for each in seconds],
    }


@contextlib.contextmanager
def worker(side: Side, peer: Path | None, threads: int) -> Iterator[subprocess.Popen]:
    """The process of a side, once it is ready."""
    command = (
        [str(peer), "-I", str(PEERS)] if side.peer else [sys.executable, "-m", "rlhf_gym.benchmarks.throughput_ours"]
    )
    # Threads that spin while the other side works would take its time.
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [*command, json.dumps(side.case | {"threads": threads})], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE if not os.environ.get("RLHF_GYM_TRACEBACK") else None,
    )  # fmt: skip
    try:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{side.name} did not start: {_last_words(process)}")
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen, side: Side) -> dict[str, Any]:
    """One measurement."""
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{side.name} has ended: {_last_words(process)}")
    return json.loads(line)


def _last_words(process: subprocess.Popen) -> str:
    process.kill()
    return process.stderr.read().strip()[-500:] if process.stderr else "see above"


def table(sides: list[Side], found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows; the ratio is that of tokens per second to the first side's."""
    first = found[sides[0].name]["tokens_per_second"]
    lines = ["| | seconds | tokens/s | ours is faster by | peak memory, MiB | phases, s |", "|---|---|---|---|---|---|"]
    for side in sides:
        each = found[side.name]
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in each["phases"].items())
        ratio = f"{first / each['tokens_per_second']:.2f}x" if side is not sides[0] else ""
        lines.append(
            f"| {side.name} | {each['seconds']:.3g} | {each['tokens_per_second']:,.0f} | {ratio} | "
            f"{each['memory_mib']:,.0f} | {phases} |"
        )
    return lines


def machine_rates(threads: int) -> dict[str, float]:
    """What the processor reaches on the spot: matrix products in GFLOP/s by precision, and a copy in GB/s."""
    torch.set_num_threads(threads)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        rates[f"{str(dtype).removeprefix('torch.')} GFLOP/s"] = 2 * 2048**3 / _best(lambda a=a, b=b: a @ b.t()) / 1e9
    source, target = torch.ones(2**26), torch.empty(2**26)
    rates["copy GB/s"] = 2 * source.numel() * 4 / _best(lambda: target.copy_(source)) / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def _best(work: Any, repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def peer_python() -> Path:
    """Python of the peers' environment, which is made when it is not there: this torch, and TRL."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "rlhf_gym" / f"trl-{TRL}-py{platform.python_version()}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        print(f"installing trl=={TRL} into {folder}, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first and pinned: left to itself pip takes the build for GPUs.
        subprocess.run([*install, f"torch=={version('torch').partition('+')[0]}"], check=True)
        subprocess.run([*install, f"trl=={TRL}"], check=True)
        (folder / "complete").touch()
    return python


if __name__ == "__main__":
    main()
