"""REINFORCE, RLOO and ReMax: expected gradients by enumeration, whole updates by hand, invariances (CORRECTNESS 14, 15)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch
from worlds import make_envs, model

import rlhf_gym
from rlhf_gym.agents import PPO, REINFORCE, RLOO, ReMax
from rlhf_gym.agents.functional import policy_loss_clipped, reward_to_go
from rlhf_gym.agents.reinforce import mean_of_others
from rlhf_gym.agents.rloo import leave_one_out, prompt_numbers
from rlhf_gym.benchmarks.fixed_points import make_task

BETA = 0.3
KINDS = {
    "learned": (REINFORCE, {}),
    "separate": (REINFORCE, {"critic": "separate"}),
    "mean": (REINFORCE, {"baseline": "mean"}),
    "ema": (REINFORCE, {"baseline": "ema"}),
    "none": (REINFORCE, {"baseline": "none"}),
    "rloo": (RLOO, {}),
    "remax": (ReMax, {}),
}


# --- expected gradients, in float64 -----------------------------------------------------------------------------------


@cache
def task():
    return make_task(gym.make("rlhf_gym/WoAiNi-v0"), BETA)


def random_table(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(task().reference.shape, generator=generator, dtype=torch.float64).requires_grad_()


def logprobs_of(table):
    """log pi of the tokens of all responses, (N, R)."""
    t = task()
    return torch.where(t.mask, (t.reference + table).log_softmax(-1)[t.states, t.tokens], 0.0)


def enumerated(table):
    """Each response's tokens' log-probs and rewards, KL included, and its probability; and the gradient of J."""
    t, logprobs = task(), logprobs_of(table)
    rewards = t.payoffs - BETA * (logprobs - torch.where(t.mask, t.reference[t.states, t.tokens], 0.0))
    probability = logprobs.sum(1).exp()
    (exact,) = torch.autograd.grad(probability @ rewards.sum(1), table, retain_graph=True)
    return logprobs, rewards.detach(), probability.detach(), exact


def gradient(table, logprobs, weights):
    """Of the sum of weights times log-probs."""
    return torch.autograd.grad((weights * logprobs).sum(), table, retain_graph=True)[0]


def test_reward_to_go_with_any_baseline_of_the_state():
    table, t = random_table(), task()
    logprobs, rewards, probability, exact = enumerated(table)
    returns = reward_to_go(rewards, t.mask)
    values = torch.randn(len(t.reference), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = gradient(table, logprobs, probability[:, None] * (returns - values[t.states]) * t.mask)
    assert exact.norm() > 0.1 and (found - exact).abs().max() < 1e-10
    # Negative control: a baseline that knows the token.
    found = gradient(table, logprobs, probability[:, None] * (returns - values[t.states] * t.tokens) * t.mask)
    assert (found - exact).abs().max() > 0.01


def pairs_of(probability):
    """All pairs of responses, (N^2, 2), with the probability of each."""
    pairs = torch.cartesian_prod(torch.arange(len(probability)), torch.arange(len(probability)))
    return pairs, probability[pairs].prod(1)


def test_leave_one_out_over_all_pairs():
    table = random_table()
    logprobs, rewards, probability, exact = enumerated(table)
    pairs, weights = pairs_of(probability)
    prompts = torch.arange(len(pairs)).repeat_interleave(2)
    assert len(pairs) < 3000  # leave_one_out compares rows with prompts
    advantages = leave_one_out(rewards.sum(1)[pairs.flatten()], prompts).reshape(-1, 2)
    found = gradient(table, logprobs.sum(1)[pairs], weights[:, None] * advantages / 2)
    assert (found - exact).abs().max() < 1e-10
    # Negative control: the mean of all, the response itself included, halves it.
    own = rewards.sum(1)[pairs]
    found = gradient(table, logprobs.sum(1)[pairs], weights[:, None] * (own - own.mean(1, keepdim=True)) / 2)
    assert (2 * found - exact).abs().max() < 1e-10 and (found - exact).abs().max() > 0.01


def test_mean_of_others_over_all_pairs():
    """Of different lengths too: where the other one has ended, its mean over all tokens stands in."""
    table, t = random_table(), task()
    logprobs, rewards, probability, exact = enumerated(table)
    returns = reward_to_go(rewards, t.mask)
    pairs, weights = pairs_of(probability)
    assert (t.mask[pairs[:, 0]] != t.mask[pairs[:, 1]]).any()
    coefficients = torch.zeros_like(returns)
    for pair, weight in zip(pairs, weights, strict=True):
        advantages = torch.where(t.mask[pair], returns[pair] - mean_of_others(returns[pair], t.mask[pair]), 0.0)
        coefficients.index_add_(0, pair, weight * advantages / 2)
    assert (gradient(table, logprobs, coefficients) - exact).abs().max() < 1e-10


@pytest.mark.parametrize("level", ["token", "response"])
def test_importance_weights_keep_a_baseline_harmless(level):
    """Samples of an older policy: what a baseline adds has the expectation 0 with the ratio, and not without it."""
    table, t = random_table(), task()
    logprobs, old = logprobs_of(table), logprobs_of(random_table(1)).detach()
    mask, probability = t.mask, old.sum(1).exp()
    if level == "response":
        logprobs, old, mask = logprobs.sum(1, keepdim=True), old.sum(1, keepdim=True), mask[:, :1]
    loss, stats = policy_loss_clipped(logprobs, old, torch.ones_like(old), mask, clip_range=None)
    (found,) = torch.autograd.grad((probability @ loss).sum(), table, retain_graph=True)
    assert found.abs().max() < 1e-12 and stats["clip_fraction"] == 0 and stats["ratio"] != 1
    (without,) = torch.autograd.grad((probability @ torch.where(mask, logprobs, 0.0)).sum(), table)
    assert without.abs().max() > 0.1


# --- the functions ----------------------------------------------------------------------------------------------------


def test_mean_of_others_row_by_row():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, columns = rng.integers(1, 6, 2)
        lengths = rng.integers(1, columns + 1, rows)
        returns, mask = rng.normal(size=(rows, columns)), np.arange(columns) < lengths[:, None]
        found = mean_of_others(torch.from_numpy(returns), torch.from_numpy(mask)).numpy()
        for i, t in zip(*mask.nonzero(), strict=True):
            others = [j for j in range(rows) if j != i]
            here = [returns[j, t] for j in others if mask[j, t]]
            anywhere = [x for j in others for x in returns[j][mask[j]]]
            assert found[i, t] == pytest.approx(np.mean(here or anywhere or 0.0), abs=1e-12)


def test_leave_one_out_prompt_by_prompt():
    rng = np.random.default_rng(0)
    for sizes in ((2, 2), (5, 2, 3), (7,)):
        prompts = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        returns = rng.normal(size=len(prompts)) + 100
        found = leave_one_out(torch.from_numpy(returns), torch.from_numpy(prompts)).numpy()
        for i, prompt in enumerate(prompts):
            others = [returns[j] for j in range(len(prompts)) if j != i and prompts[j] == prompt]
            assert found[i] == pytest.approx(returns[i] - np.mean(others), abs=1e-10)
            assert found[prompts == prompt].sum() == pytest.approx(0, abs=1e-10)
        order = rng.permutation(len(prompts))
        again = leave_one_out(torch.from_numpy(returns[order]), torch.from_numpy(prompts[order])).numpy()
        assert again == pytest.approx(found[order], abs=1e-12)
    equal = leave_one_out(torch.full((6,), 0.1), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert torch.equal(equal, torch.zeros(6))


def test_prompt_numbers():
    """Prompts of one length that differ, one that begins another, and the same one in front of other responses."""
    ids = torch.tensor([[4, 5, 9, 0], [4, 6, 9, 0], [4, 5, 8, 8], [4, 9, 0, 0], [4, 5, 6, 0]])
    found = prompt_numbers(ids, torch.tensor([2, 2, 2, 1, 3])).tolist()
    assert found[0] == found[2] and len(set(found)) == 4 and sorted(set(found)) == [0, 1, 2, 3]


# --- whole updates ----------------------------------------------------------------------------------------------------


def sampled(kind, **config):
    """An agent that is not the reference, and a rollout of sixteen responses in groups of four."""
    cls, settings = KINDS[kind]
    envs = make_envs(16, model=model(), kl_coef=0.1)
    agent = cls(envs, policy=model(seed=1), seed=0, **{"num_minibatches": 1, "max_grad_norm": 1e6} | settings | config)
    if agent.policy.value_head is not None:
        agent.policy.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    agent.collector.group_size = 4  # for all, so that there are four prompts
    agent.total_timesteps = 1000
    return agent, agent.collector.collect(seed=0)


def gradients_of_update(agent, rollout):
    """The gradients with which an update of one step would change the language model, and its metrics."""
    found = []

    def step(max_grad_norm):
        found.append([p.grad.clone() for p in agent.policy.model.parameters()])
        agent.optimizer.zero_grad()
        return torch.tensor(0.0)

    agent.optimizer.step = step
    metrics = agent.update(rollout)
    assert len(found) == 1
    return torch.cat([g.flatten() for g in found[0]]), metrics


def advantages_by_hand(kind, batch, baselines):
    """Lists of each response's advantages, from loops over its own and the others' rewards."""
    rewards = [
        row[: int(n)].double().tolist() for row, n in zip(batch.rewards, batch.response_mask.sum(1), strict=True)
    ]
    returns = [[sum(row[t:]) for t in range(len(row))] for row in rewards]
    prompts = [tuple(row[: int(n)].tolist()) for row, n in zip(batch.ids, batch.prompt_lengths, strict=True)]
    found = []
    for i, row in enumerate(returns):
        others = [j for j in range(len(returns)) if j != i]
        if kind in ("learned", "separate"):
            found.append([g - v for g, v in zip(row, batch.values[i].tolist())])  # noqa: B905 - to the end of the row
        elif kind == "mean":
            anywhere = np.mean([g for j in others for g in returns[j]])
            here = [[returns[j][t] for j in others if len(returns[j]) > t] for t in range(len(row))]
            found.append([g - (np.mean(h) if h else anywhere) for g, h in zip(row, here, strict=True)])
        elif kind == "ema":  # the first rollout's own mean
            found.append([g - np.mean([x for r in returns for x in r]) for g in row])
        elif kind == "none":
            found.append(row)
        elif kind == "rloo":
            same = [returns[j][0] for j in others if prompts[j] == prompts[i]]
            found.append([row[0] - np.mean(same)] * len(row))
        else:
            found.append([row[0] - float(baselines[i])] * len(row))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_by_hand(kind):
    """-1/(B R) sum_i sum_t A_t grad log pi, row by row through the plain model; the value loss aside."""
    agent, rollout = sampled(kind, **({"vf_coef": 0.0} if kind in ("learned", "separate") else {}))
    batch = rollout.batch
    advantages = advantages_by_hand(kind, batch, rollout.baselines)
    found, metrics = gradients_of_update(agent, rollout)
    loss = 0.0
    for i, row in enumerate(advantages):
        n, p = len(row), int(batch.prompt_lengths[i])
        logits = agent.policy.model(batch.ids[i : i + 1, : p + n]).logits[0, p - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, batch.response_ids[i, :n, None])[:, 0]
        loss = loss - (torch.tensor(row) * chosen).sum() / batch.rewards.numel()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.policy.model.parameters()))])
    assert expected.norm() > 0.02 and (found - expected).norm() < 1e-4 * expected.norm()
    assert abs(metrics["train/approx_kl"]) < 1e-8 and metrics["train/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["train/n_updates"] == 1


def test_value_loss_by_hand():
    agent, rollout = sampled("learned", vf_coef=0.7)
    batch, parts = rollout.batch, []
    original = agent.loss
    agent.loss = lambda *a: parts.append(original(*a)[0]) or original(*a)
    gradients_of_update(agent, rollout)
    returns = [[sum(row[t : int(n)]) for t in range(int(n))] for row, n in zip(batch.rewards.tolist(), batch.response_mask.sum(1), strict=True)]  # fmt: skip
    expected = sum((v - g) ** 2 / 2 for values, row in zip(batch.values.tolist(), returns, strict=True) for v, g in zip(values, row))  # fmt: skip  # noqa: B905
    (found,) = parts
    assert found["value_loss"].item() == pytest.approx(expected / batch.rewards.numel(), rel=1e-4)
    assert found["loss"].item() == pytest.approx((found["policy_loss"] + 0.7 * found["value_loss"]).item(), rel=1e-5)


def changed(rollout, shift=0.0, order=None):
    """The rollout with a constant added to all scores, its rows in another order."""
    batch, baselines = rollout.batch, rollout.baselines
    rewards = batch.rewards.clone()
    rewards[torch.arange(len(batch)), batch.response_mask.sum(1) - 1] += shift
    batch = replace(batch, rewards=rewards, scores=batch.scores + shift)
    baselines = None if baselines is None else baselines + shift
    if order is not None:
        batch, baselines = batch.rows(order), None if baselines is None else baselines[order]
    return replace(rollout, batch=batch, baselines=baselines)


@pytest.mark.parametrize("kind", ["rloo", "remax", "mean", "ema", "none"])
def test_a_constant_added_to_the_score(kind):
    found = [gradients_of_update(*(a, changed(r, shift)))[0] for shift in (0.0, 10.0) for a, r in [sampled(kind)]]
    difference = (found[1] - found[0]).norm() / found[0].norm()
    assert difference > 0.1 if kind == "none" else difference < 1e-4


@pytest.mark.parametrize("kind", ["rloo", "remax", "mean"])
def test_the_order_of_rows_does_not_matter(kind):
    """Members of a group, and groups among each other."""
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    found = [
        gradients_of_update(*(a, changed(r, order=order)))[0] for order in (None, shuffled) for a, r in [sampled(kind)]
    ]
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize("kind", ["rloo", "remax", "mean", "ema"])
def test_equal_returns_give_no_gradient_at_all(kind):
    agent, rollout = sampled(kind)
    batch, rewards = rollout.batch, torch.zeros_like(rollout.batch.rewards)
    rewards[torch.arange(len(batch)), batch.response_mask.sum(1) - 1] = 0.1
    rollout = replace(rollout, batch=replace(batch, rewards=rewards))
    if kind == "remax":
        rollout.baselines = torch.full_like(rollout.baselines, 0.1)
    found, metrics = gradients_of_update(agent, rollout)
    assert torch.equal(found, torch.zeros_like(found)) and np.isfinite(list(metrics.values())).all()


def test_responses_to_one_prompt_count_wherever_they_stand():
    """Two prompts, eight groups of two: more of them share a prompt than stand in a group."""
    envs = make_envs(16, model=model(), kl_coef=0.1, prompts=["the cat", "a"])
    agent = RLOO(envs, policy=model(seed=1), seed=0, num_minibatches=1, group_size=2)
    agent.total_timesteps = 1000
    rollout = agent.collector.collect(seed=0)
    batch, seen = rollout.batch, []
    original = agent.loss
    agent.loss = lambda part, normaliser: seen.append(part) or original(part, normaliser)
    agent.update(rollout)
    (part,) = seen
    returns = {(tuple(ids.tolist())): r for ids, r in zip(batch.ids, batch.rewards.sum(1).tolist(), strict=True)}
    for prompt in set(part.prompt_lengths.tolist()):
        rows = (part.prompt_lengths == prompt).nonzero()[:, 0].tolist()
        own = [part.rewards[i].sum().item() for i in rows]
        expected = [r - (sum(own) - r) / (len(own) - 1) for r in own]
        assert part.advantages[rows, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert len(returns) > 2


def test_running_mean_of_returns():
    """Half of the past: the first rollout's own mean, then what was there before the rollout."""
    agent, rollout = sampled("ema", ema_decay=0.5)
    mask = rollout.batch.response_mask
    means = []
    for value in (1.0, 3.0, 4.0):
        rewards = torch.zeros_like(rollout.batch.rewards)
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] = value  # nothing else: the return of every token
        batch = replace(rollout.batch, rewards=rewards)
        means.append(float(agent._baselines(batch, reward_to_go(rewards, mask))[0, 0]))
    assert means == [1.0, 1.0, 2.0] and agent.state == {"mean_return": 3.0}


# --- learning, and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "mean", "rloo", "remax"])
def test_learns_the_optimum_of_a_small_task(kind):
    cls, settings = KINDS[kind]
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=BETA)
    agent = cls(envs, policy="tabular", seed=0, learning_rate=0.1, **settings)
    agent.learn(8_000)
    assert rlhf_gym.exact.evaluate(agent, envs).normalised > 0.98


@pytest.mark.parametrize("kind", ["ema", "separate", "mean"])
def test_save_load_continue_equals_continue(kind, tmp_path):
    """Also what the running mean has seen, and a critic with a trunk of its own."""
    cls, settings = KINDS[kind]

    def agent():
        return cls(make_envs(8, model=model(), kl_coef=0.1), seed=2, learning_rate=1e-2, num_minibatches=2, **settings)

    straight, halfway = agent().learn(120), agent()
    halfway.learn(120, callback=lambda a, _: a.num_timesteps < 60)
    halfway.save(tmp_path / "agent")
    resumed = cls.load(tmp_path / "agent", env=make_envs(8, model=model(), kl_coef=0.1)).learn(120)
    assert resumed.state == straight.state and resumed.config == straight.config
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name


def test_a_value_head_only_where_it_is_the_baseline():
    envs = make_envs(8, model=model())
    assert REINFORCE(envs).policy.value_head is not None and RLOO(envs).policy.value_head is None
    for baseline in ("mean", "ema", "none"):
        agent = REINFORCE(envs, baseline=baseline)
        assert agent.policy.value_head is None and agent.config.critic == "none"
    assert REINFORCE(envs, learning_rate=0.02).config.value_learning_rate == 0.05 == PPO(envs, learning_rate=0.02).config.value_learning_rate  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "field", "value", "message"),
    [
        (REINFORCE, "num_epochs", 2, "num_epochs must be 1, as nothing is clipped .*take PPO or RLOO.*, got 2"),
        (ReMax, "num_epochs", 2, "num_epochs must be 1, as nothing is clipped .*take RLOO.*, got 2"),
        (REINFORCE, "baseline", "batch", 'baseline must be "learned" or "mean" or "ema" or "none", got \'batch\''),
        (REINFORCE, "critic", "none", 'critic must be "shared" or "separate", got \'none\''),
        (REINFORCE, "ema_decay", 1.5, r"ema_decay must be a number in \[0, 1\], got 1.5"),
        (RLOO, "group_size", 1, "group_size must be an integer >= 2, got 1"),
        (RLOO, "group_size", 3, "group_size must divide the environment's 8 rows, got 3"),
        (RLOO, "clip_range", 1.5, r"clip_range must be a number in \[0, 1\], got 1.5"),
    ],
)  # fmt: skip
def test_rules_of_settings(cls, field, value, message):
    with pytest.raises(ValueError, match=message):
        cls(make_envs(8, model=model()), **{field: value})


def test_rloo_clips_the_ratio_of_whole_responses():
    """-mean min(A ratio, A clip(ratio)) by hand, on samples of another policy."""
    agent, rollout = sampled("rloo", clip_range=0.3)
    advantages = torch.linspace(-2, 3, 16)
    batch = replace(rollout.batch, advantages=advantages[:, None].expand_as(rollout.batch.rewards))
    with torch.no_grad():
        for p in agent.policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    loss, stats = agent.loss(batch, torch.tensor(len(batch)))
    ratios = (agent.policy(batch)[0] - batch.logprobs).sum(1).exp().tolist()
    pairs = list(zip(advantages.tolist(), ratios, strict=True))
    expected = -np.mean([min(a * r, a * min(max(r, 0.7), 1.3)) for a, r in pairs])
    assert loss["loss"].item() == pytest.approx(expected, rel=1e-4)
    outside = [r < 0.7 or r > 1.3 for r in ratios]
    assert 0.1 < np.mean(outside) < 0.9 and stats["clip_fraction"].item() == pytest.approx(np.mean(outside))
    (found,) = torch.autograd.grad(loss["loss"], agent.policy.model.lm_head.weight)
    assert found.norm() > 0


def test_several_passes_of_rloo():
    agent, rollout = sampled("rloo", num_epochs=3, learning_rate=1e-2)
    metrics = agent.update(rollout)
    assert metrics["train/n_updates"] == 3 and metrics["train/approx_kl"] > 0 and metrics["train/clip_fraction"] > 0
