"""PPO: rollout = forward, the first step is REINFORCE's, resuming, and learning on a toy (CORRECTNESS 1-3, 5, 20, 26,
29)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorWrapper
from transformers import AutoModelForCausalLM
from worlds import EOS, V, goodness, make_envs, model, tokenizer

from rlhf_gym.agents import PPO
from rlhf_gym.agents.logs import rollout_metrics
from rlhf_gym.agents.policy import Policy
from rlhf_gym.agents.stepping import collect_by_stepping, token_filter_of
from rlhf_gym.agents.updates import accumulate_gradients
from rlhf_gym.lm import make_engine

KL_COEF = 0.1


def envs(num_envs=8, **changes):
    return make_envs(num_envs, **{"kl_coef": KL_COEF, **changes})


def collected(agent):
    """One rollout from the first prompts of seed 0."""
    agent.envs.reset(seed=0)
    return agent.collector.collect().batch


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"allowed_tokens": [2, 4, 5, 6, 7]}],
    ids=["plain", "temperature", "top_k", "allowed"],
)
def test_rollout_equals_forward(kind, changes):
    """Log-probs and values kept from sampling are those of a teacher-forced forward; with policy == reference every KL
    is 0 and rewards are scores."""
    lm = model(kind)
    agent = PPO(envs(model=lm, **changes), seed=1)
    agent.policy.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    batch = collected(agent)
    with torch.no_grad():
        logprobs, values, _ = agent.policy(batch)
    torch.testing.assert_close(batch.logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.values, values, atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.kl, torch.zeros_like(batch.kl), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.rewards.sum(1), batch.scores, atol=1e-5, rtol=0)
    if not changes:  # and by the plain model, row by row
        for row in range(len(batch)):
            n, p = int(batch.response_mask[row].sum()), int(batch.prompt_lengths[row])
            with torch.no_grad():
                plain = torch.log_softmax(lm(batch.ids[row : row + 1, : p + n]).logits[0, p - 1 : -1], -1)
            torch.testing.assert_close(
                batch.logprobs[row, :n], plain.gather(1, batch.response_ids[row, :n, None])[:, 0], atol=1e-5, rtol=0
            )


def test_value_is_read_before_the_token():
    """A value head that outputs the position (an embedding that counts): V of response token t is that of position
    prompt_length - 1 + t."""
    agent = PPO(envs(kind="gpt2"), seed=0)
    lm = agent.policy.model
    with torch.no_grad():
        for p in lm.transformer.h.parameters():
            p.zero_()
        lm.transformer.wte.weight.zero_()
        lm.transformer.wpe.weight.zero_()
        lm.transformer.wpe.weight[:, 0] = torch.arange(32.0)
        lm.transformer.ln_f = torch.nn.Identity()
        agent.policy.value_head.weight.zero_()
        agent.policy.value_head.weight[0, 0] = 1.0
    batch = collected(agent)
    expected = torch.where(
        batch.response_mask, batch.prompt_lengths[:, None] - 1.0 + torch.arange(batch.response_ids.shape[1]), 0.0
    )
    torch.testing.assert_close(batch.values, expected)
    torch.testing.assert_close(agent.policy(batch)[1], expected)


class Plain(VectorWrapper):
    """A wrapper hides evaluate_responses, so the agent must step."""


def only_long(completions):
    """A metric that says nothing of short responses."""
    return [None if len(text.split()) < 3 else 1.0 + text.count("good") for text in completions]


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_stepping_and_whole_responses_are_the_same_to_the_agent(mode):
    """Rollout after rollout: rows that finish early and go on take no prompts from the next rollout."""
    lm, other = model(), model(seed=1)
    for changes in ({}, {"top_k": 4, "kl_estimator": "k3"}):
        changes = {"model": lm, "autoreset_mode": mode, "metrics": {"long": only_long}, **changes}
        # Another model than the reference acts, so that there is a KL to estimate.
        whole = PPO(envs(4, **changes), policy=copy.deepcopy(other), seed=3, num_rounds=2)
        stepping = PPO(Plain(envs(4, **changes)), policy=copy.deepcopy(other), seed=3, num_rounds=2)
        assert whole.collector.by_whole_responses and not stepping.collector.by_whole_responses
        for number in range(3):
            a, b = (agent.collector.collect(seed=3 if number == 0 else None) for agent in (whole, stepping))
            assert a.batch.kl.abs().max() > 0.1
            torch.testing.assert_close(a.metrics["long"], b.metrics["long"], equal_nan=True)
            names = [rollout_metrics(agent, r) for agent, r in ((whole, a), (stepping, b))]
            expected = [n for n in only_long(a.completions) if n is not None]
            assert 0 < len(expected) < len(a.completions)
            for found in names:
                assert found["objective/metric/long"] == pytest.approx(np.mean(expected), abs=1e-6)
            assert torch.equal(
                a.batch.response_ids * a.batch.response_mask, b.batch.response_ids * b.batch.response_mask
            )
            assert torch.equal(a.batch.response_mask, b.batch.response_mask) and torch.equal(
                a.batch.ended_by_eos, b.batch.ended_by_eos
            )
            for name in ("logprobs", "rewards", "scores", "kl"):
                torch.testing.assert_close(getattr(a.batch, name), getattr(b.batch, name), atol=1e-5, rtol=0, msg=name)
            assert a.completions == b.completions and a.prompts == b.prompts
            torch.testing.assert_close(a.terms["goodness"], b.terms["goodness"])


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("changes", [{"top_k": 3, "temperature": 0.6}, {"allowed_tokens": [EOS, 4, 5, 6]}], ids=str)
def test_sync_vector_env_has_the_filter_of_its_rows(changes, mode):
    """The same tokens with the same log-probs as in our own environment: temperature, top-k and masks are honoured."""
    lm, filters, found = model(), [], []
    for kind, settings in (("sync", {"vector_kwargs": {"autoreset_mode": mode}}), (None, {"autoreset_mode": mode})):
        vector = gym.make_vec(
            "rlhf_gym/TextGeneration-v0", num_envs=3, vectorization_mode=kind, **settings, model=lm, tokenizer=tokenizer(),
            prompts=["the cat", "a"], reward=goodness, max_response_tokens=4, **changes,
        )  # fmt: skip
        filters.append(token_filter_of(vector))
        policy = Policy(model(seed=1), token_filter=filters[-1])
        uniforms = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
        engine = make_engine(policy.model, 3, vector.single_observation_space["input_ids"].shape[0])
        with torch.no_grad():
            found.append(collect_by_stepping(vector, policy, engine, uniforms, seed=0).batch)
    assert filters[0] == filters[1]
    a, b = found
    assert torch.equal(a.response_ids * a.response_mask, b.response_ids * b.response_mask)
    torch.testing.assert_close(a.logprobs * a.response_mask, b.logprobs * b.response_mask, atol=1e-5, rtol=0)
    assert (a.allowed is None) == (b.allowed is None) == ("top_k" not in changes)


class Masked(Plain):
    """Somebody else's masks: only words of a parity that changes with the length of the text, or EOS."""

    def _told(self, observation, info):
        mask = (np.arange(V) + observation["attention_mask"].sum(1)[:, None]) % 2 == 0
        mask[:, EOS] = True
        return observation, info | {"action_mask": mask.astype(np.int8), "_action_mask": np.ones(len(mask), bool)}

    def reset(self, **arguments):
        return self._told(*super().reset(**arguments))

    def step(self, actions):
        observation, *rest, info = super().step(actions)
        observation, info = self._told(observation, info)
        return observation, *rest, info


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_masks_in_info_are_honoured(mode):
    policy = Policy(model(seed=1))
    uniforms = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    vector = Masked(envs(4, kl_coef=0.0, autoreset_mode=mode))
    engine = make_engine(policy.model, 4, vector.single_observation_space["input_ids"].shape[0])
    with torch.no_grad():
        batch = collect_by_stepping(vector, policy, engine, uniforms, seed=0).batch
    position = batch.prompt_lengths[:, None] + torch.arange(6)
    fits = ((batch.response_ids + position) % 2 == 0) | (batch.response_ids == EOS)
    assert batch.response_mask.sum() > 12 and fits[batch.response_mask].all()
    for row in range(8):  # the probabilities are those of the allowed tokens alone
        n, p = int(batch.response_mask[row].sum()), int(batch.prompt_lengths[row])
        with torch.no_grad():
            logits = policy.model(batch.ids[row : row + 1, : p + n]).logits[0, p - 1 : -1]
        allowed = (torch.arange(V) + position[row, :n, None]) % 2 == 0
        allowed[:, EOS] = True
        assert torch.equal(batch.allowed[row, :n], allowed)
        expected = torch.log_softmax(logits.masked_fill(~allowed, -torch.inf), -1)
        torch.testing.assert_close(
            batch.logprobs[row, :n], expected.gather(1, batch.response_ids[row, :n, None])[:, 0], atol=1e-5, rtol=0
        )


def test_first_minibatch_is_reinforce():
    """ratio 1, clip fraction 0, approx_kl 0; the policy's gradient is that of -mean(A log pi)."""
    agent = PPO(envs(model=model("llama")), seed=0, vf_coef=0.0)
    batch = collected(agent)
    advantages = torch.randn(batch.rewards.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, advantages=advantages, returns=advantages)
    stats = accumulate_gradients(agent, batch, agent.loss, torch.arange(len(batch)))
    assert abs(stats["ratio"] - 1) < 1e-5 and stats["clip_fraction"] == 0 and abs(stats["approx_kl"]) < 1e-10
    ours = [p.grad.clone() for p in agent.policy.model.parameters()]
    agent.optimizer.zero_grad()
    logprobs = []
    for row in range(len(batch)):
        n, p = int(batch.response_mask[row].sum()), int(batch.prompt_lengths[row])
        out = torch.log_softmax(agent.policy.model(batch.ids[row : row + 1, : p + n]).logits[0, p - 1 : -1], -1)
        logprobs.append((out.gather(1, batch.response_ids[row, :n, None])[:, 0] * advantages[row, :n]).sum())
    (-torch.stack(logprobs).sum() / batch.response_mask.sum()).backward()
    for mine, parameter in zip(ours, agent.policy.model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-4)


def test_gradient_accumulation_equals_one_batch():
    gradients = []
    for size in (None, 3, 1):
        agent = PPO(envs(model=model("llama")), seed=0, micro_batch_size=size)
        batch = collected(agent)
        batch = replace(batch, advantages=batch.rewards, returns=batch.rewards)
        accumulate_gradients(agent, batch, agent.loss, torch.arange(len(batch)))
        gradients.append([p.grad.clone() for p in agent.policy.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_nothing_after_the_end_matters():
    """Statement 7 through the whole update (GAE, scaling, two epochs): junk after the end leaves every weight and
    metric bit for bit as they were."""
    results = []
    for junk in (0.0, 1e30, float("nan")):
        agent = PPO(envs(), seed=0, num_epochs=2, learning_rate=1e-2)
        agent.policy.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        agent.envs.reset(seed=0)
        rollout = agent.collector.collect()
        batch = rollout.batch
        after = ~batch.response_mask
        assert after.any()
        for name in ("logprobs", "values", "rewards", "kl"):
            getattr(batch, name)[after] = junk
        batch.response_ids[after] = 5 if junk else 0
        ends = (batch.prompt_lengths + batch.response_mask.sum(1))[:, None]
        batch.ids[torch.arange(batch.ids.shape[1]) >= ends] = 5 if junk else 0
        agent.total_timesteps = 1000
        metrics = agent.update(rollout)
        results.append((json.dumps(metrics), weights(agent.policy)))
    for metrics, after in results[1:]:
        assert metrics == results[0][0]
        assert all(torch.equal(after[name], tensor) for name, tensor in results[0][1].items())


@pytest.mark.parametrize(("dtype", "mismatch"), [("float32", 0.0), ("bfloat16", 0.25)])
def test_logprob_mismatch(dtype, mismatch):
    """How far sampling's log-probs were from the training forward's: here they are moved by .25 nats. In bfloat16 the
    forward's own are taken, so that the ratio begins at 1 all the same."""
    agent = PPO(envs(kl_coef=0.0), seed=0, dtype=dtype, num_epochs=1, num_minibatches=1)
    rollout = agent.collector.collect()
    with torch.no_grad():
        logprobs = agent.policy(rollout.batch)[0]
    rollout.batch = replace(rollout.batch, logprobs=torch.where(rollout.batch.response_mask, logprobs - mismatch, 0.0))
    agent.total_timesteps = 1000
    metrics = agent.update(rollout)
    assert metrics["train/logprob_mismatch"] == pytest.approx(mismatch, abs=1e-2)
    assert metrics["train/ratio"] == pytest.approx(1, abs=1e-2)


def test_dropout_stays_off():
    lm = model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    agent = PPO(envs(model=lm), seed=0)
    agent.policy.train()
    batch = collected(agent)
    torch.testing.assert_close(agent.policy(batch)[0], batch.logprobs, atol=1e-5, rtol=0)
    assert not agent.policy.training and not agent.envs.unwrapped.language_model.model.training


def test_learning_rate_zero_changes_nothing_and_reference_never_moves():
    lm = model()
    reference_before = weights(lm)
    agent = PPO(envs(model=lm), seed=0, learning_rate=0.0)
    before = weights(agent.policy)
    metrics = []
    agent.learn(10_000, callback=lambda _, m: metrics.append(m) or len(metrics) < 10)
    assert len(metrics) == 10
    for name, tensor in weights(agent.policy).items():
        assert torch.equal(tensor, before[name])
    assert all(
        abs(m["objective/kl"]) < 1e-4 and m["train/clip_fraction"] == 0 and abs(m["train/approx_kl"]) < 1e-9
        for m in metrics
    )
    PPO(envs(model=lm), seed=0, learning_rate=0.01).learn(200)
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensor, reference_before[name])


def test_same_seed_same_bytes_other_seed_other_bytes():
    def run(seed):
        agent = PPO(envs(), seed=seed, learning_rate=1e-2)
        history = []
        agent.learn(
            300, callback=lambda _, m: history.append({k: v for k, v in m.items() if not k.startswith("time/")})
        )
        return history, weights(agent.policy)

    (history, first), (history_again, again), (_, other) = run(0), run(0), run(1)
    assert json.dumps(history) == json.dumps(history_again)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_timesteps_count_real_tokens():
    """Statement 26: EOS counts, padding does not; learn() stops at the first rollout that reaches the total."""
    agent, seen = PPO(envs(), seed=0), []
    collect = agent.collector.collect
    agent.collector.collect = lambda *args, **kwargs: seen.append(collect(*args, **kwargs)) or seen[-1]
    agent.learn(100)
    lengths = [len([t for t in row if t is not None]) for r in seen for row in _responses(r)]
    assert agent.num_timesteps == sum(lengths) >= 100 > agent.num_timesteps - sum(len(r) for r in _responses(seen[-1]))


def _responses(rollout):
    for ids in rollout.batch.response_ids.tolist():
        yield ids[: ids.index(EOS) + 1] if EOS in ids else ids


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_load_continue_equals_continue(tmp_path, critic, dtype):
    lm, config = model(), {"learning_rate": 1e-2, "critic": critic, "dtype": dtype, "ref_kl_target": 1.0}
    straight = PPO(envs(model=lm), seed=2, **config).learn(240)
    halfway = PPO(envs(model=lm), seed=2, **config)
    halfway.learn(240, callback=lambda agent, _: agent.num_timesteps < 100)
    halfway.save(tmp_path / "agent")
    fresh = make_envs(8, model=lm, kl_coef=KL_COEF)
    resumed = PPO.load(tmp_path / "agent", env=fresh).learn(240)
    assert resumed.num_timesteps == straight.num_timesteps and resumed.num_updates == straight.num_updates
    assert fresh.unwrapped.kl_coef == straight.envs.unwrapped.kl_coef != KL_COEF
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name


def test_saved_agent_is_a_from_pretrained_directory(tmp_path):
    for kind in ("gpt2", "lstm"):
        agent = PPO(envs(kind=kind), seed=0, learning_rate=1e-2).learn(100)
        agent.save(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        ids = torch.tensor([[4, 5, 6]])
        torch.testing.assert_close(again(ids).logits, agent.policy_model(ids).logits, atol=0, rtol=0)
        assert not list(tmp_path.glob("**/*.bin")) + list(tmp_path.glob("**/*.pkl")) + list(tmp_path.glob("**/*.pt"))
        agent.save(tmp_path / kind)  # over its own earlier save
        loaded = PPO.load(tmp_path / kind, env=envs(kind=kind))
        obs, _ = loaded.envs.reset(seed=0)
        np.testing.assert_array_equal(
            loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0]
        )


def test_damaged_or_foreign_directories_are_refused(tmp_path):
    agent = PPO(envs(), seed=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        agent.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(FileNotFoundError, match="holds no trainer_state.json"):
        PPO.load(tmp_path / "mine", env=agent.envs)
    agent.save(tmp_path / "agent")
    path = tmp_path / "agent" / "value_head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        PPO.load(tmp_path / "agent", env=agent.envs)


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    agent = PPO(envs(), seed=0, learning_rate=1e-2)
    agent.save(tmp_path / "agent")
    before = {p.name: p.read_bytes() for p in (tmp_path / "agent").iterdir()}
    agent.learn(60)
    monkeypatch.setattr(agent.tokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        agent.save(tmp_path / "agent")
    assert {p.name: p.read_bytes() for p in (tmp_path / "agent").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["agent"]


@pytest.mark.parametrize("top_k", [None, 3])
def test_predict(top_k):
    """Greedy actions are the argmax of the plain model; samples follow its distribution; numpy in, numpy out, one row
    or many."""
    lm = model()
    agent = PPO(envs(2, model=lm, top_k=top_k), seed=0)
    obs, _ = agent.envs.reset(seed=0)
    length = int(obs["attention_mask"][0].sum())
    with torch.no_grad():
        logits = lm(torch.from_numpy(obs["input_ids"][:1, :length])).logits[0, -1]
    actions, state = agent.predict(obs, deterministic=True)
    assert state is None and isinstance(actions, np.ndarray) and actions[0] == logits.argmax()
    one = {k: v[0] for k, v in obs.items()}
    assert (
        agent.predict(one, deterministic=True)[0].shape == ()
        and agent.predict(one, deterministic=True)[0] == actions[0]
    )
    many = {k: np.repeat(v[:1], 4000, axis=0) for k, v in obs.items()}
    if top_k is not None:
        logits = torch.where(logits >= logits.topk(top_k).values[-1], logits, -torch.inf)
    share = np.bincount(agent.predict(many)[0], minlength=V) / 4000
    expected = torch.softmax(logits, -1).numpy()
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9).all()


def test_learns_and_keeps_near_the_reference():
    """The score rises far beyond its noise, and a larger kl_coef ends nearer to the reference."""

    def run(kl_coef):
        seen = []
        PPO(envs(32, kl_coef=kl_coef), seed=0, learning_rate=5e-3, num_epochs=2).learn(
            3500, callback=lambda _, m: seen.append(m)
        )
        return (
            seen[0]["objective/scores"],
            np.mean([m["objective/scores"] for m in seen[-5:]]),
            np.mean([m["objective/kl"] for m in seen[-5:]]),
        )

    start, free_score, free_kl = run(0.05)
    _, bound_score, bound_kl = run(1.0)
    assert free_score > start + 1.5 and bound_kl < 0.5 * free_kl and free_score > bound_score


def test_policy_must_fit_and_fields_are_checked():
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        PPO(envs(), learning_rat=1.0)
    with pytest.raises(ValueError, match="num_epochs must be an integer >= 1"):
        PPO(envs(), num_epochs=0)
    with pytest.raises(ValueError, match='lr_schedule must be "linear" or "constant"'):
        PPO(envs(), lr_schedule="cosine")
    with pytest.raises(ValueError, match="vocabulary of 14 tokens, got 20"):
        from transformers import GPT2Config, GPT2LMHeadModel

        PPO(envs(), policy=GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(ValueError, match="input_ids and attention_mask"):
        PPO(gym.make_vec("CartPole-v1", num_envs=2), policy=model())
    with pytest.raises(ValueError, match="total_timesteps must be >= 1"):
        PPO(envs()).learn(0)


def test_callbacks_and_metric_names():
    calls = {"a": 0, "b": 0}

    def first(agent, metrics):
        calls["a"] += 1
        return calls["a"] < 2

    def second(agent, metrics):
        calls["b"] += 1
        names = {
            "rollout/ep_rew_mean",
            "time/fps",
            "train/approx_kl",
            "objective/kl",
            "objective/scores",
            "objective/scores/goodness",
            "policy/approxkl_avg",
        }
        assert names <= set(metrics) and all(isinstance(v, float | int) for v in metrics.values())

    PPO(envs(), seed=0).learn(10_000, callback=[first, second])
    assert calls == {"a": 2, "b": 2}


def test_whitened_advantage_scale_has_the_scores_spread_as_floor():
    """With a perfect critic the advantages are tiny noise; they must not be blown up to size 1."""
    agent, seen = PPO(envs(), seed=0, learning_rate=0.0), {}
    original = agent.loss

    def loss(batch, normaliser):
        seen.setdefault("batches", []).append(batch)
        return original(batch, normaliser)

    agent.loss = loss
    rollout = agent.collector.collect()
    mask = rollout.batch.response_mask
    noise = 1e-3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    rollout.batch = replace(
        rollout.batch,
        rewards=torch.where(mask, noise, 0.0),
        values=torch.zeros_like(noise),
        scores=torch.linspace(0, 1, len(mask)),
    )
    agent.total_timesteps = 1
    agent.update(rollout)
    # The minibatches of one pass hold every token once.
    one_pass = seen["batches"][: agent.config.num_minibatches]
    scaled = torch.cat([batch.advantages[batch.response_mask] for batch in one_pass])
    assert len(scaled) == mask.sum() and scaled.std() < 0.02 and abs(scaled.mean()) < 1e-6


def test_the_critic_learns_returns_that_are_not_whitened():
    """Before the first step G - V is the advantage itself: the value loss is half the mean of its square, unscaled."""
    agent = PPO(envs(), seed=0, learning_rate=0.0, num_epochs=1, num_minibatches=1, gae_lambda=0.5)
    agent.policy.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    rollout = agent.collector.collect()
    agent.total_timesteps, advantages = 1, []
    for mask, rewards, values in zip(
        rollout.batch.response_mask, rollout.batch.rewards, rollout.batch.values, strict=True
    ):
        r, v = rewards[mask].tolist(), [*values[mask].tolist(), 0.0]
        deltas = [r[t] + v[t + 1] - v[t] for t in range(len(r))]
        advantages += [sum(0.5**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(r))]
    unscaled = 0.5 * np.square(advantages).mean()
    whitened = 0.5 * np.square(np.array(advantages) - np.mean(advantages)).mean() / np.var(advantages)
    assert agent.update(rollout)["train/value_loss"] == pytest.approx(unscaled, rel=1e-4)
    assert abs(unscaled - whitened) > 0.1 * unscaled


def test_trains_on_any_vector_env_of_text():
    """Gymnasium's own SyncVectorEnv knows nothing of us: the agent steps it, and learns."""
    sync = gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=8, vectorization_mode="sync", model=model(seed=5), tokenizer=tokenizer(), prompts=["the cat"],
        reward=goodness, max_response_tokens=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="policy is missing"):
        PPO(sync)
    seen = []
    agent = PPO(sync, policy=model(), seed=0, learning_rate=1e-2).learn(
        600, callback=lambda _, m: seen.append(m["objective/scores"])
    )
    assert np.mean(seen[-3:]) > seen[0] + 0.5
    assert agent.kl_controller is None and agent.tokenizer is None


def test_even_a_single_rollout_learns():
    """Schedules begin at 1: a run no longer than one rollout must not be made with learning rate 0."""
    agent, seen = PPO(envs(), seed=0), []
    before = weights(agent.policy)
    agent.learn(1, callback=lambda _, m: seen.append(m["train/learning_rate"]))
    assert seen == [agent.config.learning_rate]
    assert any(not torch.equal(before[k], v) for k, v in weights(agent.policy).items())


def test_kl_coef_belongs_to_the_environment(tmp_path):
    """Without a controller the agent neither writes kl_coef back nor brings a saved one along."""
    world = envs()
    agent = PPO(world, seed=0)
    world.kl_coef, seen = 0.5, []
    agent.learn(120, callback=lambda _, m: seen.append(m["objective/kl_coef"]))
    assert world.kl_coef == 0.5 and set(seen) == {0.5}
    agent.save(tmp_path / "agent")
    free = make_envs(4, kl_coef=0.0, prompts=["the"])  # other rows and prompts: their order starts anew
    PPO.load(tmp_path / "agent", env=free).learn(agent.num_timesteps + 20)
    assert free.kl_coef == 0.0


def test_an_interrupted_update_leaves_no_trace():
    interrupted = PPO(envs(), seed=0, micro_batch_size=1)
    original, calls = interrupted.policy.forward, []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrupted.policy, "forward", fail_later)
        with pytest.raises(KeyboardInterrupt):
            interrupted.learn(100)
    assert interrupted.num_timesteps == interrupted.num_updates == 0
    assert any(p.grad is not None for p in interrupted.policy.parameters())
    interrupted.learn(1)
    assert all(p.grad is None for p in interrupted.policy.parameters())


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("gamma", 2, r"gamma must be a number in \[0, 1\], got 2"),
        ("clip_range", -1, "clip_range must be"),
        ("vf_coef", float("nan"), "vf_coef must be a finite number >= 0, got nan"),
        ("target_kl", -1, "target_kl must be None or"),
        ("num_epochs", True, "num_epochs must be an integer >= 1, got True"),
        ("learning_rate", "x", "learning_rate must be"),
        ("ref_kl_target", 0, "ref_kl_target must be"),
        ("kl_horizon", 0, "kl_horizon must be a number > 0"),
    ],
)
def test_config_rules(field, value, rule):
    with pytest.raises(ValueError, match=rule):
        PPO(envs(), **{field: value})


def test_what_is_not_a_vector_env_and_frozen_layers():
    with pytest.raises(ValueError, match="use gym.make_vec"):
        PPO(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="horizon"):
        PPO(envs(), ref_kl_target=1.0, kl_horizon=1.0)
    lm = model()
    lm.transformer.h[0].requires_grad_(False)
    agent = PPO(envs(model=model(seed=1)), policy=lm, seed=0, learning_rate=1e-2)
    before = weights(lm.transformer.h[0])
    agent.learn(60)
    assert all(torch.equal(before[k], v) for k, v in lm.transformer.h[0].state_dict().items())


def test_equal_scores_do_not_blow_up_noise():
    """Once every score of a rollout is the same, the spread of the rollouts before is the floor."""
    agent = PPO(envs(), seed=0)
    batch = collected(agent)
    spread = agent._score_spread(batch)
    assert spread == pytest.approx(batch.scores.std(correction=0).item())
    same = replace(batch, scores=torch.ones_like(batch.scores))
    assert agent._score_spread(same) == pytest.approx(0.99 * spread)
