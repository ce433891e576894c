"""Stable-Baselines3's algorithms behind the agents' interface: learning, metrics, stopping, saving, going on."""

from __future__ import annotations

import json
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from sb3_contrib import TRPO as StockTRPO
from test_sb3_policy import V, language_model, task
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_gym.agents.sb3 import A2C, SB3PPO, SB3Agent
from rlhf_gym.agents.trpo import TRPO
from rlhf_gym.envs.scalar import TextGenerationEnv
from rlhf_gym.envs.vector import TextGenerationVectorEnv

AGENTS = [TRPO, SB3PPO, A2C]


def make_envs(num_envs=4, **changes):
    return TextGenerationVectorEnv(num_envs, **task(kl_coef=0.1) | changes)


def weights(agent):
    return {name: p.detach().clone() for name, p in agent.algorithm.policy.state_dict().items()}


def assert_equal_weights(one, other, equal=True):
    assert all(torch.equal(one[name], other[name]) for name in one) == equal


@pytest.mark.parametrize("tokens", [1, 48, 49])
def test_a_run_that_learns_nothing_says_so(tokens):
    """4 rows of 12 tokens are a rollout; Stable-Baselines3 takes the rate after it, where a linear one is 0."""
    agent, constant = (SB3PPO(make_envs(), n_steps=12, lr_schedule=each) for each in ("linear", "constant"))
    before = weights(agent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        constant.learn(tokens)
        assert not [each for each in caught if "learning rate" in str(each.message)]
        agent.learn(tokens)
    told = [str(each.message) for each in caught if "learning rate of the only update will be 0" in str(each.message)]
    assert len(told) == (tokens <= 48) and all("one rollout of 48 tokens; raise it" in text for text in told)
    assert_equal_weights(before, weights(agent), equal=tokens <= 48)
    assert_equal_weights(before, weights(constant), equal=False)


@pytest.mark.parametrize("cls", AGENTS)
def test_metrics_after_each_update_under_both_families_of_names(cls):
    envs, seen = (
        make_envs(reward={"good": (lambda text: text.count("good"), 2.0), "short": (lambda text: -0.1, 1.0)}),
        [],
    )
    agent = cls(envs, n_steps=12)
    agent.learn(3 * 48, callback=[lambda agent, metrics: seen.append(metrics)])
    assert [m["time/total_timesteps"] for m in seen] == [48, 96, 144] and agent.num_timesteps == 144
    assert agent.num_updates == 3 and agent.algorithm.n_steps == 12
    for m in seen:
        assert m["objective/rlhf_reward"] == m["rollout/ep_rew_mean"]
        assert m["rollout/ep_rew_mean"] == pytest.approx(m["objective/scores"] - 0.1 * m["objective/kl"], abs=1e-5)
        assert m["objective/scores"] == pytest.approx(
            m["objective/scores/good"] + m["objective/scores/short"], abs=1e-5
        )
        assert m["objective/non_score_reward"] == pytest.approx(-0.1 * m["objective/kl"], abs=1e-5)
        assert 1 <= m["rollout/ep_len_mean"] <= 6 and 0 <= m["rollout/eos_rate"] <= 1
        assert 0 < m["objective/entropy"] < 6 * math.log(V) * 1.5
        assert m["train/value_loss"] == m["loss/value_avg"] > 0
        assert m["objective/kl_coef"] == 0.1 and m["time/fps"] > 0
        assert all(isinstance(value, float) for value in m.values())
    assert abs(seen[0]["objective/kl"]) < 1e-4 < abs(seen[2]["objective/kl"])
    if cls is not A2C:
        assert all(m["policy/approxkl_avg"] == m["train/approx_kl"] >= 0 for m in seen)


def test_callback_stops_learning_without_a_further_step():
    agent = A2C(make_envs(), n_steps=8)
    calls = []
    agent.learn(10_000, callback=lambda agent, metrics: calls.append(agent.num_timesteps) or len(calls) < 2)
    assert calls == [32, 64] and agent.num_timesteps == 64
    agent.learn(96)  # in all
    assert agent.num_timesteps == 96 and not agent.algorithm.policy._forward_hooks
    agent.learn(96)
    assert agent.num_timesteps == 96


def test_error_in_a_callback_leaves_no_hook_behind():
    agent = A2C(make_envs(), n_steps=8)
    with pytest.raises(ZeroDivisionError):
        agent.learn(64, callback=lambda agent, metrics: 1 / 0)
    assert not agent.algorithm.policy._forward_hooks
    agent.learn(64)


def test_callers_generators_are_untouched_and_the_seed_decides():
    envs = make_envs()
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1]
    first = TRPO(envs, seed=3, n_steps=8).learn(64)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    torch.rand(7)
    second, third = (TRPO(make_envs(), seed=seed, n_steps=8).learn(64) for seed in (3, 4))
    assert_equal_weights(weights(first), weights(second))
    assert_equal_weights(weights(first), weights(third), equal=False)


@pytest.mark.parametrize("cls", AGENTS)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_save_load_continue_is_continue(cls, critic, tmp_path):
    def run_and_save(agent, total):
        return agent.learn(total, callback=lambda agent, metrics: agent.save(tmp_path / "agent"))

    fewer = {"n_critic_updates": 2} if cls is TRPO else {}
    agent = cls(make_envs(), seed=1, n_steps=8, critic=critic, ref_kl_target=0.1, kl_horizon=100.0, **fewer)
    run_and_save(agent, 64)
    loaded = cls.load(tmp_path / "agent", env=make_envs())
    assert loaded.num_timesteps == 64 and loaded.num_updates == 2 and loaded.config == agent.config
    assert_equal_weights(weights(agent), weights(loaded))
    metrics = []
    for one in (agent, loaded):
        one.learn(128, callback=lambda agent, m: metrics.append(m | {k: 0.0 for k in m if k.startswith("time/")}))
    assert metrics[: len(metrics) // 2] == metrics[len(metrics) // 2 :]
    assert_equal_weights(weights(agent), weights(loaded))
    assert agent.envs.kl_coef == loaded.envs.kl_coef != 0.1
    obs, _ = make_envs().reset(seed=0)
    assert np.array_equal(agent.predict(obs)[0], loaded.predict(obs)[0])


def test_saved_agent_is_a_pretrained_directory(tmp_path):
    agent = TRPO(make_envs(), n_steps=8).learn(32)
    agent.save(tmp_path / "agent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    ids = torch.tensor([[2, 3, 4, 5]])
    assert torch.equal(model(ids).logits, agent.policy_model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "agent")("the food")["input_ids"] == [2, 3]
    names = {path.name for path in (tmp_path / "agent").iterdir()}
    assert {"model.safetensors", "value_head.safetensors", "trainer_state.json", "trainer_state.safetensors"} <= names
    assert not any(name.endswith((".zip", ".pkl", ".pt", ".pth", ".bin")) for name in names)
    assert json.loads((tmp_path / "agent" / "trainer_state.json").read_text())["num_timesteps"] == 32
    with pytest.raises(ValueError, match="holds a TRPO, not a A2C"):
        A2C.load(tmp_path / "agent", env=make_envs())


class PassesOn(stable_baselines3.A2C):
    """A subclass whose signature does not tell what it takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch")
def test_any_algorithm_by_its_class(tmp_path):
    agent = SB3Agent(make_envs(), algorithm=stable_baselines3.A2C, n_steps=8, vf_coef=0.1)
    assert agent.algorithm.gamma == 1 and agent.algorithm.vf_coef == 0.1
    assert SB3Agent(make_envs(), algorithm=PassesOn, n_steps=8).algorithm.gamma == 1
    agent.learn(64).save(tmp_path / "agent")
    loaded = SB3Agent.load(tmp_path / "agent", env=make_envs(), algorithm=stable_baselines3.A2C)
    assert_equal_weights(weights(agent), weights(loaded))
    with pytest.raises(ValueError, match="trained by A2C, not PPO"):
        SB3Agent.load(tmp_path / "agent", env=make_envs(), algorithm=stable_baselines3.PPO)


def test_scalar_environment_and_one_without_kl_or_reference():
    assert A2C(TextGenerationEnv(**task(kl_coef=0.1)), n_steps=8).learn(16).num_timesteps == 16
    given = task()
    envs = TextGenerationVectorEnv(2, **given | {"model": None})
    agent = A2C(envs, policy=language_model(), n_steps=8).learn(16)
    assert agent.policy_model.config.vocab_size == V
    with pytest.raises(ValueError, match="policy"):
        A2C(envs)


def test_predict_takes_rows_and_batches_numpy_and_torch():
    agent = A2C(make_envs(), n_steps=8)
    obs, _ = agent.envs.reset(seed=0)
    greedy, state = agent.predict(obs, deterministic=True)
    assert state is None and greedy.shape == (4,)
    assert agent.predict({k: v[1] for k, v in obs.items()}, deterministic=True)[0] == greedy[1]
    tensors = {k: torch.as_tensor(v) for k, v in obs.items()}
    actions = agent.predict(tensors, deterministic=True)[0]
    assert isinstance(actions, torch.Tensor) and actions.tolist() == greedy.tolist()
    assert len({tuple(agent.predict(obs)[0]) for _ in range(10)}) > 1


def test_tensors_from_the_environment():
    envs = TextGenerationVectorEnv(4, output="torch", autoreset_mode="same_step", **task(kl_coef=0.1))
    arrays = TextGenerationVectorEnv(4, autoreset_mode="disabled", **task(kl_coef=0.1))
    assert_equal_weights(weights(A2C(envs, n_steps=8).learn(64)), weights(A2C(arrays, n_steps=8).learn(64)))


def test_wrong_arguments():
    envs = make_envs()
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        TRPO(envs, learning_rat=1e-3)
    with pytest.raises(TypeError, match="on-policy"):
        SB3Agent(envs, algorithm=stable_baselines3.DQN)
    with pytest.raises(ValueError, match="critic"):
        TRPO(envs, critic="none")
    with pytest.raises(ValueError, match="gamma"):
        SB3PPO(envs, gamma=1.5)
    with pytest.raises(ValueError, match="total_timesteps"):
        TRPO(envs).learn(0)


@pytest.mark.parametrize(
    "cls, config", [(TRPO, {"target_kl": 0.05}), (SB3PPO, {"learning_rate": 5e-3}), (A2C, {"learning_rate": 1e-2})]
)
def test_agents_learn_what_the_reward_asks_for(cls, config):
    scores = []
    agent = cls(make_envs(16, kl_coef=0.0, reward=lambda text: text.count("good") / 6), n_steps=12, **config)
    agent.learn(16 * 12 * 10, callback=lambda agent, m: scores.append(m["objective/scores"]))
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.1


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch")
def test_stock_trpo_is_still_usable_with_eager_attention():
    model = language_model()
    model.set_attn_implementation("eager")
    agent = SB3Agent(make_envs(), policy=model, algorithm=StockTRPO, n_steps=8).learn(32)
    assert isinstance(agent.envs, gym.vector.VectorEnv)
