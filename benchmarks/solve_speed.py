"""How long an exact optimum takes, and how much memory, by the number of states.

    python -m rlhf_gym.benchmarks.solve_speed --out benchmarks/results/solve_speed.json

The reference is a random trigram model over 20 words; the reward adds up a capped sum of word scores and three keywords
that must all occur. A state is the last two words, the sum, the keywords seen so far and the position, so longer
responses have more of them. Each repeat has a process of its own: the peak of one must not hide that of another.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym

import rlhf_gym
from rlhf_gym.exact import keywords, ngram_from_table, word_scores

from .cells import write_figures

EOS = "<eos>"
WORDS = [f"w{i}" for i in range(20)]
SCORES = {word: 0.1 * (1 + i % 4) for i, word in enumerate(WORDS[3:13])}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write it where asked to; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.solve_speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 48], help="longest responses, in tokens")
    parser.add_argument("--kl-coef", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3, help="of each; the time is their median, the memory the most")
    parser.add_argument("--out", type=Path, help="JSON file for the table, for instance benchmarks/results/x.json")
    options = parser.parse_args(argv)
    if options.repeats < 1 or min(options.lengths) < 1:
        parser.error("--repeats and --lengths must be >= 1")
    rows = []
    for length in options.lengths:
        found = [in_own_process(length, options.kl_coef) for _ in range(options.repeats)]
        most = {name: max(each[name] for each in found) for name in ("peak_mib", "before_mib")}
        rows.append(found[0] | most | {"seconds": statistics.median(each["seconds"] for each in found)})
        rows[-1]["all_seconds"] = [each["seconds"] for each in found]
    print(as_markdown(rows))
    if options.out:
        write_figures(options.out, "solve_speed", argv, {"rows": rows})
    return 0


def make_task(max_response_tokens: int, seed: int = 0) -> gym.Env:
    """The environment; ``seed`` is that of the reference's probabilities."""
    rng = random.Random(seed)  # its random() gives the same numbers in every Python
    followers = [*WORDS, EOS]
    table = {}
    for context in [(), *((first, second) for first in followers for second in WORDS)]:
        weights = [-math.log(1 - rng.random()) for _ in followers]  # normalised: uniform over all distributions
        table[context] = {word: weight / sum(weights) for word, weight in zip(followers, weights, strict=True)}
    return gym.make(
        "rlhf_gym/TextGeneration-v0", model=ngram_from_table(table, eos=EOS), max_response_tokens=max_response_tokens,
        reward={word_scores(SCORES, cap=1.0): 1.0, keywords(WORDS[:3], every=True): 1.0},
    )  # fmt: skip


def in_own_process(max_response_tokens: int, kl_coef: float) -> dict[str, Any]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, max_response_tokens, kl_coef).result()


def measure(max_response_tokens: int, kl_coef: float) -> dict[str, Any]:
    """Solve once, the graph included.

    Returns:
        The size, the optimum, ``seconds``, and in MiB the most memory that this process ever had: ``before_mib`` (Python,
        its libraries and the task) and ``peak_mib`` after solving.
    """
    env = make_task(max_response_tokens)
    before, start = peak_mib(), time.perf_counter()
    solution = rlhf_gym.exact.solve(env, kl_coef)
    seconds = time.perf_counter() - start
    return {
        "max_response_tokens": max_response_tokens, "states": solution.graph.num_states, "vocab_size": len(WORDS) + 1,
        "prefixes": solution.graph.num_prefixes(), "kl_coef": kl_coef, "objective": solution.objective,
        "reward": solution.reward, "kl": solution.kl, "seconds": seconds, "before_mib": before, "peak_mib": peak_mib(),
    }  # fmt: skip


def peak_mib() -> float:
    """The most memory that this process has had resident so far, in MiB."""
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table, a row per size."""
    lines = [
        "| longest response | states | prefixes | J* | seconds | peak memory, MiB | of these before solving |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['max_response_tokens']} | {row['states']:,} | {row['prefixes']:.1e} | {row['objective']:.5f} | "
        f"{row['seconds']:.2f} | {row['peak_mib']:,.0f} | {row['before_mib']:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
