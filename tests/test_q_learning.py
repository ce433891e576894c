"""Tabular Q-learning: updates by hand, optimal values by enumeration, what explores, the greedy policy as a model."""

from __future__ import annotations

import math
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlhf_gym
from rlhf_gym.agents.batch import Batch, Rollout
from rlhf_gym.agents.q_learning import QLearning
from rlhf_gym.benchmarks.fixed_points import make_task
from rlhf_gym.exact import ngram_from_table

WO, AI, NI, STOP = "我爱你。"


def envs(name="WoAiNi", num_envs=32, **changes):
    return gym.make_vec(f"rlhf_gym/{name}-v0", num_envs=num_envs, **changes)


@cache
def best_values(name):
    """Q* of each state and token that some response goes through: the most that any of those has still to come."""
    task = make_task(gym.make(f"rlhf_gym/{name}-v0"), 1.0)
    found: dict[tuple[int, int], float] = {}
    for states, tokens, mask, payoffs in zip(task.states, task.tokens, task.mask, task.payoffs, strict=True):
        to_go = payoffs.flip(0).cumsum(0).flip(0)
        for pair in zip(states[mask].tolist(), tokens[mask].tolist(), to_go[mask].tolist(), strict=True):
            found[pair[:2]] = max(found.get(pair[:2], -math.inf), pair[2])
    pairs = np.array(list(found))
    return pairs[:, 0], pairs[:, 1], np.array(list(found.values()))


def answer(agent, *texts, scores):
    """A rollout of these responses to the first prompt, paid at the end."""
    base = agent.envs.unwrapped
    words = base.tokenizer.get_vocab()
    width, prompt = max(map(len, texts)), base.prompts[0].ids.tolist()
    tokens = torch.tensor([[words[word] for word in text] + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[t < len(text) for t in range(width)] for text in texts])
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(texts)), mask.sum(1) - 1] = torch.tensor(scores)
    zeros = torch.zeros(mask.shape)
    return Rollout(
        Batch(
            ids=torch.cat([torch.tensor([prompt] * len(texts)), tokens], 1),
            prompt_lengths=torch.tensor([len(prompt)] * len(texts)), response_ids=tokens, response_mask=mask,
            logprobs=zeros, values=zeros, rewards=rewards, scores=torch.tensor(scores),
            ended_by_eos=torch.ones(len(texts), dtype=torch.bool), kl=zeros,
        )
    )  # fmt: skip


def value(agent, text):
    """Q of the last word of a text after those before it."""
    base, table = agent.envs.unwrapped, agent.policy.model
    words = base.tokenizer.get_vocab()
    ids = torch.tensor([*base.prompts[0].ids.tolist(), *(words[word] for word in text[:-1])])
    return agent.q_values[table.state_after(ids), words[text[-1]]]


def test_updates_by_hand():
    agent = QLearning(envs(), step_power=1.0)
    agent.update(answer(agent, WO + AI + NI + STOP, scores=[1.0]))
    # Backwards, so that one response tells all of its states; the first alpha is 1.
    assert [value(agent, (WO + AI + NI + STOP)[:n]) for n in (1, 2, 3, 4)] == [1.0] * 4
    agent.update(answer(agent, WO + WO + STOP, scores=[0.5]))
    # 我我。pays .5; 我 leads to the better of 爱 (1) and 我 (.5): the mean of two targets of 1.
    assert value(agent, WO + WO + STOP) == value(agent, WO + WO) == 0.5 and value(agent, WO) == 1.0
    agent.update(answer(agent, WO + WO + STOP, WO + WO + STOP, scores=[0.2, 0.8]))
    assert value(agent, WO + WO + STOP) == pytest.approx((0.5 + 0.2 + 0.8) / 3)
    # Its targets were the values after each update: .5, .35 and .5.
    assert value(agent, WO + WO) == pytest.approx((0.5 + 0.35 + 0.5) / 3)
    assert agent.num_visits.sum() == 4 + 3 + 6


def test_step_power():
    agent = QLearning(envs(), step_power=0.5)
    for score in (0.0, 1.0, 0.0):
        agent.update(answer(agent, STOP, scores=[score]))
    after_two = 1 / math.sqrt(2)
    assert value(agent, STOP) == pytest.approx(after_two - after_two / math.sqrt(3))


@pytest.mark.parametrize(("step_power", "tolerance"), [(0.0, 1e-5), (0.6, 1e-2)])
def test_values_are_optimal(step_power, tolerance):
    agent = QLearning(envs(num_envs=128, kl_coef=0.3), step_power=step_power, epsilon_end=0.5).learn(6_000)
    states, tokens, expected = best_values("WoAiNi")
    assert np.abs(agent.q_values[states, tokens] - expected).max() < tolerance
    assert set(expected) == {0.0, 1.0} and (agent.num_visits[states, tokens] > 0).all()


def test_dense_rewards_are_paid_as_they_come():
    """Two words of Lexicon: the best continuation is read off the word scores, and nothing of the KL is in it."""
    world = envs("Lexicon", num_envs=1024, kl_coef=2.0, max_response_tokens=2)
    agent = QLearning(world, step_power=0.0, epsilon_end=1.0).learn(10_000)
    words = world.unwrapped.tokenizer.get_vocab()
    root = agent.policy.model.state_after(world.unwrapped.prompts[0].ids)
    expected = {"superb": 2.0, "fair": 1.2, "the": 1.0, "awful": 0.0, "<eos>": 0.0}
    assert {word: agent.q_values[root, words[word]] for word in expected} == pytest.approx(expected, abs=1e-5)


def test_policy_model_is_greedy_and_its_kl_is_finite():
    """On WoAiNi the best policy for kl_coef = 0 has a KL of -log .24, whatever kl_coef is: that is the price."""
    world = envs(num_envs=128, kl_coef=0.3)
    agent = QLearning(world).learn(10_000)
    found = rlhf_gym.exact.evaluate(agent, world)
    assert found.reward == pytest.approx(1.0) and found.kl == pytest.approx(-math.log(0.24), abs=1e-5)
    by_hand = 0.3 * math.log(0.76 + 0.24 * math.exp(1 / 0.3)) - (1 + 0.3 * math.log(0.24))
    assert found.regret == pytest.approx(by_hand, abs=1e-6) and found.exact
    observation, _ = world.reset(seed=0)
    words = world.unwrapped.tokenizer.get_vocab()
    for deterministic in (False, True):
        assert (agent.predict(observation, deterministic=deterministic)[0] == words[WO]).all()


def test_equally_good_tokens_are_left_to_the_reference():
    world = envs()
    assert rlhf_gym.exact.evaluate(QLearning(world), world, 0.3).kl < 1e-12  # nothing is known yet
    two = ngram_from_table({"": {"a": 0.1, "b": 0.3, "c": 0.6}}, eos=None)
    other = gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=8, model=two, prompts=["a"], max_response_tokens=1,
        reward=lambda text: float(text in "ab"),
    )  # fmt: skip
    agent = QLearning(other, epsilon_end=1.0).learn(200)
    words = other.unwrapped.tokenizer.get_vocab()
    row = agent.policy_model(torch.tensor([[words["a"]]])).logits[0, 0].softmax(-1)
    assert [row[words[word]].item() for word in "abc"] == pytest.approx([0.25, 0.75, 0.0])


@pytest.mark.parametrize("exploration", ["uniform", "reference"])
@pytest.mark.parametrize("changes", [{}, {"top_k": 2}, {"temperature": 0.5}], ids=str)
def test_what_explores_and_what_is_announced(exploration, changes):
    """(1 - epsilon) on the best token and epsilon by the rule; the environment hears log-probs of that policy."""
    world = envs(kl_coef=0.1, num_envs=512, **changes)
    agent = QLearning(world, epsilon_start=0.3, exploration=exploration)
    agent.update(answer(agent, WO, scores=[1.0]))
    agent.before_rollout()
    batch = agent.collector.collect(seed=0).batch
    words = world.unwrapped.tokenizer.get_vocab()
    reference = {WO: 0.5, AI: 0.5 / 3, NI: 0.5 / 3, STOP: 0.5 / 3}
    if "top_k" in changes:  # 我 and one of the three others
        kept = {WO, *(word for word in (AI, NI, STOP) if (batch.response_ids[:, 0] == words[word]).any())}
        reference = {word: p for word, p in reference.items() if word in kept}
        assert len(reference) == 2
    weights = {word: p ** (1 / changes.get("temperature", 1.0)) for word, p in reference.items()}
    reference = {word: p / sum(weights.values()) for word, p in weights.items()}
    others = reference if exploration == "reference" else dict.fromkeys(reference, 1 / len(reference))
    for word in reference:
        chosen = batch.response_ids[:, 0] == words[word]
        expected = 0.7 * (word == WO) + 0.3 * others[word]
        assert batch.logprobs[chosen, 0].exp().tolist() == pytest.approx([expected] * int(chosen.sum()))
        assert chosen.float().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected / 512))
        log_ratio = math.log(expected / reference[word])
        assert batch.kl[chosen, 0].tolist() == pytest.approx([log_ratio] * int(chosen.sum()), abs=1e-5)
    # After 你 the reference only knows 。: nothing else is ever tried, and nothing else is greedy.
    after_ni = batch.response_ids[:, 1:][(batch.response_ids[:, :-1] == words[NI]) & batch.response_mask[:, 1:]]
    assert len(after_ni) > 0 and (after_ni == words[STOP]).all()


def test_epsilon_falls_and_then_stays():
    agent, seen = QLearning(envs(num_envs=8), epsilon_start=0.9, epsilon_end=0.1, exploration_fraction=0.5), []
    agent.learn(1000, callback=lambda who, m: seen.append((who.num_timesteps, m["train/epsilon"])))
    starts = [0, *(n for n, _ in seen[:-1])]
    for start, (_, epsilon) in zip(starts, seen, strict=True):
        assert epsilon == pytest.approx(max(0.1, 0.9 - 0.8 * start / 500))
    assert seen[0][1] == 0.9 and seen[-1][1] == 0.1
    with pytest.raises(ValueError, match=r"epsilon_start must be a number in \[0, 1\], got 2"):
        QLearning(envs(num_envs=8), epsilon_start=2)
    assert QLearning(envs(num_envs=8), epsilon_end=0.2, exploration_fraction=0.0).epsilon == 0.2


def test_the_kl_is_ignored():
    learnt = [QLearning(envs(num_envs=128, kl_coef=kl_coef), seed=0).learn(4000).q_values for kl_coef in (0.0, 5.0)]
    np.testing.assert_allclose(*learnt, atol=1e-4)
    assert np.abs(learnt[0]).max() > 0.9


def test_only_tables():
    with pytest.raises(ValueError, match='policy must be "tabular"'):
        QLearning(envs(num_envs=8), policy="lstm")
