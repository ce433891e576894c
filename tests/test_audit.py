"""The audit: exact numbers by hand and against `evaluate`, alarms for what is wrong and none for what is not."""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from worlds import EOS, V, make_envs, model

from rlhf_gym.agents import PPO, TRPO
from rlhf_gym.agents.audit import Audit, AuditWarning, _beyond_noise, mean_and_variance, recompute
from rlhf_gym.agents.batch import Batch
from rlhf_gym.exact import evaluate, ngram_from_table, solve
from rlhf_gym.lm import TokenFilter
from rlhf_gym.runs import MetricsWriter, read_metrics

LN2 = math.log(2)


def task(name="WoAiNi", num_envs=64, kl_coef=0.1, **arguments):
    return gym.make_vec(f"rlhf_gym/{name}-v0", num_envs=num_envs, kl_coef=kl_coef, **arguments)


def perturbed(agent, scale=0.5):
    """The agent with a table away from the reference."""
    with torch.no_grad():
        for p in agent.policy_model.parameters():
            p += scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return agent


def batch_of(response_ids, *, mask=None, kl=None, logprobs=None, prompt=(0,)):
    """A batch by hand; every row has the same prompt."""
    response_ids = torch.tensor(response_ids)
    mask = torch.ones_like(response_ids, dtype=torch.bool) if mask is None else torch.tensor(mask)
    zeros, rows = torch.zeros(response_ids.shape), torch.zeros(len(response_ids))
    ids = torch.cat([torch.tensor(prompt).expand(len(response_ids), -1), response_ids * mask], 1)
    logprobs, kl = (zeros if x is None else x for x in (logprobs, kl))
    return Batch(ids, rows.long() + len(prompt), response_ids, mask, logprobs, zeros, zeros, rows, rows.bool(), kl)


# ---- the numbers


def test_two_states_by_hand():
    """State "a": p = (1/2, 1/4, 1/4) against (1/4, 1/4, 1/2); state "b": p = (1/4, 3/4, 0) against (1/2, 1/2, 0)."""
    reference = ngram_from_table(
        {"a": {"a": 0.25, "b": 0.25, "c": 0.5}, "b": {"a": 0.5, "b": 0.5}, "c": {"c": 1.0}}, eos=None
    )
    policy = ngram_from_table(
        {"a": {"a": 0.5, "b": 0.25, "c": 0.25}, "b": {"a": 0.25, "b": 0.75}, "c": {"c": 1.0}}, eos=None
    )
    a, b, c = (reference.tokenizer.get_vocab()[word] for word in "abc")
    batch = batch_of([[b, b], [a, c]], mask=[[True, True], [True, False]], prompt=(a,))
    found = recompute(batch, policy.model, reference.model, TokenFilter())
    kl_a, kl_b = LN2 / 4, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    entropy_b = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    variance_b = 0.25 * 0.75 * math.log(3) ** 2  # two values, ln(1/2) and ln(3/2), with probabilities 1/4 and 3/4
    expected = {
        "logprobs": [[math.log(0.25), math.log(0.75)], [math.log(0.5), 0.0]],
        "ref_logprobs": [[math.log(0.25), math.log(0.5)], [math.log(0.25), 0.0]],
        "kl": [[kl_a, kl_b], [kl_a, 0.0]],
        "kl_variance": [[11 / 16 * LN2**2, variance_b], [11 / 16 * LN2**2, 0.0]],
        "entropy": [[1.5 * LN2, entropy_b], [1.5 * LN2, 0.0]],
        "logprob_variance": [[0.25 * LN2**2, variance_b], [0.25 * LN2**2, 0.0]],
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(values), atol=1e-6, rtol=0, msg=name)
    # On a and b alone both are renormalised: (2/3, 1/3) against (1/2, 1/2).
    masked = recompute(batch, policy.model, reference.model, TokenFilter(allowed_tokens=(a, b)))
    assert masked.kl[0, 0].item() == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), abs=1e-6)
    allowed = torch.zeros(2, 2, 3, dtype=torch.bool)
    allowed[..., [a, b]] = True
    told = recompute(replace(batch, allowed=allowed), policy.model, reference.model, TokenFilter())
    torch.testing.assert_close(told.kl, masked.kl)
    # At temperature 2 the square roots count.
    p, q = (x / x.sum() for x in np.sqrt([[2, 1, 1], [1, 1, 2]]))
    warm = recompute(batch, policy.model, reference.model, TokenFilter(temperature=2.0))
    assert warm.kl[0, 0].item() == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)


def test_impossible_tokens_count_nothing_and_an_impossible_choice_is_infinite():
    logprobs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]).log()
    mean, variance = mean_and_variance(logprobs, logprobs - torch.tensor([0.25, 0.75, 0.0]).log())
    assert mean[0].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert variance[0].item() == pytest.approx((math.log(3) / 2) ** 2, abs=1e-6)
    assert mean[1] == variance[1] == torch.inf


@pytest.mark.parametrize(
    ("name", "arguments"), [("Brackets", {}), ("Difficulty", {}), ("WoAiNi", {"temperature": 2.0})]
)
def test_exact_kl_is_that_of_evaluate(name, arguments):
    """Mean over sampled states of the exact KL, against the walk through all of them."""
    envs = task(name, 512, **arguments)
    agent = perturbed(PPO(envs, policy="tabular", seed=1), 1.0)
    batch = agent.collector.collect(seed=1).batch
    metrics = Audit(envs, agent.policy_model)(batch, 0)
    found = recompute(batch, agent.policy_model, envs.unwrapped.language_model.model, envs.unwrapped.token_filter)
    rows = found.kl.sum(1).numpy()
    exact = evaluate(agent, envs).kl
    assert exact > 0.05 and abs(metrics["audit/kl_exact"] - exact) < 4 * rows.std() / math.sqrt(len(rows))
    assert metrics["audit/kl_exact"] == pytest.approx(rows.mean(), abs=1e-6)
    assert metrics["audit/kl_sampled"] == pytest.approx(batch.kl.sum(1).mean().item(), abs=1e-5)
    assert max(metrics["audit/logprob_mismatch"], metrics["audit/ref_logprob_mismatch"]) < 1e-5


def test_the_difference_is_unbiased_and_its_standard_error_right():
    """z of 150 rollouts of 16 responses: mean 0, variance 1."""
    envs = task("Goodhart", 16)
    agent = perturbed(PPO(envs, policy="tabular", seed=0))
    audit, z = Audit(envs, agent.policy_model), []
    for _ in range(150):
        m = audit(agent.collector.collect().batch, 0)
        z.append((m["audit/kl_sampled"] - m["audit/kl_exact"]) / m["audit/kl_difference_se"])
    assert abs(np.mean(z)) < 4 / math.sqrt(150) and 0.6 < np.var(z) < 1.5


def test_other_estimators_and_terms_give_the_same_numbers():
    lm, seen = model(), []
    for changes in ({}, {"kl_estimator": "k3"}, {"kl_term": "reference"}):
        agent = PPO(make_envs(16, model=lm, kl_coef=0.1, **changes), policy=model(seed=1), seed=0)
        seen.append(Audit(agent.envs, agent.policy_model)(agent.collector.collect(seed=0).batch, 0))
    assert seen[0]["audit/kl_exact"] > 0.5
    for other in seen[1:]:
        assert {k: pytest.approx(v, abs=1e-4) for k, v in seen[0].items()} == other


def test_certificate():
    """The variance of the scores at the reference (one prompt); nothing at the optimum; none without a price."""
    envs = task()
    agent = PPO(envs, policy="tabular", seed=0)
    batch = agent.collector.collect(seed=0).batch
    found = Audit(envs, agent.policy_model)(batch, 0)
    assert found["audit/certificate_variance"] == pytest.approx(np.var(batch.scores.numpy(), ddof=1), abs=1e-5)
    assert found["audit/certificate_low"] < 0.24 * 0.76 < found["audit/certificate_high"]
    assert found["audit/regret_estimate"] == pytest.approx(found["audit/certificate_variance"] / 0.2)
    free = Audit(task(kl_coef=0.0), agent.policy_model)(batch, 0)
    assert "audit/kl_exact" in free and "audit/certificate_variance" not in free
    agent = PPO(envs, policy=solve(envs, 0.1).policy, seed=0)
    optimum = Audit(envs, agent.policy_model)(agent.collector.collect(seed=0).batch, 0)
    assert optimum["audit/certificate_variance"] < 1e-8 and optimum["audit/kl_exact"] > 1.4


# ---- in training


def history(agent, num_updates):
    """Train for so many updates; returns their metrics."""
    seen = []
    agent.learn(10**6, callback=lambda _, m: seen.append(m) or len(seen) < num_updates)
    return seen


def test_every_kth_update_and_into_the_csv(tmp_path):
    agent = PPO(task(num_envs=16), policy="tabular", seed=0, audit_interval=3)
    with MetricsWriter(tmp_path) as writer:
        agent.learn(400, callback=writer)
    columns = read_metrics(tmp_path / "metrics.csv")
    audited = [i for i, value in enumerate(columns["audit/kl_exact"]) if value == value]
    assert agent.num_updates > 6 and audited == list(range(0, agent.num_updates, 3))
    assert not np.isnan(columns["objective/kl"]).any()


def test_interval_zero_and_foreign_environments_look_at_nothing(monkeypatch):
    monkeypatch.setattr("rlhf_gym.agents.audit.recompute", None)
    monkeypatch.setattr("rlhf_gym.agents.audit.Audit._watch_sign", None)
    metrics = history(PPO(make_envs(8, kl_coef=0.1), seed=0, audit_interval=0), 3)
    sync = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=4, vectorization_mode="sync")
    metrics += history(PPO(sync, policy=task().unwrapped.language_model.model, seed=0), 3)
    assert not [name for m in metrics for name in m if name.startswith("audit/")]
    for value in (-1, 2.5, True):
        with pytest.raises(ValueError, match="audit_interval must be an integer >= 0"):
            PPO(make_envs(1), audit_interval=value)
        with pytest.raises(ValueError, match="audit_interval must be an integer >= 0"):
            TRPO(task(), audit_interval=value)


@pytest.mark.parametrize("agent_class", [PPO, TRPO])
def test_resuming_is_bit_exact_and_an_audit_changes_nothing(agent_class, tmp_path):
    def trained(interval):
        agent = agent_class(task(num_envs=8), policy="tabular", seed=2, learning_rate=1e-2, audit_interval=interval)
        path = tmp_path / str(interval)
        # TRPO gives up its episodes in flight when it is saved: every agent is saved at the same time.
        agent.learn(200, callback=lambda who, _: who.save(path) if who.num_updates == 1 else None)
        return agent

    straight, unaudited = trained(2), trained(0)
    resumed = agent_class.load(tmp_path / "2", env=task(num_envs=8))
    assert resumed.audit_interval == 2
    resumed.learn(200)
    assert straight.num_updates == resumed.num_updates == unaudited.num_updates > 2
    for name, tensor in straight.policy_model.state_dict().items():
        assert torch.equal(tensor, unaudited.policy_model.state_dict()[name]), name
        assert torch.equal(tensor, resumed.policy_model.state_dict()[name]), name


QUICK = {"num_epochs": 1, "num_minibatches": 1, "audit_interval": 1}
RIGHT = {
    "tabular": lambda seed: PPO(task(num_envs=32), "tabular", seed, learning_rate=0.1, **QUICK),
    "few rows": lambda seed: PPO(task(num_envs=2), "tabular", seed, learning_rate=0.1, **QUICK),
    "transformer": lambda seed: PPO(make_envs(16, kl_coef=0.1), None, seed, learning_rate=0.01, **QUICK),
    "top-k, temperature, k3": lambda seed: PPO(
        make_envs(16, kl_coef=0.1, top_k=4, temperature=0.7, kl_estimator="k3"), None, seed, learning_rate=0.01, **QUICK
    ),
    "stepping, top-p": lambda seed: PPO(
        VectorWrapper(make_envs(8, kl_coef=0.1, top_p=0.9)), None, seed, learning_rate=0.01, **QUICK
    ),
    "bfloat16": lambda seed: PPO(
        make_envs(16, kl_coef=0.1, dtype="bfloat16"), None, seed, learning_rate=0.01, dtype="bfloat16", **QUICK
    ),
    "TRPO": lambda seed: TRPO(task(num_envs=8), "tabular", seed, target_kl=0.1, audit_interval=1),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_run_raises_no_alarm(kind):
    """A few dozen updates that go far from the reference, every rollout audited."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuditWarning)
        for seed in range(3 if kind in ("tabular", "few rows") else 1):
            seen = history(RIGHT[kind](seed), 24)
            assert len([m for m in seen if "audit/kl_exact" in m]) == 24
            assert max(m["audit/kl_exact"] for m in seen) > 0.05


# ---- negative controls


@pytest.mark.parametrize("start", ["at the reference", "elsewhere"])
def test_a_filter_in_the_sampling_only(start, monkeypatch):
    """Tokens come from the policy's own top 2, log-probs are recorded as if from all."""
    module = importlib.import_module("rlhf_gym.lm.generate")
    draw = module.sample_tokens

    def filtered(logprobs, uniforms):
        worst = logprobs.topk(2).values[:, -1:]
        return draw(logprobs.masked_fill(logprobs < worst, -torch.inf), uniforms)

    monkeypatch.setattr(module, "sample_tokens", filtered)
    policy = None if start == "at the reference" else model(seed=1)
    agent = PPO(make_envs(64, kl_coef=0.1), policy=policy, seed=0)
    with pytest.warns(AuditWarning, match="disagree beyond noise.*not drawn from it") as caught:
        seen = history(agent, 3)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # where learn was called
    assert "audit/kl_exact" in seen[1]  # looked at again at once, not ten updates later


class Masked(VectorWrapper):
    """Somebody's masks around our environment, of which its reference knows nothing: only even tokens, or EOS."""

    def _told(self, observation, info):
        mask = np.broadcast_to((np.arange(V) % 2 == 0) | (np.arange(V) == EOS), (self.num_envs, V))
        return observation, info | {"action_mask": mask.astype(np.int8), "_action_mask": np.ones(len(mask), bool)}

    def reset(self, **arguments):
        return self._told(*super().reset(**arguments))

    def step(self, actions):
        observation, *rest, info = super().step(actions)
        observation, info = self._told(observation, info)
        return observation, *rest, info


def test_a_mask_on_one_distribution_only():
    with pytest.warns(AuditWarning, match="mask is applied to the policy only"):
        history(PPO(Masked(make_envs(32, kl_coef=0.1)), seed=0), 2)


@pytest.mark.parametrize("what", ["weights", "shifted", "filtered"])
def test_log_probs_that_are_not_the_policys(what):
    """Learning in other weights than sampled; log-probs half a nat too low; those of a filter that nobody told of."""
    agent = PPO(make_envs(16, kl_coef=0.1), seed=0)
    collect = agent.collector.collect

    def wrong(*args, **kwargs):
        rollout, moved = collect(*args, **kwargs), {"weights": 0.0, "shifted": -0.5, "filtered": 0.1}[what]
        if what == "weights":
            perturbed(agent, 0.02)
        batch = rollout.batch
        rollout.batch = replace(batch, logprobs=batch.logprobs + moved, kl=batch.kl + moved)
        return rollout

    agent.collector.collect = wrong
    with pytest.warns(AuditWarning) as caught:
        history(agent, 4)
    messages = [str(w.message) for w in caught if isinstance(w.message, AuditWarning)]
    assert sum("nats per token from those of a forward of the policy" in m for m in messages) == 1
    assert sum("sampled KL to the reference is negative" in m for m in messages) == (what == "shifted")
    if what != "weights":
        assert sum("Cause: the recorded log-probs are not the policy's" in m for m in messages) == 1


def test_a_policy_that_can_leave_the_references_support():
    reference = ngram_from_table({"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}, "c": {"c": 1.0}}, eos=None)
    policy = ngram_from_table({"a": {"a": 0.5, "b": 0.49, "c": 0.01}, "b": {"b": 1.0}, "c": {"c": 1.0}}, eos=None)
    base = SimpleNamespace(language_model=reference, token_filter=TokenFilter(), kl_coef=0.0)
    a = reference.tokenizer.get_vocab()["a"]
    batch = batch_of([[a]], prompt=(a,), logprobs=torch.tensor([[math.log(0.5)]]))
    with pytest.warns(AuditWarning, match="the exact KL is infinite"):
        Audit(SimpleNamespace(unwrapped=base), policy.model)(batch, 0)


# ---- the statistics


def test_what_no_row_has_drawn_is_no_alarm():
    """A token of probability .01 and log-ratio 3, not drawn in 64 rows: all agree that the KL is .03 lower, with no
    spread at all between them. Drawn once it is far beyond four standard errors, and no alarm either."""
    p, ratio = torch.tensor([0.99, 0.01]), torch.tensor([math.log(0.99 / 0.9995), 3.0])
    kl, variance = mean_and_variance(p.log(), ratio)
    unseen = (ratio[0] - kl).expand(64).double()
    assert unseen.mean() < -0.02 and unseen.std() == 0
    assert _beyond_noise(unseen, variance.expand(64).double(), 1e-3) == 0
    rare = torch.tensor([1 - 1e-6, 1e-6])
    kl, variance = mean_and_variance(rare.log(), ratio)
    once = torch.cat([(ratio[0] - kl).expand(63), (ratio[1] - kl)[None]]).double()
    assert once.sum() > 100 * math.sqrt(64 * variance)
    assert _beyond_noise(once, variance.expand(64).double(), 1e-3) == 0
    assert _beyond_noise(once + 0.1, variance.expand(64).double(), 1e-3) > 0  # the negative control


def watcher():
    envs = task()
    return Audit(envs, envs.unwrapped.language_model.model, interval=1000)


def test_negative_kl_is_believed_at_once_in_a_hundred_million():
    """Sums of -18.4 nats and lower, however many rollouts they take; a stretch of positive ones before hides nothing."""
    audit, tenth = watcher(), torch.full((10, 4), -0.1)  # -4 nats, 4 of 1000 of which are left to rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kl in (-tenth * 100, *[tenth] * 4):
            audit(batch_of([[0] * 4] * 10, kl=kl), 1)
        for _ in range(1000):  # the rounding errors of a long run add up to nothing
            audit(batch_of([[0] * 4] * 10, kl=torch.full((10, 4), -1e-4)), 1)
        for kl in [tenth] * 4:
            audit(batch_of([[0] * 4] * 10, kl=kl), 1)
    with pytest.warns(AuditWarning, match="-0.4 nats per response over the last 50 responses"):
        audit(batch_of([[0] * 4] * 10, kl=tenth), 1)


def test_a_rare_response_is_no_negative_kl():
    """The same policy as above in 2000 rollouts of 8: the sampled KL is negative with no spread in most of them."""
    rng, audit = np.random.default_rng(0), watcher()
    ratio = torch.tensor([math.log(0.99 / 0.9995), math.log(0.01 / 0.0005)])
    negative = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000):
            kl = ratio[torch.from_numpy(rng.random((8, 1)) < 0.01).long()]
            negative += bool((kl < 0).all())
            audit(batch_of([[0]] * 8, kl=kl), 1)
    assert negative > 1500
