"""One cell of a benchmark: what is counted and measured, and failures that are results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import benchmark_agents
import gymnasium as gym
import numpy as np
import pytest
import torch

import rlhf_gym  # noqa: F401 - registers the ids
from rlhf_gym.benchmarks import training
from rlhf_gym.benchmarks.suites import SUITES, make_envs, measure, scores_by_predict, suite_named
from rlhf_gym.benchmarks.training import Meter, OverBudget, all_settings, describe, run_cell

EXAMPLE = f"{Path(__file__).parents[1] / 'examples' / 'custom_agent.py'}:Reinforce"
KEY = {
    "suite": "exact", "agent": "ppo", "policy": "tabular", "task": "WoAiNi", "kl_coef": 0.1, "seed": 0, "num_envs": 32,
    "budget_tokens": 400, "budget_seconds": None, "config": {"learning_rate": 0.02},
}  # fmt: skip


def fault(name, **changes):
    """A cell of one of the agents in `benchmark_agents`."""
    return run_cell(**(KEY | {"agent": f"benchmark_agents:{name}", "config": {}, "num_envs": 4} | changes))


# ---- randomness


def test_global_generators_are_seeded_and_given_back():
    np.random.seed(1)
    expected = np.random.random(2)
    np.random.seed(1)
    first = np.random.random()
    found = [run_cell(**(KEY | {"agent": EXAMPLE, "config": {}, "seed": seed})) for seed in (3, 3, 4)]
    assert [first, np.random.random()] == expected.tolist()
    assert found[0]["metrics"] == found[1]["metrics"] != found[2]["metrics"]


def test_prompts_depend_on_the_seed_alone():
    benchmark_agents.SeesPrompts.seen.clear()
    for seed in (0, 0, 100):
        fault("SeesPrompts", task="Difficulty", seed=seed, num_envs=16)
    first, again, other = benchmark_agents.SeesPrompts.seen
    assert first == again != other and set(first) == {0, 1, 2, 3}


# ---- failures and budgets


def test_an_exception_is_a_result_without_its_surroundings():
    found = fault("Raises")
    assert found["status"] == "failed" and found["metrics"]["kl"] == 0
    assert found["failure"] == "exception: IndexError: no such row in file.py, see <object object at 0x...>"


def test_nan_is_a_result_and_no_json_of_it_is_written():
    found = fault("BecomesNaN")
    assert (found["status"], found["failure"]) == ("failed", "nan")
    assert "objective" not in found["metrics"] and found["curve"] == [{"tokens": 0, "normalised": 0.0, "kl": 0.0}]
    json.dumps(found, allow_nan=False)


def test_minus_infinity_is_a_weight_of_a_token_that_is_never_chosen():
    learner = benchmark_agents.Idle(None, torch.nn.Linear(2, 1))
    for value, is_sound in ((-torch.inf, True), (torch.inf, False), (torch.nan, False)):
        torch.nn.init.constant_(learner.policy_model.weight, value)
        assert training.has_sound_weights(learner) == is_sound


def test_a_kl_above_the_bound_is_a_result(monkeypatch):
    assert fault("GoesFar")["failure"] is None
    monkeypatch.setattr(training, "KL_BOUND", 2.0)  # nats for each of four tokens
    found = fault("GoesFar")
    # 我我我我: .5 for the first, .2 / 3 for each of the others.
    assert found["failure"] == "kl" and found["metrics"]["kl"] == pytest.approx(
        -math.log(0.5 * (0.2 / 3) ** 3), abs=1e-4
    )


def test_an_agent_that_never_stops_is_stopped():
    found = fault("NeverStops", budget_tokens=100)
    assert found["failure"] == "exception: OverBudget: it has generated 204 tokens of 100 and goes on"
    assert found["metrics"]["tokens"] == 204
    found = fault("NeverStops", budget_tokens=10**9, budget_seconds=0.05)
    assert "twice its 0.05 seconds" in found["failure"]


def test_seconds_end_a_run_too():
    found = run_cell(**(KEY | {"budget_tokens": 10**8, "budget_seconds": 1.0}))
    assert found["failure"] is None and 1 <= found["seconds"]["total"] < 30
    assert len(found["curve"]) >= 2 and found["metrics"]["tokens"] < 10**7


def test_what_is_used_is_counted_on_the_environment():
    """Recall has no EOS: 12 tokens in every response."""
    envs = gym.make_vec("rlhf_gym/Recall-v0", num_envs=3)
    meter = Meter(envs, 100)
    envs.reset(seed=0)
    for _ in range(13):  # in the last one all rows are reset, and no token is generated
        envs.step(np.zeros(3, dtype=int))
    assert (meter.tokens, meter.reward_calls) == (36, 3)
    ids = np.zeros((2, 12), dtype=int)
    prompt = envs.unwrapped.prompts[0].ids
    envs.evaluate_responses([prompt, prompt], ids, ids == 0)
    assert (meter.tokens, meter.reward_calls) == (60, 5)
    with meter.pause():
        envs.evaluate_responses([prompt, prompt], ids, ids == 0)
    assert (meter.tokens, meter.reward_calls) == (60, 5)
    assert meter.spent == pytest.approx(0.6)
    with pytest.raises(OverBudget):
        envs.evaluate_responses([prompt] * 20, np.zeros((20, 12), dtype=int), np.ones((20, 12), dtype=bool))


def test_messages_do_not_change_from_run_to_run():
    assert (
        describe(OSError("no /tmp/x-17/model.bin\n  or ../here/y")) == "exception: OSError: no model.bin or ../here/y"
    )
    assert describe(ValueError("a/b, 1/2 and <T at 0x7f3>")) == "exception: ValueError: a/b, 1/2 and <T at 0x...>"


# ---- measures


def test_a_cell_by_its_identities():
    found = run_cell(**(KEY | {"task": "Difficulty", "kl_coef": 0.3, "budget_tokens": 2000, "num_envs": 64}))
    metrics, curve = found["metrics"], found["curve"]
    rates = np.array([0.9, 0.5, 0.1, 0.01])
    assert metrics["optimum"] == pytest.approx(np.mean(0.3 * np.log1p(rates * np.expm1(1 / 0.3))), abs=1e-6)
    assert metrics["objective"] == pytest.approx(metrics["reward"] - 0.3 * metrics["kl"], abs=1e-9)
    assert metrics["regret"] == pytest.approx(metrics["optimum"] - metrics["objective"], abs=1e-9)
    assert 0 < metrics["normalised"] < 1 and metrics["exact"] and 2000 <= metrics["tokens"] < 2200
    assert curve[0] == {"tokens": 0, "normalised": 0.0, "kl": 0.0}
    assert curve[-1] == {"tokens": metrics["tokens"]} | {n: round(metrics[n], 6) for n in ("normalised", "kl")}
    assert 10 <= len(curve) <= 14 and np.all(np.diff([point["tokens"] for point in curve]) > 0)
    assert len(found["curve_seconds"]) == len(curve)
    assert found["seconds"]["rollout"] + found["seconds"]["update"] <= found["seconds"]["total"]


def test_settings_are_told_that_nobody_gave():
    assert run_cell(**(KEY | {"agent": "best-of-n", "config": {}}))["settings"]["num_candidates"] == 8
    found = run_cell(**KEY)["settings"]
    assert (found["learning_rate"], found["clip_range"], found["num_epochs"]) == (0.02, 0.2, 4)
    assert fault("Idle")["settings"] == {}
    agent = benchmark_agents.Idle(None, None)
    agent.config = {"clip_range": (0.2, 0.28), "device": object(), "rate": math.nan, "names": {"a": None}}
    assert all_settings(agent) == {"clip_range": [0.2, 0.28], "names": {"a": None}}


def test_an_agent_without_a_model_is_measured_by_what_it_says():
    found = fault("OnlyPredicts")
    assert found["failure"] is None
    assert {n: found["metrics"][n] for n in ("reward", "exact", "standard_error")} == {
        "reward": 1.0, "exact": False, "standard_error": 0.0,
    }  # fmt: skip
    assert "kl" not in found["metrics"] and "normalised" not in found["metrics"]


def test_every_row_counts_the_same_in_scores_by_predict():
    """Rows that are done early would otherwise fill the mean with short responses."""
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=3)
    assert scores_by_predict(benchmark_agents.OnlyPredicts(envs), envs, num_episodes=7, seed=0).tolist() == [1.0] * 9


def test_tiny_tasks_measure_score_gold_and_kl_on_held_out_prompts():
    suite = suite_named("tiny")
    envs = make_envs(suite, "TinyReviewsProxy", 2, kl_coef=0.03)
    agent = benchmark_agents.Idle(envs, envs.unwrapped.language_model.model)
    found = measure(agent, envs, suite, "TinyReviewsProxy", 0.03, seed=0, quick=True)
    assert -1 <= found["score"] <= 1 and 0.3 < found["gold"] < 0.7 and abs(found["kl"]) < 1e-5
    assert found["objective"] == pytest.approx(found["score"], abs=1e-6) and 5 < found["length"] < 30
    # Held out: what the environment trains on is something else.
    held_out = {prompt["prompt"] for prompt in rlhf_gym.tasks.tiny_reviews.load_prompts("test")}
    assert not held_out & {prompt.text for prompt in envs.unwrapped.prompts}


def test_suites():
    assert {name: task.kl_coefs for name, task in SUITES["exact"].tasks.items()}["Lexicon"] == (2.0, 1.0)
    for name in SUITES["exact"].tasks:
        make_envs(SUITES["exact"], name, 2, kl_coef=0.1)
    assert list(suite_named("tiny", "somewhere").tasks)[-1] == "Stories"
    for name, stories, message in (("big", None, "must be one of exact, tiny"), ("exact", "x", "suite tiny")):
        with pytest.raises(ValueError, match=message):
            suite_named(name, stories)
