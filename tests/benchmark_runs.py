"""Cells and directories of a benchmark as the runner writes them, made up."""

from __future__ import annotations

import json

import numpy as np

from rlhf_gym.benchmarks.outcomes import read_suites

HOSTILE = "agents.py:<script>alert(1)</script>"


def cell(agent="ppo", task="WoAiNi", seed=0, normalised=None, *, suite="exact", kl_coef=0.1, **others):
    """A cell as the runner writes it."""
    key = {
        "suite": suite, "agent": agent, "policy": "tabular", "task": task, "kl_coef": kl_coef, "seed": seed,
        "num_envs": 64, "budget_tokens": 1000, "budget_seconds": None, "config": {},
    }  # fmt: skip
    metrics = {} if normalised is None else {"normalised": normalised, "reward": 0.5, "kl": 1.0, "regret": 0.1}
    curve = [] if normalised is None else curve_of([0, 500, 1000], [0.0, normalised / 2, normalised])
    values = {"status": "ok", "failure": None, "metrics": metrics, "curve": curve, "commit": "abc1234"}
    return key | values | others


def curve_of(tokens, normalised):
    return [{"tokens": x, "normalised": y, "kl": 0.1 * y} for x, y in zip(tokens, normalised, strict=True)]


def sampled(agent, seed, score, kl, *, gold=None, kl_coef=0.5):
    """A cell of a task whose optimum is unknown; the reference scores 0.2."""
    curve = [{"tokens": 0, "score": 0.2, "kl": 0.0}, {"tokens": 1000, "score": score, "kl": kl}]
    metrics = {"score": score, "kl": kl} | ({} if gold is None else {"gold": gold})
    return cell(agent, "Reviews", seed, suite="small", kl_coef=kl_coef, metrics=metrics, curve=curve)


def failed(agent="ppo", seed=0, curve=(), metrics=(), failure="nan", **others):
    others = {"metrics": dict(metrics), "curve": list(curve), "status": "failed", "failure": failure} | others
    return cell(agent, seed=seed, **others)


def write(directory, cells, seconds=True, torn="", slow=()):
    """Their files; a point of a curve a second, but for the seeds in ``slow``, where it takes so many."""
    directory.mkdir(exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in cells) + torn)
    if seconds:
        each_takes = [dict(slow).get(each["seed"], 1.0) for each in cells]
        lines = [
            each | {"seconds": {"total": 3.0 * time}, "curve_seconds": [time * i for i in range(len(each["curve"]))]}
            for each, time in zip(cells, each_takes, strict=True)
        ]
        (directory / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return directory


def suite_of(directory, cells, **others):
    (suite,) = read_suites(write(directory, cells, **others))
    return suite


def full_directory(path):
    """Two agents and three tasks, a failure, gold, a second suite; the last lines half-written."""
    cells, rng = [], np.random.default_rng(0)
    for agent, level in (("ppo", 0.995), (HOSTILE, 0.5)):
        for task, others in (("WoAiNi", {}), ("Brackets", {}), ("Goodhart", {"gold": -1.0})):
            for seed in range(2):
                each = cell(agent, task, seed, level - 0.004 * rng.random())
                each["metrics"] |= others
                cells.append(each)
    cells += [failed(HOSTILE, seed=2, curve=curve_of([0, 400], [0, 0.3]), metrics={"kl": 50.0, "reward": 0.1})]
    cells += [cell("blind", metrics={"reward": 0.93, "exact": False}, curve=[])]
    cells += [sampled(agent, seed, 0.5 + seed / 10, 0.3, gold=0.4) for agent in ("ppo", "trpo") for seed in range(2)]
    return write(path, cells, torn='{"suite": "exact", "agent": "ppo", "po')
