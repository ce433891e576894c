"""Text as small vectors: the reference's hidden state as the observation, its likeliest tokens as the actions."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from sb3_contrib import QRDQN, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from worlds import V, make_env, make_envs, model

import rlhf_gym
from rlhf_gym import check_vector_env
from rlhf_gym.agents.sb3 import AnnounceLogprobs, GymVectorToSB3
from rlhf_gym.wrappers import HiddenStateObservation, TopKAction, vector
from rlhf_gym.wrappers.top_k import rank_tokens

K = 5


def small(**changes):
    return TopKAction(HiddenStateObservation(make_env(**changes)), K)


def small_envs(num_envs=3, **changes):
    return vector.TopKAction(vector.HiddenStateObservation(make_envs(num_envs, **changes)), K)


def plain_last(lm, ids):
    """Logits and hidden state after one sequence, by a plain forward of GPT-2."""
    with torch.no_grad():
        output = lm(torch.tensor([ids]), output_hidden_states=True)
    return output.logits[0, -1], output.hidden_states[-1][0, -1].numpy()


# ---- conformance


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_vector_forms_keep_the_contract(mode, output):
    check_vector_env(small_envs(autoreset_mode=mode, output=output), num_steps=25)


@pytest.mark.filterwarnings("ignore:.*infinity.*", "ignore:.*different from the unwrapped.*")
def test_single_forms_pass_the_checkers_and_can_be_made_from_their_spec():
    env = TopKAction(HiddenStateObservation(gym.make("rlhf_gym/WoAiNi-v0")), 3, forbidden="likeliest")
    check_env(env, skip_render_check=True)
    sb3_check_env(env)
    again = gym.make(env.spec)
    assert again.action_space == gym.spaces.Discrete(3) and again.observation_space == env.observation_space
    assert again.ranks.forbidden == "likeliest"


def test_they_are_where_gymnasium_would_have_them():
    assert rlhf_gym.wrappers.TopKAction is TopKAction
    assert rlhf_gym.wrappers.vector.TopKAction is vector.TopKAction is not TopKAction


# ---- what they do


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_hidden_states_and_tokens_are_those_of_a_plain_forward(mode):
    """Also on the last observation of an episode, wherever the mode puts that."""
    lm = model()
    inner = make_envs(3, model=lm, autoreset_mode=mode)
    envs = vector.TopKAction(vector.HiddenStateObservation(inner), K)
    texts = make_envs(3, model=lm, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    obs, _ = envs.reset(seed=1)
    ids, _ = texts.reset(seed=1)
    num_ends = 0
    for _ in range(20):
        rows = [x[: m.sum()].tolist() for x, m in zip(ids["input_ids"], ids["attention_mask"], strict=True)]
        last = [plain_last(lm, row) for row in rows]
        np.testing.assert_allclose(obs, [hidden for _, hidden in last], atol=1e-5)
        tokens = np.array([logits.argsort(descending=True)[:K].tolist() for logits, _ in last])
        going = ~inner.process.ended.numpy()
        np.testing.assert_array_equal(envs.action_tokens()[going], tokens[going])
        actions = rng.integers(0, K, 3)
        chosen = np.where(going, tokens[np.arange(3), actions], 0)
        obs, rewards, ends, _, info = envs.step(actions)
        ids, other_rewards, other_ends, _, other = texts.step(chosen)
        np.testing.assert_array_equal(ends, other_ends)
        np.testing.assert_allclose(rewards, other_rewards)
        np.testing.assert_allclose(info["ref_logprob"], other["ref_logprob"], atol=1e-5)
        num_ends += ends.sum()
        if mode is AutoresetMode.SAME_STEP:
            for row in np.flatnonzero(ends):
                final = other["final_obs"][row]
                hidden = plain_last(lm, final["input_ids"][: final["attention_mask"].sum()].tolist())[1]
                np.testing.assert_allclose(info["final_obs"][row], hidden, atol=1e-5)
        elif mode is AutoresetMode.DISABLED and ends.any():
            obs, _ = envs.reset(options={"reset_mask": ends})
            ids, _ = texts.reset(options={"reset_mask": ends})
    assert num_ends > 3


def test_a_single_environment_is_a_row_of_the_batch():
    env, envs = small(), small_envs(1)
    one, many = env.reset(seed=3)[0], envs.reset(seed=3)[0]
    for action in (0, 3, 1, 2, 4, 0):
        np.testing.assert_allclose(one, many[0], atol=1e-6)
        np.testing.assert_array_equal(env.action_tokens(), envs.action_tokens()[0])
        one, reward, ended, _, info = env.step(action)
        many, rewards, ends, _, infos = envs.step(np.array([action]))
        assert reward == pytest.approx(rewards[0]) and ended == ends[0]
        assert info["ref_logprob"] == pytest.approx(infos["ref_logprob"][0], abs=1e-6)
        if ended:
            break
    assert ended


def test_equals_are_ranked_by_their_ids():
    logprobs = torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1], [0.3, 0.0, 0.4, 0.3, 0.0]]).log()
    tokens, possible = rank_tokens(logprobs, 5)
    assert tokens.tolist() == [[2, 0, 1, 3, 4], [2, 0, 3, 1, 4]]
    assert possible.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_forbidden_actions_are_masked_and_refused_or_mean_the_likeliest():
    """After 你 only 。 is possible in WoAiNi."""
    envs = vector.TopKAction(gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=2), 3)
    _, info = envs.reset(seed=0)
    assert info["action_mask"].tolist() == [[1, 1, 1]] * 2 and info["action_mask"].dtype == np.int8
    for _ in range(3):  # 我爱你 in both rows
        _, _, _, _, info = envs.step(np.array([0, 0]))
    assert info["action_mask"].tolist() == envs.action_masks().astype(int).tolist() == [[1, 0, 0]] * 2
    before = envs.unwrapped.process.ids.clone()
    with pytest.raises(ValueError, match=r"action 2 in row 1 is forbidden.*likeliest"):
        envs.step(np.array([0, 2]))
    assert torch.equal(before, envs.unwrapped.process.ids)
    assert envs.step(np.array([0, 0]))[2].all()

    lenient = vector.TopKAction(gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=1), 3, forbidden="likeliest")
    _, info = lenient.reset(seed=0)
    for action in (0, 0, 0, 2):
        assert "action_mask" not in info and lenient.action_masks().all()
        _, rewards, _, _, info = lenient.step(np.array([action]))
    assert rewards.tolist() == [1.0] and info["response"][0] == "我爱你。"


def test_wrong_arguments_and_actions():
    with pytest.raises(ValueError, match="k must be an integer from 1 to the vocabulary size 14"):
        TopKAction(make_env())
    assert TopKAction(make_env(top_k=4)).action_space.n == 4
    for k in (0, V + 1, True, 2.0):
        with pytest.raises(ValueError, match="k must be"):
            vector.TopKAction(make_envs(), k)
    with pytest.raises(ValueError, match="forbidden must be one of"):
        TopKAction(make_env(), 3, forbidden="maybe")
    with pytest.raises(TypeError, match="text-generation environment"):
        HiddenStateObservation(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="must still be Dict"):
        HiddenStateObservation(HiddenStateObservation(make_env()))
    envs = small_envs()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"in \[0, 5\), got 5 in row 1"):
        envs.step(np.array([0, K, 0]))
    with pytest.raises(ValueError, match="integers of shape"):
        envs.step(np.zeros(3))


# ---- the KL


@pytest.mark.parametrize("renormalised", [False, True])
def test_the_kl_is_to_the_reference_as_the_environment_has_it(renormalised):
    """The mean over all responses of a fixed policy over ranks, against sums by hand over the two choices per state."""
    lm, beta, policy = model(), 0.3, np.array([0.7, 0.3])
    given = dict(model=lm, prompts=["the cat"], reward=lambda text: 1.0, max_response_tokens=2, kl_coef=beta)
    env = TopKAction(make_env(**given | ({"top_k": 2} if renormalised else {})), 2)
    total, expected = 0.0, 1.0
    for first in (0, 1):
        for second in (0, 1):
            env.reset(seed=0)
            probability, earned = policy[first], 0.0
            env.announce_logprobs(np.log(policy[first]))
            _, reward, ended, _, _ = env.step(first)
            earned += reward
            if not ended:
                probability *= policy[second]
                env.announce_logprobs(np.log(policy[second]))
                earned += env.step(second)[1]
            elif second == 1:
                continue
            total += probability * earned

    def kl(ids):  # of one state
        logits = plain_last(lm, ids)[0]
        best = logits.topk(2).values
        ref = (best.log_softmax(0) if renormalised else best - logits.logsumexp(0)).numpy()
        return (policy * (np.log(policy) - ref)).sum(), logits.topk(2).indices.tolist()

    prompt = env.unwrapped.process.prompts[0].ids.tolist()
    here, tokens = kl(prompt)
    expected -= beta * here
    for token, probability in zip(tokens, policy, strict=True):
        if token != 2:  # EOS
            expected -= beta * probability * kl([*prompt, token])[0]
    assert total == pytest.approx(expected, abs=1e-5)


def test_all_log_probs_give_the_exact_kl_also_where_actions_share_a_token():
    envs = vector.TopKAction(gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=1, kl_coef=1.0), 3, forbidden="likeliest")
    assert envs.needs_all_logprobs
    policy = np.array([[0.5, 0.3, 0.2]])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="those of all actions"):
        envs.announce_logprobs(np.log(policy[:, 0]))
    paid = []
    for _ in range(4):
        envs.announce_logprobs(np.log(policy))
        paid.append(float(envs.step(np.array([0]))[1][0]))
    # 我 .5, others .5/3 each; 爱 after it .8, others .2/3; 你 .6, others .4/3; then 。 alone, and no KL.
    expected = [
        -(policy[0] * np.log(policy[0] / np.array([p, (1 - p) / 3, (1 - p) / 3]))).sum() for p in (0.5, 0.8, 0.6)
    ]
    assert paid == pytest.approx([*expected, 1.0], abs=1e-5)


# ---- Stable-Baselines3's own policies on it


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("cls", [PPO, A2C, DQN, QRDQN])
def test_stock_algorithms_run_on_both_wrappers(cls, native):
    """Through the adapter, and through a DummyVecEnv of single environments."""
    given = dict(reward=lambda text: float("good" in text), max_response_tokens=2)
    if native:
        venv = GymVectorToSB3(small_envs(8, **given))
    else:
        venv = DummyVecEnv([lambda: Monitor(small(**given))] * 2)
    on_policy = {"n_steps": 8, "gamma": 1.0}
    settings = {
        PPO: on_policy | {"batch_size": 16, "n_epochs": 1},
        A2C: on_policy,
        DQN: {"buffer_size": 200, "learning_starts": 16, "train_freq": 4},
        QRDQN: {"buffer_size": 200, "learning_starts": 16, "train_freq": 4},
    }
    agent = cls("MlpPolicy", venv, seed=0, device="cpu", **settings[cls])
    agent.learn(64)
    assert agent.predict(venv.reset(), deterministic=True)[0].max() < K


@pytest.mark.parametrize("forbidden, cls", [("error", MaskablePPO), ("likeliest", PPO)])
def test_rewards_are_score_minus_kl_of_the_tokens(forbidden, cls):
    """WoAiNi with KL: masked, and with several actions for one token, where the exact KL is announced."""
    inner = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=8, kl_coef=0.1)
    envs = vector.TopKAction(vector.HiddenStateObservation(inner), 4, forbidden=forbidden)
    seen = []
    step = envs.env.step
    envs.env.step = lambda tokens: seen.append(step(tokens)) or seen[-1]
    agent = cls(
        "MlpPolicy", GymVectorToSB3(envs), n_steps=8, batch_size=32, n_epochs=1, gamma=1.0, seed=0, device="cpu"
    )
    agent.learn(64, callback=AnnounceLogprobs())
    rewards = np.stack([out[1] for out in seen])
    ends = np.stack([out[2] for out in seen])
    scores = np.stack([out[4].get("score", np.zeros(8)) for out in seen])
    refs = np.stack([out[4]["ref_logprob"] for out in seen])
    assert ends.sum() > 5
    if forbidden == "error":
        logprobs = agent.rollout_buffer.log_probs.reshape(8, 8).T
        np.testing.assert_allclose(rewards, scores - 0.1 * (logprobs - refs), atol=1e-5)
    else:  # a token without a choice costs nothing; elsewhere a KL is never negative
        assert np.abs((rewards - scores)[refs == 0]).max() < 1e-6 and (rewards - scores).max() < 1e-6
