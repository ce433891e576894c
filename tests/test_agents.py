"""What holds for every batched agent that `AGENTS` names: the same seed gives the same bytes, saving, stepping, junk after the end."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from transformers import AutoModelForCausalLM
from worlds import make_envs, model

import rlhf_gym.agents
from rlhf_gym.agents import AGENTS, Agent
from rlhf_gym.cli.options import Train

# Settings under which a few rollouts of eight responses move the weights visibly ...
SETTINGS = {"learning_rate": 1e-2, "num_minibatches": 2}
# ... and what some agents need besides; a new one does without a line here where these do.
MORE = {
    "grpo": {"group_size": 4},
    "nlpo": {"mask_top_p": 0.99, "mask_update_interval": 2},
    "vargrad": {"group_size": 4},
    "expert-iteration": {"group_size": 4},
    "online-dpo": {"group_size": 4},
}
NEEDS_KL = {"vargrad", "soft-q", "online-dpo"}
# Equal rewards teach these nothing at all.
COMPARES_RESPONSES = {"rloo", "remax", "grpo", "vargrad", "expert-iteration", "online-dpo"}
LEARNS_NOTHING = {"best-of-n"}


def class_of(name):
    module, _, attribute = AGENTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


# Those of Stable-Baselines3 have tests of their own.
BATCHED = [name for name in AGENTS if issubclass(class_of(name), Agent)]
NAMES = [name for name in BATCHED if name not in LEARNS_NOTHING]


def envs_for(name, **changes):
    """Eight rows: a random language model, or the smallest exact task for agents that need a table."""
    if name == "q-learning":
        return gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=8, **{"kl_coef": 0.1, **changes})
    return make_envs(8, **{"model": model(), "kl_coef": 0.1, **changes})


def make(name, envs=None, seed=0, **config):
    return class_of(name)(
        envs_for(name) if envs is None else envs, seed=seed, **(SETTINGS | MORE.get(name, {}) | config)
    )


def everything(agent):
    """All weights, and what else an algorithm carries along."""
    found = {key: tensor.clone() for key, tensor in agent.policy.state_dict().items()}
    return found | {key: torch.from_numpy(x.copy()) for key, x in vars(agent).items() if isinstance(x, np.ndarray)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def moved(before, after):
    return any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", BATCHED)
def test_class_and_settings_are_where_people_import_them_from(name):
    for found in (class_of(name), class_of(name).config_class):
        assert getattr(rlhf_gym.agents, found.__name__) is found and found.__name__ in rlhf_gym.agents.__all__


def test_every_agent_is_in_the_help_and_has_a_section():
    assert set(AGENTS) <= set(re.findall(r"[\w-]+", inspect.getsource(Train)))
    page = (Path(__file__).parents[1] / "docs" / "agents.md").read_text(encoding="utf-8")
    assert [name for name in BATCHED if f"`--agent {name}`" not in page] == []


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes_other_seed_other_bytes(name):
    def run(seed):
        agent, history = make(name, seed=seed), []
        agent.learn(100, callback=lambda _, m: history.append({k: m[k] for k in m if not k.startswith("time/")}))
        return json.dumps(history), everything(agent)

    (history, first), (history_again, again), (_, other) = run(0), run(0), run(1)
    assert history == history_again
    assert_same(first, again)
    assert moved(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_save_load_continue_equals_continue(name, tmp_path):
    straight = make(name, seed=2).learn(160)
    halfway = make(name, seed=2)
    halfway.learn(160, callback=lambda agent, _: agent.num_timesteps < 80)
    halfway.save(tmp_path / "agent")
    resumed = class_of(name).load(tmp_path / "agent", env=envs_for(name))
    assert_same(everything(halfway), everything(resumed))
    resumed.learn(160)
    assert (resumed.num_timesteps, resumed.num_updates) == (straight.num_timesteps, straight.num_updates)
    assert_same(everything(straight), everything(resumed))


@pytest.mark.parametrize("name", NAMES)
def test_saved_agent_is_a_from_pretrained_directory(name, tmp_path):
    agent = make(name).learn(60)
    agent.save(tmp_path)
    observation, _ = agent.envs.reset(seed=0)
    inputs = {key: torch.from_numpy(x) for key, x in observation.items()}
    inputs["attention_mask"] = inputs["attention_mask"].long()
    last = torch.arange(8), inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path)(**inputs).logits[last]
        expected = agent.policy_model(**inputs).logits[last]
    if name == "nlpo":  # its mask is saved beside the model
        logits = logits.masked_fill(expected == -torch.inf, -torch.inf)
    assert torch.equal(logits, expected)
    assert np.array_equal(agent.predict(observation, deterministic=True)[0], expected.argmax(-1).numpy())


@pytest.mark.parametrize("name", NAMES)
def test_stepping_and_whole_responses_are_the_same_to_the_agent(name):
    """A wrapper hides evaluate_responses, so the agent must step."""
    once = {"num_epochs": 1, "num_minibatches": 1}  # Adam's first steps have the size of the rate, of rounding too
    whole, stepping = make(name, **once), make(name, VectorWrapper(envs_for(name)), **once)
    assert whole.collector.by_whole_responses and not stepping.collector.by_whole_responses
    seen = []
    for agent in (whole, stepping):
        agent.before_rollout()
        rollout = agent.collector.collect(seed=0)
        agent.total_timesteps = 1000
        seen.append((rollout.batch, agent.update(rollout)))
    (a, metrics), (b, metrics_b) = seen
    assert torch.equal(a.response_mask, b.response_mask)
    assert torch.equal(a.response_ids * a.response_mask, b.response_ids * a.response_mask)
    assert metrics == pytest.approx(metrics_b, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_after_the_end_matters(name):
    """Junk after the end leaves every weight and metric of an update bit for bit as they were."""
    results = []
    for junk in (0.0, 1e30, float("nan")):
        agent = make(name)
        agent.before_rollout()
        rollout = agent.collector.collect(seed=0)
        batch = rollout.batch
        after = ~batch.response_mask
        assert after.any()
        for field in ("logprobs", "values", "rewards", "kl", "ref_logprobs"):
            getattr(batch, field)[after] = junk
        batch.response_ids[after] = 2 if junk else 0
        ends = (batch.prompt_lengths + batch.response_mask.sum(1))[:, None]
        batch.ids[torch.arange(batch.ids.shape[1]) >= ends] = 2 if junk else 0
        agent.total_timesteps = 1000
        results.append((json.dumps(agent.update(rollout)), everything(agent)))
    for metrics, after in results[1:]:
        assert metrics == results[0][0]
        assert_same(after, results[0][1])


@pytest.mark.parametrize("name", NAMES)
def test_equal_scores_give_no_nan_and_teach_nothing(name):
    """While the policy is the reference there is no KL either; with equal scores there is nothing to learn then."""
    agent = make(name, num_epochs=1, num_minibatches=1)
    before = everything(agent)
    agent.before_rollout()
    rollout = agent.collector.collect(seed=0)
    same = torch.zeros_like(rollout.batch.rewards)
    ends = rollout.batch.response_mask.sum(1) - 1
    same[torch.arange(len(ends)), ends] = 3.0
    rollout.batch = replace(rollout.batch, rewards=same, scores=torch.full_like(rollout.batch.scores, 3.0))
    rollout.batch = replace(rollout.batch, kl=torch.zeros_like(same), ref_logprobs=rollout.batch.logprobs)
    if rollout.baselines is not None:
        rollout.baselines = torch.full_like(rollout.baselines, 3.0)
    agent.total_timesteps = 1000
    metrics = agent.update(rollout)
    metrics.pop("train/explained_variance", None)  # of returns that do not vary there is nothing to explain
    assert np.isfinite(list(metrics.values())).all()
    after = everything(agent)
    assert not any(tensor.isnan().any() for tensor in after.values())
    if name in COMPARES_RESPONSES:  # others learn what to expect, and their policy moves on the way
        assert max((before[key] - after[key]).abs().max() for key in before) < 0.1 * agent.config.learning_rate


@pytest.mark.parametrize("name", sorted(NEEDS_KL))
def test_a_kl_penalty_is_needed(name):
    agent = make(name, envs_for(name, kl_coef=0.0))
    with pytest.raises(ValueError, match=f"{type(agent).__name__} needs an environment with kl_coef > 0, got 0"):
        agent.learn(10)
    assert agent.num_timesteps == 0
    agent.envs.unwrapped.kl_coef = 0.1
    with pytest.raises(ValueError, match="log-probs of the reference"):
        rollout = agent.collector.collect(seed=0)
        rollout.batch = replace(rollout.batch, ref_logprobs=None)
        agent.update(rollout)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "q-learning"])  # its step sizes are counts
def test_learning_rate_zero_changes_nothing(name):
    """Statement 20: weights stay as they are, metrics of the change stay 0, and the reference never moves."""
    envs = envs_for(name)
    agent, metrics = make(name, envs, learning_rate=0.0), []
    before, reference = everything(agent), {k: x.clone() for k, x in envs.language_model.model.state_dict().items()}
    agent.learn(10_000, callback=lambda _, m: metrics.append(m) or len(metrics) < 4)
    assert_same(everything(agent), before)
    assert_same(envs.language_model.model.state_dict(), reference)
    assert len(metrics) == 4
    if name != "nlpo":  # its mask has a KL of its own
        assert all(abs(m["objective/kl"]) < 1e-4 for m in metrics)
    assert all(abs(m.get("train/approx_kl", 0.0)) < 1e-8 for m in metrics)
