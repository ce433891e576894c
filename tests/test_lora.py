"""LoRA policies: the reference's own weights with an adapter, so that one set of weights serves both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from worlds import make_env, make_envs, model, tokenizer

from rlhf_gym.agents import GRPO, NLPO, PPO, RLOO
from rlhf_gym.cli import main
from rlhf_gym.lm import load_language_model
from rlhf_gym.lm.lora import adapted_copy, base_fingerprint, lora_off

IDS = torch.tensor([[4, 5, 6, 7]])


def agent(envs=None, agent_class=PPO, **options):
    return agent_class(
        envs or make_envs(8, kl_coef=0.05), seed=0, lora_rank=2, audit_interval=0, **{"learning_rate": 0.02} | options
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_copy_with_an_adapter_shares_every_weight(kind):
    base = model(kind)
    parameters = {id(p) for p in base.parameters()}
    before = copy.deepcopy(base.state_dict())
    adapted = adapted_copy(base, 2, base="x")
    own = [p for p in adapted.parameters() if id(p) not in parameters]
    assert {id(p) for p in adapted.parameters()} - {id(p) for p in own} == parameters
    assert own and all(p.requires_grad for p in own) and not any("lora" in name for name in base.state_dict())
    assert torch.equal(adapted(input_ids=IDS).logits, base(input_ids=IDS).logits)
    adapted(input_ids=IDS).logits.square().mean().backward()
    torch.optim.SGD(own, lr=10.0).step()
    assert not torch.equal(adapted(input_ids=IDS).logits, base(input_ids=IDS).logits)
    with lora_off(adapted):
        assert torch.equal(adapted(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert base_fingerprint(adapted) == base_fingerprint(base) != base_fingerprint(model(kind, seed=1))


def test_a_policy_learns_and_its_reference_does_not():
    envs = make_envs(16, kl_coef=0.01)
    before = copy.deepcopy(envs.language_model.model.state_dict())
    learner, metrics = agent(envs), []
    learner.learn(1200, callback=lambda _, found: metrics.append(found))
    assert abs(metrics[0]["objective/kl"]) < 1e-4  # it begins as the reference
    assert metrics[-1]["objective/kl"] > 0.05
    first, last = (sum(m["objective/scores"] for m in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert last > first + 0.3
    assert all(torch.equal(weight, before[name]) for name, weight in envs.language_model.model.state_dict().items())
    with lora_off(learner.policy_model):
        reference = envs.language_model.model(input_ids=IDS).logits
        assert torch.equal(learner.policy_model(input_ids=IDS).logits, reference)


def test_sampled_logprobs_are_those_of_the_update():
    metrics = []
    agent(num_minibatches=1, num_epochs=1).learn(100, callback=lambda _, found: metrics.append(found))
    assert all(found["train/approx_kl"] < 1e-8 for found in metrics)


@pytest.mark.parametrize("agent_class", [PPO, RLOO, GRPO])
def test_saved_and_loaded_goes_on_to_the_bit(tmp_path, agent_class):
    options = {} if agent_class is PPO else {"group_size": 2}
    unbroken = agent(agent_class=agent_class, **options).learn(150)
    broken = agent(agent_class=agent_class, **options).learn(60)
    broken.save(tmp_path / "a")
    assert not (tmp_path / "a" / "model.safetensors").exists()
    # The schedule is that of the whole run.
    broken = agent(agent_class=agent_class, **options)
    broken.learn(150, callback=lambda learner, _: learner.num_timesteps < 60)
    broken.save(tmp_path / "a")
    resumed = agent_class.load(tmp_path / "a", make_envs(8, kl_coef=0.05)).learn(150)
    expected = unbroken.policy_model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.policy_model.state_dict().items())


def test_a_saved_adapter_is_a_model(tmp_path):
    model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    envs = make_envs(8, kl_coef=0.05, model=str(tmp_path / "base"), tokenizer=None)
    learner = agent(envs).learn(100)
    learner.save(tmp_path / "a")
    merged = load_language_model(str(tmp_path / "a")).model
    assert (merged(input_ids=IDS).logits - learner.policy_model(input_ids=IDS).logits).abs().max() < 1e-5
    make_env(model=str(tmp_path / "a"), tokenizer=None).reset(seed=0)
    with pytest.raises(ValueError, match="adapter of another model than env's reference"):
        PPO.load(tmp_path / "a", make_envs(8, kl_coef=0.05, model=model(seed=1)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"policy": model()}, "no policy of its own"),
        ({"critic": "separate"}, "critic must be"),
        ({"agent_class": NLPO, "mask_top_k": 5}, "lora_rank must be None: NLPO"),
        ({"envs": make_envs(kind="lstm", kl_coef=0.05)}, "LSTMForCausalLM has no linear layers"),
    ],
)
def test_what_cannot_be_is_said(arguments, says):
    with pytest.raises(ValueError, match=says):
        agent(**arguments)
    with pytest.raises(ValueError, match="lora_rank must be None or an integer >= 1"):
        PPO(make_envs(), lora_rank=0)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model("llama").save_pretrained("base")
    tokenizer().save_pretrained("base")
    Path("prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    task = ["--prompts", "prompts.jsonl", "--reward", "length", "--max-response-tokens", "4"]
    train = ["train", "--model", "base", *task, "--lora", "2", "--num-envs", "4", "--eval-episodes", "4", "--out", "x"]
    assert main([*train, "--total-timesteps", "10"]) == 0
    assert main([*train, "--total-timesteps", "30", "--resume"]) == 0
    assert "going on from" in capsys.readouterr().out
    assert main(["evaluate", "--model", "x", *task, "--num-episodes", "4"]) == 0
    assert "KL to the reference" in capsys.readouterr().out
    assert (
        AutoModelForCausalLM.from_pretrained("base").num_parameters()
        == load_language_model("x/model").model.num_parameters()
    )
