"""DQN and QR-DQN on text: the Q-network, exploration among what is allowed, what they optimise, and going on."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from transformers import AutoModelForCausalLM
from worlds import V, make_env, make_envs, model

from rlhf_gym.agents import DQN, QRDQN
from rlhf_gym.agents.sb3 import LMQPolicy, ValueAgent
from rlhf_gym.agents.sb3.q_policy import GreedyLM
from rlhf_gym.exact import Automaton, evaluate, ngram_from_table

FIRST = {"我": 0.5, "爱": 0.5 / 3, "你": 0.5 / 3, "。": 0.5 / 3}  # pi_ref of WoAiNi's first word


def woaini(num_envs=64, kl_coef=0.1, **changes):
    return gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=num_envs, kl_coef=kl_coef, **changes)


def first_actions(agent, envs, num_steps=40):
    """Exploring actions in the state where every episode begins. (num_steps, num_envs)."""
    algorithm = agent.algorithm
    algorithm._last_obs = algorithm.env.reset()
    algorithm.exploration = agent.exploration
    return np.stack([algorithm._sample_action(0, n_envs=envs.num_envs)[0] for _ in range(num_steps)])


# ---- the Q-network


@pytest.mark.parametrize("n_quantiles", [None, 3])
def test_values_are_linear_in_the_hidden_state_and_start_at_zero(n_quantiles):
    lm = model()
    envs = make_envs(4, model=lm, allowed_tokens=[2, 5, 6, 7])
    obs, _ = envs.reset(seed=0)
    obs = {key: torch.as_tensor(value) for key, value in obs.items()}
    policy = LMQPolicy(
        envs.single_observation_space,
        envs.single_action_space,
        lambda _: 1e-3,
        language_model=lm,
        token_filter=envs.unwrapped.token_filter,
        n_quantiles=n_quantiles,
    )
    zeros = policy.network(obs)
    assert (zeros[..., [2, 5, 6, 7]] == 0).all() and (zeros[..., [0, 1, 3, 4]] < -1e8).all()
    torch.nn.init.normal_(policy.network.q_head.weight)
    weight = policy.network.q_head.weight.detach().reshape(-1, V, 16)
    for row, (ids, mask) in enumerate(zip(obs["input_ids"], obs["attention_mask"], strict=True)):
        with torch.no_grad():
            hidden = lm(ids[None, : mask.sum()], output_hidden_states=True).hidden_states[-1][0, -1]
        expected = (weight @ hidden)[..., [2, 5, 6, 7]]
        found = policy.network(obs)[row][..., [2, 5, 6, 7]]
        torch.testing.assert_close(found, expected[0] if n_quantiles is None else expected, atol=1e-4, rtol=1e-4)
        best = [2, 5, 6, 7][int(expected.mean(0).argmax())]
        assert policy(obs)[row] == best
        greedy = GreedyLM(policy.network)(ids[None, : mask.sum()]).logits[0, -1]
        assert [2, 5, 6, 7][int(greedy[[2, 5, 6, 7]].argmax())] == best


def test_what_cannot_be_a_q_function_is_refused():
    with pytest.raises(ValueError, match="TopKAction"):
        DQN(make_envs(top_k=3))
    unigram = ngram_from_table({"": {"a": 0.5, "b": 0.3, "<eos>": 0.2}}, eos="<eos>")
    envs = gym.make_vec("rlhf_gym/TextGeneration-v0", num_envs=2, model=unigram, reward=len, max_response_tokens=3)
    with pytest.raises(ValueError, match="number instead of a vector"):
        DQN(envs)
    assert DQN(envs, policy="tabular").algorithm.policy.network.q_head.in_features > 3
    with pytest.raises(TypeError, match="DQN, QRDQN or a subclass"):
        ValueAgent(make_envs(), algorithm=stable_baselines3.PPO)
    with pytest.raises(ValueError, match="exploration"):
        DQN(make_envs(), exploration="softmax")


# ---- exploration


def test_rows_explore_by_themselves_and_uniformly_over_what_is_allowed():
    envs = woaini(kl_coef=0.0)
    agent = DQN(envs, policy="tabular", seed=0)
    agent.algorithm.exploration_rate = 0.5
    words = first_actions(agent, envs)
    greedy = np.bincount(words.ravel()).argmax()
    moved = (words != greedy).mean(1)  # of each step: about half of the rows draw, and three of four draws are others
    assert (moved > 0).all() and (moved < 1).all() and abs(moved.mean() - 0.375) < 0.03
    for word in set(range(5)) - {greedy}:
        share = (words == word).mean()
        assert share == 0 or abs(share - 0.125) < 0.03
    assert len(np.unique(words)) == 4  # the table's fifth token never comes


def test_exploration_by_the_reference_draws_from_it():
    envs = woaini(kl_coef=0.0)
    agent = DQN(envs, policy="tabular", seed=0, exploration="reference")
    agent.algorithm.exploration_rate = 1.0
    words = first_actions(agent, envs)
    vocabulary = envs.unwrapped.tokenizer.get_vocab()
    for word, probability in FIRST.items():
        assert (words == vocabulary[word]).mean() == pytest.approx(probability, abs=0.03)


# ---- the objective


@pytest.mark.parametrize(
    "changes, scalar", [({}, False), ({"kl_estimator": "k3"}, False), ({"kl_term": "reference"}, False), ({}, True)]
)
def test_the_reward_is_that_of_a_deterministic_policy(changes, scalar):
    """score + kl_coef log pi_ref in the replay buffer, by which estimator and in which form whatsoever."""
    given = dict(kl_coef=0.3, **changes)
    envs = make_env(**given) if scalar else make_envs(4, **given)
    agent = DQN(envs, batch_size=8, train_freq=6)
    seen = []
    step_wait = agent.algorithm.env.venv.step_wait
    agent.algorithm.env.venv.step_wait = lambda: seen.append(step_wait()) or seen[-1]
    agent.learn(48)
    expected = [[i.get("score", 0.0) + 0.3 * i["ref_logprob"] for i in infos] for *_, infos in seen]
    buffer = agent.algorithm.replay_buffer
    np.testing.assert_allclose(buffer.rewards[: buffer.pos], expected, atol=1e-5)
    assert sum("score" in i for *_, infos in seen for i in infos) > 2


@pytest.mark.parametrize("cls", [DQN, QRDQN])
def test_the_best_deterministic_policy_is_found_and_its_regret_is_known(cls):
    """WoAiNi: 我爱你。 with probability .24 under the reference and pi* = .24 e^(1/beta) / (.76 + .24 e^(1/beta))."""
    beta = 0.2
    envs = woaini(kl_coef=beta)
    agent = cls(envs, policy="tabular", seed=0, learning_rate=0.02)
    agent.learn(4_000)
    found = evaluate(agent, envs)
    assert found.exact and found.reward == pytest.approx(1) and found.kl == pytest.approx(-math.log(0.24), abs=1e-4)
    weight = 0.24 * math.exp(1 / beta)
    assert found.regret == pytest.approx(-beta * math.log(weight / (0.76 + weight)), abs=1e-5)


def test_uniform_exploration_is_what_fails_among_many_tokens():
    """Four times the same one of 40 words, which the reference writes half of the time: one response in 16 under it,
    one in 40^4 by chance."""
    words = [f"w{i}" for i in range(39)]
    lm = ngram_from_table({"": {w: 0.5 if w == "w7" else 0.4 / 38 for w in words} | {"<eos>": 0.1}}, eos="<eos>")
    reward = Automaton(0, lambda n, word: n + 1 if word == "w7" else -9, final=lambda n, ended: float(n == 4))
    assert lm.tokenizer.get_vocab()["w7"] > 0  # or the first of equals would be it
    found = {}
    for exploration in ("uniform", "reference"):
        envs = gym.make_vec(
            "rlhf_gym/TextGeneration-v0", num_envs=32, model=lm, reward=reward, max_response_tokens=4
        )  # fmt: skip
        agent = DQN(envs, policy="tabular", seed=0, exploration=exploration, learning_rate=0.02)
        found[exploration] = evaluate(agent.learn(3_000), envs, kl_coef=0.1).reward
    assert found["reference"] == pytest.approx(1, abs=1e-3) and found["uniform"] < 0.01


# ---- as every agent


def test_metrics_and_how_much_is_learnt():
    envs, seen = make_envs(4, kl_coef=0.1), []
    agent = DQN(envs, batch_size=16)
    agent.learn(96, callback=lambda agent, metrics: seen.append(metrics))
    # Rounds of 6 steps in 4 rows, each transition learnt from 8 times.
    assert [m["time/total_timesteps"] for m in seen] == [24, 48, 72, 96]
    assert [m["train/n_updates"] for m in seen] == [12, 24, 36, 48] and agent.num_updates == 4
    rates = [m["rollout/exploration_rate"] for m in seen]
    assert rates == pytest.approx([0.525, 0.05, 0.05, 0.05])
    for m in seen:
        assert not {"objective/entropy", "audit/kl_exact"} & set(m)
        assert m["objective/kl"] > 0  # minus log pi_ref of what was written
        assert m["objective/rlhf_reward"] == pytest.approx(m["objective/scores"] - 0.1 * m["objective/kl"], abs=1e-5)


def test_what_it_predicts_is_greedy_and_its_model_the_same(tmp_path):
    envs = make_envs(4)
    agent = DQN(envs, batch_size=32, learning_rate=1e-2).learn(96)
    obs, _ = envs.reset(seed=5)
    actions = agent.predict(obs)[0]
    assert actions.tolist() == agent.predict(obs, deterministic=True)[0].tolist()
    lengths = obs["attention_mask"].sum(1)
    agent.save(tmp_path / "agent")
    for lm in (agent.policy_model, AutoModelForCausalLM.from_pretrained(tmp_path / "agent")):
        with torch.no_grad():
            logits = lm(torch.as_tensor(obs["input_ids"])).logits[range(4), lengths - 1]
        assert logits.softmax(-1).max(-1).values.min() > 0.999 and logits.argmax(-1).tolist() == actions.tolist()


@pytest.mark.parametrize("policy", ["tabular", "transformer"])
def test_of_equal_values_the_first_is_chosen_and_evaluated(policy):
    """All values are 0 at the start. The first word that may come in WoAiNi is chosen for certain."""
    envs = woaini(4)
    agent = DQN(envs, policy=policy)
    obs, _ = envs.reset(seed=0)
    first = np.flatnonzero(envs.action_masks()[0])[0]
    assert agent.predict(obs)[0].tolist() == [first] * 4
    found = evaluate(agent, envs)
    assert found.exact and max(map(np.max, found.occupancy)) == 1
    assert found.kl > 1 and all(np.isin(layer, (0, 1)).all() for layer in found.occupancy)
    assert all(bool(p.isfinite().all()) for p in agent.policy_model.parameters())


@pytest.mark.parametrize("cls", [DQN, QRDQN])
@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_save_load_continue_is_continue(cls, kind, tmp_path):
    def made():
        return make_envs(4, kind, kl_coef=0.1)

    agent = cls(made(), seed=1, batch_size=16, buffer_size=60)  # which is full soon
    agent.learn(48, callback=lambda agent, metrics: agent.save(tmp_path / "agent"))
    loaded = cls.load(tmp_path / "agent", env=made())
    assert loaded.num_timesteps == 48 and loaded.num_updates == 2 and loaded.config == agent.config
    metrics = []
    for one in (agent, loaded):
        one.learn(120, callback=lambda _, m: metrics.append({k: v for k, v in m.items() if k[:5] != "time/"}))
    assert len(metrics) == 6 and metrics[:3] == metrics[3:]
    ours, theirs = (one.algorithm.policy.state_dict() for one in (agent, loaded))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
