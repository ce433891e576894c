"""Best-of-N: exact numbers against closed forms and brute force, samples, and a policy that plans."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from worlds import make_envs, model

import rlhf_gym.rewards
from rlhf_gym.agents import BestOfN
from rlhf_gym.benchmarks.fixed_points import make_task
from rlhf_gym.benchmarks.suites import scores_by_predict
from rlhf_gym.benchmarks.training import run_cell
from rlhf_gym.evaluation import evaluate
from rlhf_gym.exact import evaluate as evaluate_exactly
from rlhf_gym.exact import solve

P = 0.24  # success rate of the reference on WoAiNi


def task(name="WoAiNi", num_envs=8, **changes):
    return gym.make_vec(f"rlhf_gym/{name}-v0", num_envs=num_envs, **changes)


# ---- exact numbers


@pytest.mark.parametrize("n", [1, 2, 16])
def test_a_score_of_0_or_1_is_on_the_frontier(n):
    """Success q = 1 - (1 - p)^n, KL that of a coin. At the price at which the optimum succeeds as often, it *is* the
    optimum: the odds of q are those of p times exp(1 / kl_coef)."""
    q = 1 - (1 - P) ** n
    kl = q * math.log(q / P) + (1 - q) * math.log((1 - q) / (1 - P))
    odds = math.log(q / (1 - q)) - math.log(P / (1 - P))
    envs = task(kl_coef=1 / odds if n > 1 else 0.3)
    found = evaluate_exactly(BestOfN(envs, policy="tabular", num_candidates=n), envs)
    assert (found.reward, found.kl) == pytest.approx((q, kl), abs=1e-6)
    assert found.objective == pytest.approx(found.reward - envs.unwrapped.kl_coef * found.kl)
    assert found.normalised == pytest.approx(1.0 if n > 1 else 0.0, abs=1e-5)
    assert found.exact and found.standard_error == 0
    if n > 1:
        assert found.kl < math.log(n) - (n - 1) / n and found.state_kl == []


def test_graded_scores_and_gold_against_all_pairs():
    """The first of the better of two, for every pair of responses: the score, the KL and the gold that is not paid."""
    envs = task("Goodhart", max_response_tokens=3)
    listed = make_task(envs, 0.3)
    prompt = envs.unwrapped.prompts[0].ids
    told = envs.unwrapped.evaluate_responses(
        [prompt] * len(listed.tokens), listed.tokens, listed.mask, torch.zeros(listed.mask.shape), [0] * len(listed.tokens)
    )  # fmt: skip
    probs = torch.where(listed.mask, listed.reference[listed.states, listed.tokens], 0.0).sum(1).exp().numpy()
    scores, gold = told.scores.numpy().astype(float), told.metrics["gold"].numpy().astype(float)
    wins = np.where(scores[:, None] >= scores, np.arange(len(scores))[:, None], np.arange(len(scores)))
    best = np.bincount(wins.ravel(), np.outer(probs, probs).ravel(), minlength=len(scores))
    found = evaluate_exactly(BestOfN(envs, num_candidates=2), envs, 0.3)
    assert len(np.unique(scores)) > 3
    assert (found.reward, found.metrics["gold"]) == pytest.approx((best @ scores, best @ gold), abs=1e-6)
    assert found.kl == pytest.approx(best @ np.log(best / probs), abs=1e-6)
    assert found.regret > 0.01


def test_several_prompts():
    """Success rates .9, .5, .1, .01, each for itself."""
    envs = task("Difficulty", kl_coef=0.3)
    found = evaluate_exactly(BestOfN(envs, num_candidates=4), envs)
    assert sorted(found.rewards) == pytest.approx([1 - (1 - p) ** 4 for p in (0.01, 0.1, 0.5, 0.9)], abs=1e-6)


def test_exact_numbers_are_those_of_the_reference_or_none():
    envs = task(kl_coef=0.3)
    trained = solve(envs, 0.3).policy
    with pytest.raises(ValueError, match="best-of-N is known exactly where it samples from the reference"):
        evaluate_exactly(BestOfN(envs, policy=trained), envs)
    assert evaluate_exactly(BestOfN(envs, policy=trained, num_candidates=1), envs).regret == pytest.approx(0, abs=1e-6)


def test_a_cell_of_the_benchmark():
    """No token is generated, and the numbers are the exact ones."""
    cell = run_cell("exact", "best-of-n", "tabular", "WoAiNi", 0.3, 0, 32, 400, None, {"num_candidates": 8})
    q = 1 - (1 - P) ** 8
    kl = q * math.log(q / P) + (1 - q) * math.log((1 - q) / (1 - P))
    optimum = 0.3 * math.log(1 - P + P * math.exp(1 / 0.3))
    assert cell["status"] == "ok" and cell["metrics"]["tokens"] == cell["metrics"]["reward_calls"] == 0
    assert cell["metrics"]["normalised"] == pytest.approx((q - 0.3 * kl - P) / (optimum - P), abs=1e-5)


# ---- samples


def test_evaluation_keeps_the_best_of_each_group():
    """The same random numbers, without the choice: the highest of every four, and the KL of those with the bound."""
    envs = make_envs(4, model=model())
    policy = model(seed=1)
    found = evaluate(BestOfN(envs, policy=policy, num_candidates=4), envs, num_episodes=6, seed=3)
    asked = [{"prompt": envs.unwrapped.prompts[i % 4].text} for i in range(6) for _ in range(4)]
    every = evaluate(policy, envs, prompts=asked, num_episodes=24, seed=3)
    best = every.scores.reshape(6, 4).argmax(1) + 4 * np.arange(6)
    assert found.scores.tolist() == every.scores[best].tolist() and every.scores.std() > 0
    assert [s["response"] for s in found.samples] == [every.samples[i]["response"] for i in best]
    assert found.lengths.tolist() == every.lengths[best].tolist()
    np.testing.assert_allclose(found.kl, every.kl[best] + math.log(4) - 0.75, atol=1e-5)
    assert found.prompt_index.tolist() == [0, 1, 2, 3, 0, 1]


def test_respond():
    envs = make_envs(4, model=model())
    agent = BestOfN(envs, num_candidates=8, seed=1)
    own = agent.respond()
    assert [found["prompt"] for found in own] == [prompt.text for prompt in envs.unwrapped.prompts]
    assert all(found["score"] == found["response"].split().count("good") - found["response"].split().count("bad") for found in own)  # fmt: skip
    assert agent.respond() == own and agent.respond(seed=2) != own
    assert [found["prompt"] for found in agent.respond(["a cat"])] == ["a cat"]
    one = BestOfN(envs, num_candidates=1, seed=1).respond()
    assert sum(found["score"] for found in own) > sum(found["score"] for found in one)


# ---- the policy that plans


def play(agent, envs, num_episodes, seed=0):
    scores = scores_by_predict(agent, envs, num_episodes=num_episodes, seed=seed)
    return scores.mean(), 5 * max(scores.std(), 0.05) / len(scores) ** 0.5


@pytest.mark.parametrize("n", [1, 4])
def test_episodes_by_predict_are_best_of_n(n):
    envs = task(num_envs=128)
    mean, margin = play(BestOfN(task(), policy="tabular", num_candidates=n), envs, 512)
    assert abs(mean - (1 - (1 - P) ** n)) < margin


def test_it_plans_anew_from_a_token_that_it_did_not_choose():
    """From the right first token the success rate is .48, so that the best of four succeeds in 1 - .52^4; once a wrong
    one stands there the rest is planned all the same."""
    envs = task(num_envs=256)
    agent = BestOfN(task(), policy="tabular", num_candidates=4)
    right = int(envs.unwrapped.tokenizer("我")["input_ids"][0])
    for first, expected in ((right, 1 - 0.52**4), (right + 1, 0.0)):
        observation, _ = envs.reset(seed=0)
        agent.predict(observation)
        observation, *_ = envs.step(np.full(256, first))
        scores = np.full(256, np.nan)
        while np.isnan(scores).any():
            observation, _, _, _, info = envs.step(agent.predict(observation)[0])
            ended = info.get("_score", np.zeros(256, bool)) & np.isnan(scores)
            scores[ended] = info["score"][ended]
        assert abs(scores.mean() - expected) < 5 * (expected * (1 - expected) / 256) ** 0.5 + 1e-9


def test_prompts_of_another_environment():
    """Held-out prompts, one of which begins another and one of which begins with one of the agent's own."""
    world = {"model": model(), "max_prompt_tokens": 6}
    envs = make_envs(64, **world)
    held_out = make_envs(32, **world, prompts=["cat sat", "cat sat and ran", "the very good"])
    means = [play(BestOfN(envs, num_candidates=n, seed=1), held_out, 96)[0] for n in (1, 8)]
    assert means[1] > means[0] + 0.3


def test_deterministic_plans_depend_on_the_text_alone():
    envs = make_envs(4, model=model())
    observation, _ = envs.reset(seed=0)
    agents = [BestOfN(envs, num_candidates=4, seed=5) for _ in range(2)]
    agents[1].predict(observation)  # other random numbers from here on
    agents[1]._plans = []
    first, second = (agent.predict(observation, deterministic=True)[0] for agent in agents)
    assert first.tolist() == second.tolist() and first.dtype == np.int64
    row = {key: torch.from_numpy(value[2]) for key, value in observation.items()}
    token, state = agents[0].predict(row, deterministic=True)
    assert token.shape == () and token.item() == first[2] and state is None


def test_planning_is_not_seen_by_the_reward():
    """A running normalisation that counted candidates would pay the episodes by them."""
    envs = make_envs(4, model=model(), reward=rlhf_gym.rewards.normalize(lambda text: float(len(text))))
    agent, before = BestOfN(envs, num_candidates=4), envs.unwrapped.process.scorer.memory()
    agent.predict(envs.reset(seed=0)[0])
    agent.respond()
    assert envs.unwrapped.process.scorer.memory() == before
    envs.step(np.full(4, 2))
    assert envs.unwrapped.process.scorer.memory() != before


# ---- an agent as the others


def test_learn_generates_nothing_and_save_keeps_n(tmp_path):
    envs, heard = task(kl_coef=0.3), []
    agent = BestOfN(envs, policy="tabular", num_candidates=4)
    assert agent.learn(1000, callback=lambda who, metrics: heard.append((who, metrics))) is agent
    assert agent.num_timesteps == 0
    bound = {"best_of_n/num_candidates": 4.0, "best_of_n/kl_bound": math.log(4) - 0.75}
    assert heard == [(agent, bound)]
    agent.save(tmp_path / "agent")
    loaded = BestOfN.load(tmp_path / "agent", env=envs)
    assert loaded.num_candidates == 4
    assert evaluate_exactly(loaded, envs).objective == evaluate_exactly(agent, envs).objective


def test_what_it_refuses():
    envs = make_envs(2)
    with pytest.raises(ValueError, match="num_candidates must be an integer >= 1, got 0"):
        BestOfN(envs, num_candidates=0)
    with pytest.raises(
        ValueError, match="envs must be a native vector environment without wrappers, got VectorWrapper"
    ):
        BestOfN(VectorWrapper(envs))
    with pytest.raises(ValueError, match="total_timesteps must be >= 1, got 0"):
        BestOfN(envs).learn(0)
