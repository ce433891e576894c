"""NLPO: the optimum under a mask that stays, by enumeration; what is sampled, recorded and paid under one that moves."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from worlds import V, make_envs, model

import rlhf_gym
from rlhf_gym.agents import NLPO, PPO
from rlhf_gym.agents.audit import Audit, AuditWarning
from rlhf_gym.benchmarks.fixed_points import make_task
from rlhf_gym.evaluation import evaluate
from rlhf_gym.lm import response_logits

TOP_P = 0.7


def likeliest(logits, top_p=TOP_P):
    """The tokens without which the likelier ones have less than that probability."""
    probs = logits.softmax(-1)
    likelier = (probs[..., None, :] > probs[..., :, None]).to(probs.dtype)
    return (likelier * probs[..., None, :]).sum(-1) < top_p


def an_agent(rows=8, policy=None, **config):
    envs = make_envs(rows, model=model(), kl_coef=0.1)
    return NLPO(envs, policy=policy or model(seed=1), seed=0, **{"learning_rate": 1e-2, "mask_top_p": TOP_P} | config)


def logits_of(lm, batch):
    lengths = batch.prompt_lengths + batch.response_mask.sum(1)
    with torch.no_grad():
        return response_logits(lm, batch.ids, lengths, batch.prompt_lengths - 1, batch.response_ids.shape[1])[0]


def test_under_a_mask_that_stays_it_finds_the_best_policy_that_the_mask_allows():
    """Lexicon with three words: J*_S = beta log sum_{y in S} pi_ref(y) exp(r / beta), far from J*."""
    task = make_task(gym.make("rlhf_gym/Lexicon-v0", max_response_tokens=3), 1.0)
    allowed = (likeliest(task.reference)[task.states, task.tokens] | ~task.mask).all(1)
    assert allowed.sum() < 0.1 * len(allowed)
    log_weights = torch.where(task.mask, task.reference[task.states, task.tokens], 0.0).sum(1) + task.payoffs.sum(1)
    best, best_allowed = log_weights.logsumexp(0).item(), log_weights[allowed].logsumexp(0).item()
    assert best == pytest.approx(task.solution.objective, abs=1e-6) and best - best_allowed > 0.5

    envs = gym.make_vec("rlhf_gym/Lexicon-v0", num_envs=128, max_response_tokens=3, kl_coef=1.0)
    settings = {"learning_rate": 0.05, "mask_top_p": TOP_P, "mask_update_interval": 10**6, "num_epochs": 2}
    agent = NLPO(envs, policy="tabular", seed=0, **settings).learn(15_000)
    found = rlhf_gym.exact.evaluate(agent, envs)
    assert best_allowed - 2e-3 < found.objective < best_allowed + 1e-6
    # What it lacks is what pi* does outside of the mask.
    outside = -np.log(log_weights.softmax(0)[allowed].sum().item())
    assert found.regret == pytest.approx(outside, abs=2e-3)


def test_one_distribution_for_sampling_training_acting_and_evaluation():
    agent = an_agent(16)
    batch = agent.collector.collect(seed=0).batch
    real = batch.response_mask
    masking, reference = logits_of(agent.policy.mask_model, batch), logits_of(agent.envs.language_model.model, batch)
    assert torch.equal(batch.allowed[real], likeliest(masking)[real])
    assert (
        not batch.allowed[real].all(1).any() and batch.allowed[real].gather(1, batch.response_ids[real][:, None]).all()
    )

    logits = logits_of(agent.policy.model, batch).masked_fill(~batch.allowed, -torch.inf)
    expected = logits.log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]
    torch.testing.assert_close(batch.logprobs[real], expected[real], atol=1e-5, rtol=0)
    with torch.no_grad():
        logprobs, _, entropy = agent.policy(batch)
    torch.testing.assert_close(batch.logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[real], torch.distributions.Categorical(logits=logits).entropy()[real])
    evaluated = logits_of(agent.policy_model, batch)
    assert torch.equal((evaluated > -torch.inf)[real], batch.allowed[real])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = evaluate(agent, agent.envs, num_episodes=64)
    assert abs(drawn.kl.mean() - batch.kl.sum(1).mean()) < 4 * (drawn.kl.std() / 8 + batch.kl.sum(1).std() / 4)

    # The penalty is taken to the whole reference.
    ref_logprobs = reference.log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]
    torch.testing.assert_close(batch.kl[real], (expected - ref_logprobs)[real], atol=1e-5, rtol=0)
    paid = batch.scores - 0.1 * torch.where(real, expected - ref_logprobs, 0.0).sum(1)
    torch.testing.assert_close(batch.rewards.sum(1), paid, atol=1e-5, rtol=0)

    observation, _ = agent.envs.reset(seed=0)
    many = {key: np.repeat(x[:1], 3000, axis=0) for key, x in observation.items()}
    share = torch.from_numpy(np.bincount(agent.predict(many)[0], minlength=V) / 3000)
    first = logits[0, 0].softmax(-1).double()
    assert ((share - first).abs() < 4 * (first * (1 - first) / 3000).sqrt() + 1e-9).all()


def test_the_mask_moves_every_so_many_updates():
    agent = an_agent(mask_update_interval=3, num_epochs=1, num_minibatches=1)
    weights = lambda lm: torch.cat([p.flatten() for p in lm.parameters()]).clone()  # noqa: E731
    held, seen = [weights(agent.policy.mask_model)], [weights(agent.policy.model)]

    def look(agent, metrics):
        held.append(weights(agent.policy.mask_model))
        seen.append(weights(agent.policy.model))
        assert 1 <= metrics["train/allowed_tokens"] < V
        return agent.num_updates < 7

    agent.learn(10_000, callback=look)
    expected = [0, 0, 0, 3, 3, 3, 6, 6]
    assert all(torch.equal(mask, seen[source]) for mask, source in zip(held, expected, strict=True))
    assert not torch.equal(seen[3], seen[6]) and not any(p.requires_grad for p in agent.policy.mask_model.parameters())
    batch = agent.collector.collect().batch
    assert torch.equal(
        batch.allowed[batch.response_mask], likeliest(logits_of(agent.policy.mask_model, batch))[batch.response_mask]
    )


def test_a_mask_that_allows_everything_is_ppo():
    # A small learning rate: the bias of attention's keys has no gradient but rounding errors, and Adam makes them large.
    slow = {"learning_rate": 1e-4}
    ppo = PPO(make_envs(8, model=model(), kl_coef=0.1), policy=model(seed=1), seed=0, **slow).learn(60)
    whole, smaller = (an_agent(mask_top_p=None, mask_top_k=k, **slow).learn(60) for k in (V, V - 1))
    for a, b in zip(whole.policy.model.parameters(), ppo.policy.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    pairs = zip(smaller.policy.model.parameters(), ppo.policy.model.parameters(), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) > 1e-4  # negative control


def test_the_audit_knows_whose_mask_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuditWarning)
        found = []
        agent = an_agent(32, audit_interval=1, mask_update_interval=2, num_epochs=1)
        agent.learn(600, callback=lambda _, m: found.append(m))
    for metrics in found:
        difference = metrics["audit/kl_exact"] - metrics["audit/kl_sampled"]
        assert abs(difference) < 4 * metrics["audit/kl_difference_se"]
        assert metrics["audit/logprob_mismatch"] < 1e-4 and metrics["audit/ref_logprob_mismatch"] < 1e-4
    # Negative control: as a mask of the environment, which would hold for the reference too.
    metrics = Audit(agent.envs, agent.policy.model, 1)(agent.collector.collect().batch, 0)
    assert metrics["audit/ref_logprob_mismatch"] > 0.05


def test_its_own_mask_stays_within_the_environments():
    allowed = [2, 4, 5, 6, 7]
    envs = make_envs(8, model=model(), kl_coef=0.1, allowed_tokens=allowed)
    agent = NLPO(envs, policy=model(seed=1), seed=0, mask_top_p=TOP_P)
    batch = agent.collector.collect(seed=0).batch
    within = torch.full((V,), -torch.inf)
    within[allowed] = 0.0
    expected = likeliest(logits_of(agent.policy.mask_model, batch) + within)
    assert torch.equal(batch.allowed[batch.response_mask], expected[batch.response_mask])


def test_refusals():
    with pytest.raises(ValueError, match=r"envs must have no top_k and top_p.* Give mask_top_k or mask_top_p"):
        NLPO(make_envs(8, model=model(), top_k=5))
    with pytest.raises(ValueError, match="mask_top_p or mask_top_k must be given"):
        NLPO(make_envs(8, model=model()), mask_top_p=None)
    for name, value in {"mask_top_p": 1.5, "mask_top_k": 0, "mask_update_interval": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            NLPO(make_envs(8, model=model()), **{name: value})
