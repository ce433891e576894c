"""MaskablePPO, RecurrentPPO, and the agent class of any algorithm of Stable-Baselines3."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from worlds import make_env, make_envs, model

from rlhf_gym.agents import A2C, DQN, SB3PPO, MaskablePPO, RecurrentPPO
from rlhf_gym.agents.sb3 import MlpAgent, SB3Agent, ValueAgent
from rlhf_gym.agents.trpo import MicroBatchTRPO
from rlhf_gym.exact import evaluate


def woaini(num_envs=32, **changes):
    return gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=num_envs, **{"kl_coef": 0.1} | changes)


def assert_equal_weights(one, other):
    ours, theirs = (agent.algorithm.policy.state_dict() for agent in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_goes_on_as_saved(cls, make, tmp_path, **config):
    agent = cls(make(), seed=1, **config)
    agent.learn(48, callback=lambda agent, metrics: agent.save(tmp_path / "agent"))
    loaded = cls.load(tmp_path / "agent", env=make())
    assert loaded.num_timesteps == agent.num_timesteps >= 48
    metrics = []
    for one in (agent, loaded):
        one.learn(120, callback=lambda _, m: metrics.append({k: v for k, v in m.items() if k[:5] != "time/"}))
    half = len(metrics) // 2
    assert half and str(metrics[:half]) == str(metrics[half:])  # a NaN is itself, here
    assert_equal_weights(agent, loaded)


class Compare(BaseCallback):
    """How far what the update computes is from what the rollout recorded, at the end of each rollout."""

    def __init__(self, batch_size=None):
        super().__init__()
        self.batch_size, self.worst = batch_size, []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        state = np.random.get_state()
        for data in self.model.rollout_buffer.get(self.batch_size):
            given = {}
            keep = slice(None)
            if hasattr(data, "lstm_states"):
                given = {"lstm_states": data.lstm_states, "episode_starts": data.episode_starts}
                keep = data.mask > 0
            if hasattr(data, "action_masks"):
                given = {"action_masks": data.action_masks}
            with torch.no_grad():
                values, logprobs, _ = self.model.policy.evaluate_actions(
                    data.observations, data.actions.long().flatten(), **given
                )
            differences = (logprobs - data.old_log_prob)[keep], (values.flatten() - data.old_values)[keep]
            self.worst.append(max(each.abs().max().item() for each in differences))
        np.random.set_state(state)


# ---- MaskablePPO


def test_masks_are_the_references_top_k_in_rollout_and_update():
    envs = make_envs(4, top_k=3, kl_coef=0.2)
    compare, seen, tokens = Compare(), [], []
    step = envs.process.step
    masks = envs.process.action_masks

    def checked(actions, *rest):
        allowed = masks()
        tokens.append((allowed.sum(1).tolist(), allowed.gather(1, torch.as_tensor(actions)[:, None]).all()))
        return step(actions, *rest)

    envs.process.step = checked
    agent = MaskablePPO(envs, policy=model("llama"), seed=0, audit_interval=1, learning_rate=1e-2)
    agent.learn(144, callback=[compare, lambda agent, m: seen.append(m)])
    assert len(compare.worst) == 3 and max(compare.worst) < 1e-5
    assert all(counts == [3] * 4 and inside for counts, inside in tokens)
    for m in seen:  # both distributions are renormalised on the three
        assert m["audit/logprob_mismatch"] < 1e-5 and m["audit/ref_logprob_mismatch"] < 1e-5


def test_the_agents_own_top_k_leaves_the_environment_as_it_is(tmp_path):
    """The policy is renormalised on the reference's likeliest tokens; the reference of the KL penalty stays whole."""
    envs = make_envs(4, kl_coef=0.2)
    compare, seen, inside = Compare(), [], []
    step, language_model = envs.process.step, envs.language_model.model

    def checked(actions, *rest):
        likeliest = envs.process.next_ref_logprobs().topk(3).indices
        inside.append((likeliest == torch.as_tensor(actions)[:, None]).any(1).all())
        return step(actions, *rest)

    envs.process.step = checked
    agent = MaskablePPO(envs, seed=0, audit_interval=1, learning_rate=1e-2, top_k=3)
    agent.learn(144, callback=[compare, lambda agent, m: seen.append(m)])
    assert len(compare.worst) == 3 and max(compare.worst) < 1e-5 and len(inside) == 36 and all(inside)
    for m in seen:
        assert m["audit/logprob_mismatch"] < 1e-5 and m["audit/ref_logprob_mismatch"] < 1e-5
    obs, _ = envs.reset(seed=0)
    given = {key: torch.as_tensor(value) for key, value in obs.items()}
    last = torch.arange(4), given["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits, reference = (model(**given).logits[last] for model in (agent.policy_model, language_model))
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, reference.topk(3).indices, True)
    assert torch.equal(logits > -torch.inf, kept)
    drawn = np.stack([agent.predict(obs)[0] for _ in range(30)])
    assert all(kept[i, torch.as_tensor(drawn[:, i])].all() for i in range(4))
    assert_goes_on_as_saved(MaskablePPO, lambda: make_envs(4, kl_coef=0.1), tmp_path, top_k=3)


def test_its_top_k_wants_a_reference_and_no_other_mask():
    with pytest.raises(ValueError, match="top_k must be None where the environment has top_k"):
        MaskablePPO(make_envs(2, top_k=4), top_k=3)
    with pytest.raises(ValueError, match="top_k must be None or an integer"):
        MaskablePPO(make_envs(2), top_k=0)


def test_without_masks_it_is_ppo():
    agents = [cls(make_envs(4, kl_coef=0.1), seed=3).learn(96) for cls in (SB3PPO, MaskablePPO)]
    ours, theirs = (agent.algorithm.policy.state_dict() for agent in agents)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_it_predicts_what_the_environment_allows():
    envs = make_envs(4, top_k=2)
    agent = MaskablePPO(envs, policy=model("llama"))
    obs, _ = envs.reset(seed=0)
    allowed = envs.action_masks()
    drawn = np.stack([agent.predict(obs)[0] for _ in range(30)])
    assert all(set(drawn[:, i]) <= set(np.flatnonzero(allowed[i])) for i in range(4))
    assert any(len(set(drawn[:, i])) == 2 for i in range(4))
    one = {key: value[2] for key, value in obs.items()}
    assert allowed[2][agent.predict(one, deterministic=True)[0]]
    with pytest.raises(ValueError, match="action_masks="):
        agent.algorithm.predict(obs)


def test_maskable_ppo_learns_and_goes_on(tmp_path):
    """On the two likeliest words of each state the optimum is that of a smaller task, and it is found."""
    envs = woaini(top_k=2)
    agent = MaskablePPO(envs, policy="tabular", seed=0, learning_rate=0.05)
    assert evaluate(agent, envs).normalised == pytest.approx(0, abs=1e-6)
    agent.learn(5_000)
    assert evaluate(agent, envs).normalised > 0.95
    assert_goes_on_as_saved(MaskablePPO, lambda: make_envs(4, top_k=3, kl_coef=0.1), tmp_path)


# ---- RecurrentPPO


@pytest.mark.parametrize("kind", ["lstm", "residual"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_states_that_are_carried_give_what_reading_everything_gives(kind, batch_size):
    """In the rollout, and in minibatches that begin anywhere in an episode; against plain forwards, too."""
    envs = make_envs(3, "lstm", kl_coef=0.1) if kind == "lstm" else woaini(3)
    agent = RecurrentPPO(envs, seed=0, n_steps=10, learning_rate=1e-2)
    torch.nn.init.normal_(agent.algorithm.policy.value_head.weight)
    compare = Compare(batch_size)
    plain = []

    class Plain(BaseCallback):
        def _on_step(self):
            obs, actions = self.locals["obs_tensor"], self.locals["actions"].flatten()
            for ids, mask, action, logprob in zip(*obs.values(), actions, self.locals["log_probs"], strict=True):
                ids, mask = (ids, mask) if ids.dtype == torch.int64 else (mask, ids)
                logits = self.model.policy.lm(ids[None, : int(mask.sum())]).logits[0, -1]
                plain.append(float(logits.log_softmax(-1)[action].detach() - logprob))
            return True

    agent.learn(90, callback=[compare, Plain()])
    assert len(compare.worst) >= 3 and max(compare.worst) < 1e-5
    assert len(plain) == 90 and np.abs(plain).max() < 1e-5


def test_recurrent_ppo_starts_from_the_reference_learns_and_goes_on(tmp_path):
    envs = woaini()
    agent = RecurrentPPO(envs, seed=0, learning_rate=0.01)  # of a table: an LSTM that begins as the table
    assert evaluate(agent, envs).kl == pytest.approx(0, abs=1e-6)
    agent.learn(3_000)
    assert evaluate(agent, envs).normalised > 0.8
    assert_goes_on_as_saved(RecurrentPPO, lambda: make_envs(4, "lstm", kl_coef=0.1), tmp_path)


def test_what_is_no_lstm_is_refused():
    with pytest.raises(TypeError, match="trains an LSTM, got a GPT2LMHeadModel"):
        RecurrentPPO(make_envs())
    with pytest.raises(ValueError, match="critic='shared' only"):
        RecurrentPPO(make_envs(4, "lstm"), critic="separate")


# ---- any algorithm


class MyPPO(stable_baselines3.PPO):
    """A stranger's."""


class MyDQN(stable_baselines3.DQN):
    """A stranger's."""


def test_which_agent_is_for_which_algorithm():
    ours = {
        stable_baselines3.PPO: SB3PPO, stable_baselines3.A2C: A2C, stable_baselines3.DQN: DQN,
        sb3_contrib.MaskablePPO: MaskablePPO, "sb3_contrib:RecurrentPPO": RecurrentPPO,
    }  # fmt: skip
    for algorithm, agent in ours.items():
        assert SB3Agent.of(algorithm) is agent
    for algorithm, parent in ((MyPPO, SB3Agent), (MicroBatchTRPO, SB3Agent), (MyDQN, ValueAgent)):
        assert SB3Agent.of(algorithm).__bases__ == (parent,)
    assert SB3Agent.of("sb3_contrib:ARS").__bases__ == (MlpAgent,)
    for wrong in ("sb3_contrib", "sb3_contrib:Nothing", "no_such_module:X"):
        with pytest.raises(ValueError, match="algorithm"):
            SB3Agent.of(wrong)
    with pytest.raises(TypeError, match="class of Stable-Baselines3"):
        SB3Agent.of("torch:Tensor")
    with pytest.raises(TypeError, match="RecurrentPPO remembers"):
        MlpAgent.of(sb3_contrib.RecurrentPPO)(make_envs())
    with pytest.raises(AssertionError, match="only supports"):
        SB3Agent.of(stable_baselines3.SAC)(make_envs())


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch")
@pytest.mark.parametrize(
    "algorithm, config",
    [
        (MyPPO, {"n_steps": 8, "batch_size": 16, "n_epochs": 2}),
        (MyDQN, {"batch_size": 16}),
        (sb3_contrib.ARS, {"n_delta": 2}),
    ],
)
def test_a_strangers_algorithm_learns_and_goes_on(algorithm, config, tmp_path):
    cls = SB3Agent.of(algorithm)
    assert isinstance(cls(make_envs(4), **config).algorithm, algorithm)
    assert_goes_on_as_saved(cls, lambda: make_envs(4, kl_coef=0.1), tmp_path, **config)


def test_tokens_of_ars_are_counted_once():
    envs = make_envs(4, kl_coef=0.1)
    active = []
    step = envs.process.step
    envs.process.step = lambda actions, rows=None: active.append(4) or step(actions, rows)
    agent = SB3Agent.of(sb3_contrib.ARS)(envs, n_delta=2).learn(60)
    # Rows that wait for the longest response are not counted.
    assert 60 <= agent.num_timesteps <= sum(active) < 2 * agent.num_timesteps


# ---- small policies


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch")
@pytest.mark.parametrize(
    "algorithm",
    [stable_baselines3.PPO, sb3_contrib.MaskablePPO, stable_baselines3.DQN, sb3_contrib.QRDQN, sb3_contrib.ARS],
)
def test_a_small_policy_as_a_language_model(algorithm):
    """Its logits are the policy's over the reference's k likeliest tokens, divided by nobody's temperature twice."""
    lm = model()
    envs = make_envs(4, model=lm, temperature=0.5)
    agent = MlpAgent.of(algorithm)(envs, top_k=3, seed=0)
    if algorithm is sb3_contrib.ARS:
        torch.nn.init.normal_(agent.algorithm.policy.action_net[0].weight)
    obs, _ = envs.reset(seed=0)
    actions = agent.predict(obs, deterministic=True)[0]
    for row in range(4):
        ids = torch.as_tensor(obs["input_ids"][row, : obs["attention_mask"][row].sum()])[None]
        with torch.no_grad():
            found = (agent.policy_model(ids).logits[0, -1] / 0.5).softmax(-1)
            output = lm(ids, output_hidden_states=True)
        features = output.hidden_states[-1][0, -1][None]
        tokens = output.logits[0, -1].topk(3).indices
        assert found[tokens].sum() == pytest.approx(1, abs=1e-6)
        if algorithm in (stable_baselines3.PPO, sb3_contrib.MaskablePPO):
            expected = agent.algorithm.policy.get_distribution(features).distribution.probs[0]
            torch.testing.assert_close(found[tokens], expected.detach(), atol=1e-5, rtol=0)
        else:
            choice = int(agent.algorithm.policy._predict(features)[0])
            assert found[tokens[choice]] == 1 and actions[row] == tokens[choice]


def test_small_policies_in_a_single_environment():
    agent = MlpAgent.of(stable_baselines3.PPO)(make_env(kl_coef=0.1), top_k=3, batch_size=4)
    assert agent.learn(12).num_timesteps == 12


def test_small_policies_learn_where_what_they_see_is_enough(tmp_path):
    """On WoAiNi the reference's state, the last word, is enough for the right text, and the evaluation exact."""
    envs = woaini()
    agent = MlpAgent.of(stable_baselines3.A2C)(envs, seed=0, top_k=4, learning_rate=3e-3).learn(8_000)
    found = evaluate(agent, envs)
    assert found.exact and found.normalised > 0.9
    assert_goes_on_as_saved(MlpAgent.of(stable_baselines3.A2C), lambda: make_envs(4, kl_coef=0.1), tmp_path, top_k=5)
