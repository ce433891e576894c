"""Policies measured against the optimum: exactly by states and by prefixes, and by samples within their errors."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from exact_worlds import random_world, response_ids
from worlds import make_envs, model

from rlhf_gym.exact import TabularForCausalLM, evaluate, make_policy, residual_policy, solve, tabular_policy
from rlhf_gym.lm import generate, make_engine, response_logprobs


def shaken(policy, seed=0, std=1.0):
    """The policy with random weights in its last layer."""
    generator = torch.Generator().manual_seed(seed)
    head = policy.lm_head.residual if isinstance(policy, TabularForCausalLM) else policy.lm_head.linear.weight
    head.data = std * torch.randn(head.shape, generator=generator)
    return policy.requires_grad_(False)


@pytest.mark.parametrize("kind", ["tabular", "transformer", "lstm"])
@pytest.mark.parametrize("seed", range(4))
def test_evaluation_equals_enumeration(kind, seed):
    """J, E[r], KL and regret of a random policy (F1, F4) from its probability of every response."""
    world, beta = random_world(seed), 0.4
    policy = shaken(make_policy(world.env, kind), seed)
    found = evaluate(policy, world.env, beta)
    assert found.exact and found.standard_error == 0
    objective, _, _, optimum = world.optimum(beta)
    ids, mask = (torch.from_numpy(x) for x in response_ids(world))
    for p, prompt in enumerate(world.env.prompts):
        logprobs = response_logprobs(policy, [prompt.ids] * len(ids), ids, mask).double().sum(1).numpy()
        real = logprobs > -np.inf
        assert (real == (world.prob[p] > 0)).all()
        policy_prob, ref = np.exp(logprobs[real]), np.log(world.prob[p][real])
        reward = (policy_prob * world.score[p][real]).sum()
        kl = (policy_prob * (logprobs[real] - ref)).sum()
        to_optimum = (policy_prob * (logprobs[real] - np.log(optimum[p][real]))).sum()
        assert found.rewards[p] == pytest.approx(reward, abs=1e-5)
        assert found.kls[p] == pytest.approx(kl, abs=1e-5)
        assert found.objectives[p] == pytest.approx(reward - beta * kl, abs=1e-5)
        assert found.regrets[p] == pytest.approx(beta * to_optimum, abs=1e-5)
    reference = (world.prob * world.score).sum(1).mean()
    if objective.mean() - reference > 1e-3:
        normalised = (found.objective - reference) / (objective.mean() - reference)
        assert found.normalised == pytest.approx(normalised, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("task", ["WoAiNi", "Brackets", "Goodhart", "Difficulty"])
def test_regret_is_the_kl_over_the_states(task):
    """F4: kl_coef times the visits' KL to pi* is J* - J; the two are computed separately."""
    env, beta = gym.make(f"rlhf_gym/{task}-v0"), 0.3
    found = evaluate(shaken(tabular_policy(env)), env, beta)
    visits = [(n * kl)[n > 0].sum() for n, kl in zip(found.occupancy, found.state_kl, strict=True)]
    assert beta * sum(visits) == pytest.approx(found.solution.objective - found.reward + beta * found.kl, abs=1e-9)
    assert found.occupancy[0].sum() == pytest.approx(1)
    assert all((kl[n > 0] >= 0).all() for n, kl in zip(found.occupancy, found.state_kl, strict=True))
    assert all(np.isnan(kl[n == 0]).all() for n, kl in zip(found.occupancy, found.state_kl, strict=True))


@pytest.mark.parametrize("task", ["WoAiNi", "Brackets", "Lexicon", "Recall", "Goodhart", "Difficulty"])
def test_reference_is_zero_and_optimum_is_one(task):
    env, beta = gym.make(f"rlhf_gym/{task}-v0"), 0.3
    start = evaluate(None, env, beta)
    assert start.kl == 0 and start.normalised == pytest.approx(0, abs=1e-12)
    solution = solve(env, beta)
    best = evaluate(solution.policy, env, beta)
    assert best.normalised == pytest.approx(1, abs=1e-9)
    assert (best.reward, best.kl) == pytest.approx((solution.reward, solution.kl), abs=1e-4)
    for name in best.metrics:
        assert best.metrics[name] == pytest.approx(solution.expected(name), abs=1e-4)


def test_transformer_regret_is_monte_carlo_kl():
    """Regret of a random transformer == kl_coef times the mean of log pi - log pi* over its samples, within 3 errors."""
    env, beta = gym.make("rlhf_gym/Brackets-v0"), 0.3
    policy = shaken(residual_policy(env, num_layers=1, seed=3), std=0.1)
    found = evaluate(policy, env, beta)
    prompt, count = env.unwrapped.prompts[0].ids, 20_000
    uniforms = torch.rand(count, 12, generator=torch.Generator().manual_seed(0))
    responses = generate(
        make_engine(policy, 2000, 13), [prompt] * count, max_response_tokens=12,
        eos_token_ids=env.unwrapped.eos_token_ids, uniforms=uniforms,
    )  # fmt: skip
    optimum = solve(env, beta).policy
    log_optimum = response_logprobs(optimum, [prompt] * count, responses.response_ids, responses.response_mask)
    difference = beta * (responses.logprobs - log_optimum).sum(1).double()
    error = difference.std() / count**0.5
    assert abs(difference.mean() - found.regret) < 3 * error
    assert found.exact and found.regret > 10 * error


@pytest.mark.parametrize(("task", "kind"), [("Difficulty", "transformer"), ("Brackets", "lstm")])
def test_samples_agree_with_the_exact_answer(task, kind):
    """The same policy on samples: regret, KL and reward within their errors, with one prompt and with several."""
    env, beta = gym.make(f"rlhf_gym/{task}-v0"), 0.3
    policy = shaken(make_policy(env, kind), seed=2, std=0.1)
    exact = evaluate(policy, env, beta)
    sampled = evaluate(policy, env, beta, max_prefixes=10, num_samples=3000)
    assert exact.exact and not sampled.exact and 0 < sampled.standard_error < 0.1 * exact.regret
    assert abs(sampled.regret - exact.regret) < 4 * sampled.standard_error
    assert abs(sampled.kl - exact.kl) < 0.1 * exact.kl and abs(sampled.reward - exact.reward) < 0.03
    assert sampled.objective == pytest.approx(sampled.reward - beta * sampled.kl)
    assert sampled.occupancy[0].sum() == pytest.approx(1)
    assert evaluate(policy, env, beta, max_prefixes=10, num_samples=40, seed=1).regret != sampled.regret


def test_large_tasks_are_sampled_and_have_metrics():
    env = gym.make("rlhf_gym/Goodhart-v0")
    policy = make_policy(env, "transformer")
    found = evaluate(policy, env, 0.3, num_samples=600)
    assert not found.exact and found.kl == 0  # exact sums: no noise where there is nothing to estimate
    assert found.metrics["gold"] == pytest.approx(0.138, abs=0.12)


def test_any_reference_and_policy():
    """A transformer against another one: by prefixes, J from enumeration of the environment's own two-token responses."""
    envs, beta = make_envs(1, max_response_tokens=2, reward=lambda text: len(text) / 10), 0.5
    policy = model("gpt2", seed=5)
    found = evaluate(policy, envs, beta)
    total = []
    for prompt in envs.unwrapped.prompts:
        responses = [[a, b] for a in range(14) for b in range(14) if a != 2] + [[2, 0]]
        ids, mask = torch.tensor(responses), torch.ones(len(responses), 2, dtype=torch.bool)
        mask[-1, 1] = False
        prompts = [prompt.ids] * len(ids)
        logprobs = response_logprobs(policy, prompts, ids, mask)
        result = envs.unwrapped.evaluate_responses(prompts, ids, mask, logprobs)
        s = result.scores - beta * (logprobs.sum(1) - result.ref_logprobs.sum(1))
        total.append(float((logprobs.sum(1).exp() * s).sum()))
    np.testing.assert_allclose(found.objectives, total, atol=1e-4)
    assert found.regret > 0


def test_temperature_and_filters_apply_to_the_policy():
    """With top_k = 1 nothing can be chosen: KL 0 whatever the policy; temperature as if the logits were divided."""
    narrow = gym.make("rlhf_gym/Brackets-v0", top_k=1, max_response_tokens=6)
    assert evaluate(shaken(tabular_policy(narrow)), narrow, 0.3).kl == pytest.approx(0, abs=1e-12)
    hot = gym.make("rlhf_gym/Brackets-v0", temperature=2.0, max_response_tokens=6)
    assert evaluate(solve(hot, 0.3).policy, hot, 0.3).normalised == pytest.approx(1, abs=1e-9)
    policy = shaken(tabular_policy(hot))
    found = evaluate(policy, hot, 0.3)
    halved = tabular_policy(hot)
    halved.lm_head.residual.data = policy.lm_head.residual.data / 2
    halved.lm_head.reference.div_(2)
    other = gym.make("rlhf_gym/Brackets-v0", max_response_tokens=6)
    assert found.reward == pytest.approx(evaluate(halved, other, 0.3).reward, abs=1e-6)


def test_impossible_tokens_are_refused():
    """A policy that can say what the reference cannot has an infinite KL."""
    env = gym.make("rlhf_gym/WoAiNi-v0")
    policy = tabular_policy(env)
    policy.lm_head.reference.nan_to_num_(neginf=-3.0)
    with pytest.raises(ValueError, match="the KL is infinite"):
        evaluate(policy, env, 0.3)


def test_agents_are_policies():
    class Agent:
        policy_model = None

    env, agent = gym.make("rlhf_gym/Brackets-v0", kl_coef=0.3), Agent()
    agent.policy_model = shaken(tabular_policy(env))
    found = evaluate(agent, env)  # kl_coef is the environment's
    assert found.solution.kl_coef == 0.3
    assert found.objective == evaluate(agent.policy_model, env, 0.3).objective
