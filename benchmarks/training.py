"""One cell of a benchmark: an agent is trained once and measured, whatever becomes of it.

What it uses is counted on the environment itself, so an agent cannot miscount: generated tokens, responses that the
reward has scored, and seconds without those of the measurements. Failures are results. ``failure`` is "nan" (a weight
that is NaN or infinite, or a measure that is), "kl" (the policy is more than `KL_BOUND` nats for each token of the
longest response from the reference) or "exception: TYPE: MESSAGE". A failed cell has the metrics that could still be
measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .contestants import load_agent
from .suites import make_envs, make_policy, measure, suite_named

KL_BOUND = 5.0
NUM_POINTS = 12
PHASES = {"time/rollout": "rollout", "time/update": "update", "time/audit": "audit"}


class OverBudget(RuntimeError):
    """An agent goes on long after its budget is spent."""


class Meter:
    """Counts what is used of an environment, and stops an agent that does not stop by itself.

    Args:
        envs: One of our vector environments; its process is changed in place.
        budget_tokens: Tokens to generate. Agents collect whole rollouts and end a little above; at twice the budget, or
            at four episodes in every row if that is more, the environment raises `OverBudget`.
        budget_seconds: Seconds to train, None for no limit; the environment raises at twice as many.

    Attributes:
        tokens: Response tokens generated so far.
        reward_calls: Responses scored so far.
        reward_seconds: What that took.
    """

    def __init__(self, envs: Any, budget_tokens: int, budget_seconds: float | None = None):
        self.budget_tokens, self.budget_seconds = budget_tokens, budget_seconds
        self.tokens = self.reward_calls = 0
        self.reward_seconds = 0.0
        process = envs.unwrapped.process
        self._limit = max(2 * budget_tokens, budget_tokens + 4 * envs.num_envs * process.max_response_tokens)
        self._started, self._paused, self._is_paused, self._in_step = time.perf_counter(), 0.0, False, False
        step, score = process.step, process.scorer.score

        def metered_step(actions: Any, active: Any = None) -> Any:
            self._in_step = True
            try:
                transition = step(actions, active)
            finally:
                self._in_step = False
            self._count(process.num_rows if active is None else int(active.sum()))
            return transition

        def metered_score(prompts: Any, responses: Any, ended_by_eos: Any) -> Any:
            start = time.perf_counter()
            scored = score(prompts, responses, ended_by_eos)
            if not self._is_paused:
                self.reward_seconds += time.perf_counter() - start
                self.reward_calls += len(responses)
                if not self._in_step:  # whole responses at once
                    self._count(sum(map(len, responses)))
            return scored

        process.step, process.scorer.score = metered_step, metered_score

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self.tokens > self._limit:
            raise OverBudget(f"it has generated {self.tokens} tokens of {self.budget_tokens} and goes on")
        if self.budget_seconds is not None and self.seconds > 2 * self.budget_seconds and not self._is_paused:
            raise OverBudget(f"it has learnt for twice its {self.budget_seconds:g} seconds and goes on")

    @property
    def seconds(self) -> float:
        """Since the start, without the pauses."""
        return time.perf_counter() - self._started - self._paused

    @property
    def spent(self) -> float:
        """Share of the budget that is used up: tokens or seconds, whichever is more."""
        by_time = self.seconds / self.budget_seconds if self.budget_seconds else 0.0
        return max(self.tokens / self.budget_tokens, by_time)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Inside nothing counts."""
        start, self._is_paused = time.perf_counter(), True
        try:
            yield
        finally:
            self._is_paused = False
            self._paused += time.perf_counter() - start


def run_cell(
    suite: str, agent: str, policy: str, task: str, kl_coef: float, seed: int, num_envs: int, budget_tokens: int,
    budget_seconds: float | None, config: dict[str, Any], stories: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains once and measures; the arguments are the cell's key.

    Returns:
        ``settings``, ``status``, ``failure``, ``metrics`` and ``curve``, which depend on nothing but the key and the
        versions (with a budget in seconds on the machine, too), and ``seconds`` and ``curve_seconds``.
    """
    tasks = suite_named(suite, stories)
    failure: str | None = None
    learner: Any = None
    settings: dict[str, Any] = {}
    curve: list[dict[str, float]] = []
    curve_seconds: list[float] = []
    with _seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envs = make_envs(tasks, task, num_envs, kl_coef=kl_coef)
        envs.reset(seed=seed)  # for agents that forget to: every one sees the same prompts
        model = make_policy(envs, policy, seed)
        meter, phases = Meter(envs, budget_tokens, budget_seconds), dict.fromkeys(PHASES.values(), 0.0)

        def look(quick: bool) -> dict[str, Any]:
            with meter.pause():
                found = measure(learner, envs, tasks, task, kl_coef, seed=seed, quick=quick)
            names = ("normalised", "score", "gold", "kl")
            point = {name: round(found[name], 6) for name in names if name in found}
            if point and all(map(math.isfinite, point.values())):
                if curve and curve[-1]["tokens"] == meter.tokens:  # looked at before, and now with more care
                    curve.pop(), curve_seconds.pop()
                curve.append({"tokens": meter.tokens, **point})
                curve_seconds.append(round(meter.seconds, 3))
            return found

        def after_update(learner: Any, metrics: dict[str, float]) -> bool:
            for name, phase in PHASES.items():
                phases[phase] += metrics.get(name, 0.0)
            if meter.spent >= 1 or not has_sound_weights(learner):
                return False
            if meter.spent >= len(curve) / NUM_POINTS:
                look(quick=True)
            return True

        try:
            learner = load_agent(agent)(envs, policy=model, seed=seed, **config)
            settings = all_settings(learner)
            look(quick=tasks.is_exact)  # where only samples tell, the zero of the scale deserves as many as the end
            learner.learn(budget_tokens, callback=after_update)
        except Exception as error:
            failure = describe(error)
        seconds = {"total": meter.seconds, **phases, "reward": meter.reward_seconds}
        seconds = {name: round(value, 3) for name, value in seconds.items()}
        metrics: dict[str, Any] = {}
        try:
            metrics = {} if learner is None else look(quick=False)
        except Exception as error:
            failure = failure or describe(error)
    usage = {"tokens": meter.tokens, "reward_calls": meter.reward_calls}
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if len(known) < len(metrics) or not has_sound_weights(learner):
        failure = "nan"
    elif failure is None and known.get("kl", 0.0) > KL_BOUND * envs.unwrapped.max_response_tokens:
        failure = "kl"
    return {
        "settings": settings, "status": "failed" if failure else "ok", "failure": failure, "metrics": known | usage,
        "curve": curve, "seconds": seconds, "curve_seconds": curve_seconds,
    }  # fmt: skip


def all_settings(learner: Any) -> dict[str, Any]:
    """All settings of an agent, its defaults included: of its ``config``, a dataclass or a dict, what JSON can hold."""
    config = getattr(learner, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    found = {}
    for name, value in config.items() if isinstance(config, dict) else ():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = json.loads(json.dumps(value, allow_nan=False))
    return found


def has_sound_weights(learner: Any) -> bool:
    """Whether no weight of its ``policy_model`` is NaN or infinite; True where there is no model.

    Minus infinity is sound: in a table it stands for a token that is never chosen.
    """
    model = getattr(learner, "policy_model", None)
    return model is None or all(bool((p < torch.inf).all()) for p in model.parameters())


def describe(error: Exception) -> str:
    """Type and message of an error in one line, without what changes from run to run: folders and addresses."""
    if os.environ.get("RLHF_GYM_TRACEBACK"):
        traceback.print_exception(error, file=sys.stderr)
    message = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(str(error).split()))
    message = re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/][\w.\-]+)+[\\/]", "", message)
    return f"exception: {type(error).__name__}: {message}"[:300]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators are seeded, for agents that draw from them; afterwards the caller's are back."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
