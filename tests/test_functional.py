"""The agents' shared maths against hand numbers, quadratic-time definitions, and the exact gradient by enumeration."""

from __future__ import annotations

import doctest
import itertools
from functools import cache

import pytest
import torch

from rlhf_gym.agents import functional as F

CLIP = 0.2


def random_batch(seed=0, rows=6, tokens=7, names=("a", "b", "c")):
    """Ragged rows (right-padded, one full, one of a single token) of standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = tokens, 1
    mask = torch.arange(tokens) < lengths[:, None]
    return mask, *(torch.randn(rows, tokens, generator=generator, dtype=torch.float64) for _ in names)


def test_docstring_examples():
    assert doctest.testmod(F).failed == 0


# --- returns and advantages ---------------------------------------------------------------------------------------


def quadratic_gae(rewards, values, mask, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, row by row over the real tokens alone."""
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        real = mask[b].nonzero().flatten().tolist()
        r, v = [rewards[b, t].item() for t in real], [values[b, t].item() for t in real] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(real))]
        for i, t in enumerate(real):
            out[b, t] = sum((gamma * gae_lambda) ** (k - i) * deltas[k] for k in range(i, len(real)))
    return out


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.0, 1.0), (0.97, 1.0)])
def test_gae_equals_the_quadratic_sum(gamma, gae_lambda):
    mask, rewards, values, noise = random_batch()
    for pattern in (mask, noise > 0, torch.zeros_like(mask)):  # right-padded, any holes, nothing real
        result = F.gae(rewards, values, pattern, gamma=gamma, gae_lambda=gae_lambda)
        expected = quadratic_gae(rewards, values, pattern, gamma, gae_lambda)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    # delta = (0 + .25 - .5, 1 + 0 - .25) = (-.25, .75); the 9 after the end is never bootstrapped from.
    result = F.gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    assert result.tolist() == [[-0.25 + 0.5 * 0.75, 0.75, 0.0]]


def test_gae_limits():
    mask, rewards, values, _ = random_batch(1)
    to_go = torch.zeros_like(rewards)
    for t in range(rewards.shape[1]):
        to_go[:, t] = torch.where(mask, rewards, 0.0)[:, t:].sum(1)
    expected = torch.where(mask, to_go - values, 0.0)
    torch.testing.assert_close(F.gae(rewards, values, mask, gae_lambda=1.0), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(F.reward_to_go(rewards, mask), torch.where(mask, to_go, 0.0), atol=1e-12, rtol=0)

    next_values = torch.cat([values[:, 1:], values[:, :1]], 1) * torch.cat([mask[:, 1:], ~mask[:, :1]], 1)
    expected = torch.where(mask, rewards + next_values - values, 0.0)
    torch.testing.assert_close(F.gae(rewards, values, mask, gae_lambda=0.0), expected, atol=1e-12, rtol=0)


def test_a_row_in_a_ragged_batch_equals_the_row_alone():
    mask, rewards, values, _ = random_batch(2)
    together = F.gae(rewards, values, mask)
    for b, length in enumerate(mask.sum(1).tolist()):
        alone = F.gae(rewards[b : b + 1, :length], values[b : b + 1, :length], mask[b : b + 1, :length])
        assert torch.equal(together[b, :length], alone[0])


def test_whiten_over_real_tokens_only():
    mask, values, _, _ = random_batch(3)
    values = 1e-6 * values + 3  # small advantages reach standard deviation 1 too
    white = F.whiten(values, mask)[mask]
    assert abs(white.mean()) < 1e-9
    assert white.std(correction=0).item() == pytest.approx(1, abs=1e-9)
    kept = F.whiten(values, mask, shift_mean=False)[mask]
    assert kept.mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-9)
    torch.testing.assert_close(kept - kept.mean(), white, atol=1e-8, rtol=0)
    # Negative control: statistics that count the padding are something else.
    padded = torch.where(mask, values, 0.0)
    assert abs(((padded - padded.mean()) / padded.std(correction=0))[mask].mean()) > 0.1


def test_masked_statistics():
    mask, values, _, _ = random_batch(4)
    assert F.masked_mean(values, mask).item() == pytest.approx(values[mask].mean().item(), abs=1e-12)
    assert F.masked_var(values, mask).item() == pytest.approx(values[mask].var(correction=0).item(), abs=1e-12)
    nothing = torch.zeros_like(mask)
    assert F.masked_mean(values, nothing) == F.masked_var(values, nothing) == 0
    assert F.whiten(values, nothing).abs().sum() == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, -1 / 3, 1e6 / 7])
def test_equal_values_have_no_spread(constant):
    """The mean of equal float32 numbers is not always that number; the rounding must not be magnified to size 1."""
    values, mask = torch.full((3, 7), constant), torch.ones(3, 7, dtype=torch.bool)
    assert F.whiten(values, mask).abs().max() == 0
    assert F.whiten(values, mask, shift_mean=False).allclose(values)
    assert F.explained_variance(torch.randn(3, 7), values, mask).isnan()
    for baseline, divide in itertools.product(("leave_one_out", "group_mean"), (False, True)):
        advantages = F.group_advantages(values.flatten(), 7, baseline=baseline, divide_by_std=divide)
        assert advantages.abs().max() == 0


def test_explained_variance():
    mask, values, returns, _ = random_batch(5)
    share = F.explained_variance(values, returns, mask).item()
    residual = (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0)
    assert share == pytest.approx(1 - residual.item(), abs=1e-12)
    assert F.explained_variance(returns, returns, mask) == 1


def test_advantage_scale_is_the_larger_spread():
    mask, advantages, _, _ = random_batch(6)
    own = advantages[mask].std(correction=0).item()
    narrow, wide = torch.linspace(0, 0.01, 6), torch.linspace(0, 100, 6)
    assert F.advantage_scale(advantages, narrow, mask).item() == pytest.approx(own, rel=1e-6)
    expected = 100 * (sum((i / 5 - 0.5) ** 2 for i in range(6)) / 6) ** 0.5
    assert F.advantage_scale(advantages, wide, mask).item() == pytest.approx(expected, rel=1e-6)
    assert F.advantage_scale(advantages * 0, narrow * 0, mask) > 0  # so that dividing gives 0, not NaN


# --- groups ----------------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    loo = F.group_advantages(scores, 3)
    assert loo.tolist() == [1 - 4.0, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]
    grpo = F.group_advantages(scores, 3, baseline="group_mean", divide_by_std=True, eps=0.0)
    bessel = [7**0.5, 3**0.5]  # ((-2)^2 + (-1)^2 + 3^2) / 2 and (1 + 1 + 4) / 2
    expected = [-2 / bessel[0], -1 / bessel[0], 3 / bessel[0], -1 / bessel[1], -1 / bessel[1], 2 / bessel[1]]
    torch.testing.assert_close(grpo, torch.tensor(expected))


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_group_advantages_properties(baseline, divide_by_std):
    options = {"baseline": baseline, "divide_by_std": divide_by_std}
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = F.group_advantages(scores, 4, **options)
    assert advantages.reshape(3, 4).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(F.group_advantages(scores + 100, 4, **options), advantages, atol=1e-11, rtol=0)
    shuffle = torch.tensor([2, 0, 3, 1, 4, 5, 7, 6, 11, 10, 9, 8])
    torch.testing.assert_close(F.group_advantages(scores[shuffle], 4, **options), advantages[shuffle])


# --- losses ----------------------------------------------------------------------------------------------------------


def test_aggregation_by_hand():
    loss = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, torch.nan, torch.inf, 5.0]])
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert F.aggregate_loss(loss, mask, "token_mean") == 20 / 5
    assert F.aggregate_loss(loss, mask, "sequence_mean") == (2.5 + 10) / 2
    assert F.aggregate_loss(loss, mask, "sequence_sum") == (10 + 10) / 2
    assert F.aggregate_loss(loss, mask, "constant") == 20 / (2 * 4)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_gradient_accumulation_equals_one_batch(mode):
    mask, weights, x, _ = random_batch(7)
    parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def gradient(rows, normaliser):
        loss = F.aggregate_loss((parameter * x[rows]).sin() * weights[rows], mask[rows], mode, normaliser=normaliser)
        return torch.autograd.grad(loss, parameter)[0]

    everything = slice(None)
    whole = gradient(everything, None)
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    total = F.loss_normaliser(mask, mode)
    assert sum(gradient(rows, total) for rows in parts).item() == pytest.approx(whole.item(), abs=1e-14)
    # Negative control: the mean of the micro-batches' own means is another number.
    assert abs(sum(gradient(rows, None) for rows in parts) / 3 - whole) > 1e-4


RATIOS = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.9, 3.1]


@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
@pytest.mark.parametrize(
    ("clip_range", "dual_clip"), [(0.2, None), ((0.2, 0.28), None), ((0.2, 0.28), 3.0), ((0.0, 0.0), None)]
)
def test_clipped_loss_and_its_gradient(advantage, clip_range, dual_clip):
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    ratios = torch.tensor([RATIOS], dtype=torch.float64)
    old = torch.full_like(ratios, -2.0)
    logprobs = (old + ratios.log()).requires_grad_()
    mask, advantages = torch.ones(1, len(RATIOS), dtype=torch.bool), torch.full_like(ratios, advantage)
    loss, stats = F.policy_loss_clipped(logprobs, old, advantages, mask, clip_range=clip_range, dual_clip=dual_clip)
    loss.sum().backward()

    for i, ratio in enumerate(RATIOS):
        textbook = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
        exploded = dual_clip is not None and advantage < 0 and ratio > dual_clip
        if exploded:
            textbook = -advantage * dual_clip
        assert loss[0, i].item() == pytest.approx(textbook, abs=1e-12)
        stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low) or exploded
        assert logprobs.grad[0, i].item() == pytest.approx(0 if stopped else -advantage * ratio, abs=1e-12)
        assert (logprobs.grad[0, i] == 0) == (stopped or advantage == 0)
    outside = sum(ratio < 1 - low or ratio > 1 + high for ratio in RATIOS)
    assert stats["clip_fraction"].item() == pytest.approx(outside / len(RATIOS))
    assert stats["ratio"].item() == pytest.approx(sum(RATIOS) / len(RATIOS))


def test_ratios_of_sequences():
    """Two responses of two tokens and one; ratios (4 * 1/9)^(1/2) = 2/3 and 3/2; the gradient is A ratio / length."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[4.0, 1 / 9], [1.5, 7.0]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[2.0, 2.0], [-2.0, torch.nan]], dtype=torch.float64)
    old = torch.zeros_like(logprobs)
    loss, stats = F.policy_loss_clipped(logprobs, old, advantages, mask, clip_range=0.6, importance_level="sequence")
    assert loss.flatten().tolist() == pytest.approx([-4 / 3, -4 / 3, 3.0, 0.0], abs=1e-12)
    assert stats["ratio"].item() == pytest.approx((2 / 3 + 2 / 3 + 3 / 2) / 3) and stats["clip_fraction"] == 0
    (gradient,) = torch.autograd.grad(F.aggregate_loss(loss, mask, "sequence_mean"), logprobs)
    assert gradient.flatten().tolist() == pytest.approx([-4 / 3 / 4, -4 / 3 / 4, 3.0 / 2, 0.0], abs=1e-12)
    # By tokens 4 is out of range upwards, and 1/9 is pulled up all the same.
    by_token, stats = F.policy_loss_clipped(logprobs, old, advantages, mask, clip_range=0.6)
    assert by_token.flatten().tolist() == pytest.approx([-3.2, -2 / 9, 3.0, 0.0], abs=1e-12)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3)


def test_first_minibatch_is_reinforce():
    mask, logprobs, advantages, _ = random_batch(8)
    logprobs.requires_grad_()
    loss, stats = F.policy_loss_clipped(logprobs, logprobs.detach(), advantages, mask, clip_range=CLIP)
    (gradient,) = torch.autograd.grad(F.aggregate_loss(loss, mask), logprobs)
    (reinforce,) = torch.autograd.grad(-(advantages * logprobs)[mask].mean(), logprobs)
    torch.testing.assert_close(gradient, reinforce, atol=1e-15, rtol=0)
    assert stats["ratio"] == 1 and stats["clip_fraction"] == 0 and stats["approx_kl"] == 0


def test_a_clipped_ratio_that_overflows_gives_no_nan():
    logprobs, old = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-200.0]])
    mask, advantages = torch.tensor([[True]]), torch.tensor([[2.0]])
    loss, _ = F.policy_loss_clipped(logprobs, old, advantages, mask, clip_range=CLIP)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-2 * 1.2) and logprobs.grad.item() == 0
    # Negative control: the textbook's min() and max() do.
    ratio = (logprobs - old).exp()
    textbook = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).sum()
    assert torch.autograd.grad(textbook, logprobs)[0].isnan().all()


def test_approx_kl_is_the_expected_kl_of_old_and_new():
    old, new = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    mask = torch.tensor([[True]])
    estimates = [F.approx_kl(new[a].reshape(1, 1), old[a].reshape(1, 1), mask) for a in range(3)]
    expected = sum(old[a].exp() * estimates[a] for a in range(3))
    assert expected.item() == pytest.approx((old.exp() * (old - new)).sum().item(), abs=1e-6)


def test_value_loss_by_hand():
    old, returns = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.1, 0.5, -0.5]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, stats = F.value_loss_clipped(values, old, returns, mask, clip_range_vf=0.2)
    loss.sum().backward()
    # Moved .5 towards 1: only .2 of it counts, no gradient. Inside: plain. Moved away from its target, twice: plain.
    torch.testing.assert_close(loss[0], torch.tensor([0.32, 0.405, 0.125, 1.125]))
    torch.testing.assert_close(values.grad[0], torch.tensor([0.0, -0.9, 0.5, -1.5]))
    assert stats["value_clip_fraction"] == 0.25
    plain, stats = F.value_loss_clipped(values, old, returns, mask)
    torch.testing.assert_close(plain[0], torch.tensor([0.125, 0.405, 0.125, 1.125]))
    assert stats["value_clip_fraction"] == 0


def test_entropy():
    logits = torch.tensor([[[0.0, 1.0, -torch.inf], [2.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    entropy = F.entropy_from_logits(logits)
    entropy.sum().backward()
    for t, allowed in ((0, [0, 1]), (1, [0, 1, 2])):
        few = logits.detach()[0, t, allowed].requires_grad_()
        p = few.exp() / few.exp().sum()
        expected = -(p * p.log()).sum()
        expected.backward()
        assert entropy[0, t].item() == pytest.approx(expected.item(), abs=1e-14)
        torch.testing.assert_close(logits.grad[0, t, allowed], few.grad, atol=1e-14, rtol=0)
    assert logits.grad[0, 0, 2] == 0
    assert F.entropy_from_logits(torch.zeros(4, dtype=torch.bfloat16)).dtype == torch.float32


# --- what stands after the end changes nothing -----------------------------------------------------------------------

LOSSES = {
    "policy": lambda mask, a, b, c: F.policy_loss_clipped(a, b, c, mask, clip_range=CLIP, dual_clip=3.0)[0],
    "policy of sequences": lambda mask, a, b, c: F.policy_loss_clipped(a, b, c, mask, importance_level="sequence")[0],
    "value": lambda mask, a, b, c: F.value_loss_clipped(a, b, c, mask, clip_range_vf=CLIP)[0],
    "entropy": lambda mask, a, b, c: F.entropy_from_logits(torch.stack([a, b, c], -1), mask),
    "gae": lambda mask, a, b, c: F.gae(a, b, mask),
    "whiten": lambda mask, a, b, c: F.whiten(a, mask),
    "token_mean": lambda mask, a, b, c: F.aggregate_loss(a, mask, "token_mean"),
    "sequence_mean": lambda mask, a, b, c: F.aggregate_loss(a, mask, "sequence_mean"),
    "sequence_sum": lambda mask, a, b, c: F.aggregate_loss(a, mask, "sequence_sum"),
    "variance": lambda mask, a, b, c: F.masked_var(a, mask),
    "explained": lambda mask, a, b, c: F.explained_variance(a, b, mask),
    "approx_kl": lambda mask, a, b, c: F.approx_kl(a, b, mask),
    "scale": lambda mask, a, b, c: F.advantage_scale(a, torch.zeros(len(a), dtype=a.dtype), mask),
} | {
    f"{estimator} {level}": lambda mask, a, b, c, e=estimator, v=level: F.kl_in_loss(a, b, mask, estimator=e, level=v)
    for estimator, level in itertools.product(("k1", "k2", "k3"), ("token", "sequence"))
}


def value_and_gradients(function, mask, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = function(mask, *inputs)
    gradients = [torch.zeros_like(x) for x in inputs]
    if result.requires_grad:
        found = torch.autograd.grad(result.square().sum(), inputs, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return result.detach(), gradients


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", [-torch.inf, torch.inf, torch.nan, 1e30])
def test_junk_after_the_end_changes_exactly_nothing(name, junk):
    mask, *inputs = random_batch(9)
    clean, gradients = value_and_gradients(LOSSES[name], mask, inputs)
    dirty, dirty_gradients = value_and_gradients(LOSSES[name], mask, [torch.where(mask, x, junk) for x in inputs])
    assert clean.isfinite().all() and torch.equal(clean, dirty)
    for a, b in zip(gradients, dirty_gradients, strict=True):
        assert torch.equal(a, b) and (b[~mask] == 0).all()


def test_multiplying_by_the_mask_would_not_do():
    """The negative control of the test above."""

    def multiplied(mask, a, b, c):
        return -((a - b).exp() * c) * mask

    mask, *inputs = random_batch(9)
    result, gradients = value_and_gradients(multiplied, mask, [torch.where(mask, x, torch.inf) for x in inputs])
    assert result.isnan().any() and gradients[0].isnan().any()


# --- exact expected gradients, by enumeration ------------------------------------------------------------------------
# The WoAiNi process: tokens 0-3 are 我 爱 你 。; a response ends at 。 or after 4 tokens; 我爱你。 scores 1.

BETA = 0.3
THIRD = 1 / 3
REFERENCE = {  # by the last token, -1 at the start
    -1: [0.5, 0.5 * THIRD, 0.5 * THIRD, 0.5 * THIRD],
    0: [0.2 * THIRD, 0.8, 0.2 * THIRD, 0.2 * THIRD],
    1: [0.4 * THIRD, 0.4 * THIRD, 0.6, 0.4 * THIRD],
    2: [0.0, 0.0, 0.0, 1.0],
}


@cache
def woaini():
    """All responses: which prefix each token is chosen in, the token, the mask, the score; the reference per prefix."""
    prefixes, responses = {}, []

    def grow(prefix, steps):
        state = prefixes.setdefault(prefix, len(prefixes))
        for token, probability in enumerate(REFERENCE[prefix[-1] if prefix else -1]):
            if probability == 0:
                continue
            response, path = (*prefix, token), [*steps, (state, token)]
            if token == 3 or len(response) == 4:
                responses.append((path, float(response == (0, 1, 2, 3))))
            else:
                grow(response, path)

    grow((), [])
    mask = torch.tensor([[t < len(path) for t in range(4)] for path, _ in responses])
    path = torch.tensor([[*path, *[(0, 0)] * (4 - len(path))] for path, _ in responses])
    table = [REFERENCE[prefix[-1] if prefix else -1] for prefix in prefixes]
    scores = torch.tensor([score for _, score in responses], dtype=torch.float64)
    return path[..., 0], path[..., 1], mask, scores, torch.tensor(table, dtype=torch.float64).log()


class Process:
    """A tabular policy on WoAiNi, residual on the reference: parameters, and everything about all its responses."""

    def __init__(self, parameters=None):
        states, tokens, self.mask, self.scores, reference = woaini()
        if parameters is None:
            parameters = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.parameters = parameters.detach().requires_grad_()
        self.all_logprobs = (reference + self.parameters).log_softmax(-1)
        self.reference, self.states = reference, states
        self.logprobs = torch.where(self.mask, self.all_logprobs[states, tokens], 0.0)
        self.ref_logprobs = torch.where(self.mask, reference[states, tokens], 0.0)
        self.log_ratio = (self.logprobs - self.ref_logprobs).sum(1)
        self.probability = self.logprobs.sum(1).exp()
        self.objective = (self.probability * (self.scores - BETA * self.log_ratio)).sum()

    def gradient(self, value):
        return torch.autograd.grad(value, self.parameters, retain_graph=True)[0]

    def expected_gradient(self, per_row):
        """E over sampled responses of the gradient: the sampling itself is not differentiated."""
        return self.gradient((self.probability.detach() * per_row).sum())

    def kl_rewards(self):
        """Score on the last token, k1 penalty on every token: what the environment pays."""
        rewards = -BETA * (self.logprobs - self.ref_logprobs).detach()
        rewards[torch.arange(len(rewards)), self.mask.sum(1) - 1] += self.scores
        return rewards

    def policy_loss(self, advantages):
        """Loss of whole responses (B,): the first step of PPO, where the ratio is 1."""
        return F.policy_loss_clipped(self.logprobs, self.logprobs.detach(), advantages, self.mask)[0].sum(1)


def test_the_enumeration_is_the_process():
    process = Process(torch.zeros(woaini()[-1].shape, dtype=torch.float64))
    assert process.probability.sum().item() == pytest.approx(1, abs=1e-14)
    assert process.objective.item() == pytest.approx(0.24, abs=1e-14)  # published: J_ref
    best = BETA * (process.probability * (process.scores / BETA).exp()).sum().log()
    assert best.item() == pytest.approx(0.604, abs=5e-4)  # published: J* at beta .3


def test_policy_gradient_with_the_kl_in_the_reward_is_exact():
    """REINFORCE and PPO's first step: reward-to-go minus any values, at lambda 1."""
    process = Process()
    exact = process.gradient(process.objective)
    rewards = process.kl_rewards()
    values = torch.randn(len(process.reference), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    baseline = torch.where(process.mask, values[process.states], 0.0)
    for advantages in (
        F.reward_to_go(rewards, process.mask),
        F.gae(rewards, baseline, process.mask, gae_lambda=1.0),
    ):
        found = process.expected_gradient(process.policy_loss(advantages))
        assert (found + exact).abs().max() < 1e-10
    biased = F.gae(rewards, baseline, process.mask, gae_lambda=0.5)  # with wrong values, lambda < 1 is biased
    assert (process.expected_gradient(process.policy_loss(biased)) + exact).abs().max() > 1e-3


def expected_gradient_of_groups(process, size=2, shift=0.0, mode="sequence_sum", **options):
    """Over all ordered groups of responses: the expected gradient of group advantages."""
    n = len(process.scores)
    groups = torch.cartesian_prod(*[torch.arange(n)] * size)
    rows = groups.flatten()
    returns = (process.scores + shift - BETA * process.log_ratio).detach()
    advantages = F.group_advantages(returns[rows], size, **options)
    mask = process.mask[rows]
    loss, _ = F.policy_loss_clipped(
        process.logprobs[rows], process.logprobs.detach()[rows], advantages[:, None].expand_as(mask), mask
    )
    chances = process.probability.detach()[groups].prod(1).repeat_interleave(size)
    return process.gradient(F.aggregate_loss(loss * chances[:, None], mask, mode, normaliser=size))


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_gradient_is_exact(size):
    process = Process()
    exact = process.gradient(process.objective)
    assert (expected_gradient_of_groups(process, size) + exact).abs().max() < 1e-10
    # Negative controls: what is known to be another gradient.
    grpo = expected_gradient_of_groups(process, size, baseline="group_mean", divide_by_std=True)
    assert (grpo / grpo.norm() + exact / exact.norm()).norm() > 0.1
    by_length = expected_gradient_of_groups(process, size, mode="sequence_mean")
    assert (by_length / by_length.norm() + exact / exact.norm()).norm() > 0.05
    # The mean of all is the same direction, (size - 1) / size as long.
    smaller = expected_gradient_of_groups(process, size, baseline="group_mean")
    assert (smaller + (size - 1) / size * exact).abs().max() < 1e-10


GROUPS = [{}, {"baseline": "group_mean"}, {"baseline": "group_mean", "divide_by_std": True}]


@pytest.mark.parametrize("options", GROUPS)
def test_a_constant_added_to_the_score_changes_no_gradient(options):
    process = Process()
    plain = expected_gradient_of_groups(process, **options)
    assert (expected_gradient_of_groups(process, shift=10.0, **options) - plain).abs().max() < 1e-10


@pytest.mark.parametrize("options", GROUPS)
def test_a_constant_added_to_the_score_changes_the_gradient_of_no_batch(options):
    """Not in expectation only: here eight groups of four, drawn once."""
    process = Process()
    rows = torch.multinomial(process.probability.detach(), 32, True, generator=torch.Generator().manual_seed(0))
    returns = (process.scores - BETA * process.log_ratio).detach()[rows]

    def gradient(advantages):
        spread = advantages[:, None].expand_as(process.mask[rows])
        logprobs = process.logprobs[rows]
        loss, _ = F.policy_loss_clipped(logprobs, logprobs.detach(), spread, process.mask[rows])
        return process.gradient(F.aggregate_loss(loss, process.mask[rows]))

    plain, shifted = (gradient(F.group_advantages(returns + c, 4, **options)) for c in (0.0, 10.0))
    assert plain.norm() > 0.01 and (plain - shifted).abs().max() < 1e-10
    # Negative control: without a baseline it does.
    assert (gradient(returns) - gradient(returns + 10.0)).norm() > 0.1


def test_kl_estimates_agree_in_value():
    process = Process()
    p = process.probability.detach()
    whole = (p * process.log_ratio).sum()
    per_state = process.all_logprobs.exp() * torch.where(
        process.reference.isinf(), 0.0, process.all_logprobs - process.reference
    )
    for estimator in ("k1", "k3"):
        for level in ("token", "sequence"):
            estimate = F.kl_in_loss(
                process.logprobs, process.ref_logprobs, process.mask, estimator=estimator, level=level
            )
            estimate = estimate.sum(1) if level == "token" else estimate
            assert (p * estimate).sum().item() == pytest.approx(whole.item(), abs=1e-12)
            assert estimator == "k1" or estimate.min() >= 0
    summed = torch.where(process.mask, per_state.nan_to_num(0.0).sum(-1)[process.states], 0.0).sum(1)
    assert (p * summed).sum().item() == pytest.approx(whole.item(), abs=1e-12)


def test_kl_estimates_disagree_in_gradient():
    process = Process()
    exact = process.gradient((process.probability * process.log_ratio).sum())

    def expected(estimator, level):
        estimate = F.kl_in_loss(process.logprobs, process.ref_logprobs, process.mask, estimator=estimator, level=level)
        return process.expected_gradient(estimate.sum(1) if level == "token" else estimate)

    assert expected("k1", "token").abs().max() < 1e-12
    assert expected("k1", "sequence").abs().max() < 1e-12
    assert (expected("k2", "sequence") - exact).abs().max() < 1e-10
    for other in (("k2", "token"), ("k3", "token"), ("k3", "sequence")):
        assert (expected(*other) - exact).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("estimator", "level", "regret"),
    [("k2", "sequence", 0.0), ("k1", "token", 0.031), ("k2", "token", 0.003), ("k3", "token", 0.037)],
)
def test_where_a_kl_term_in_the_loss_leads(estimator, level, regret):
    """Published fixed points (beta .3): follow the exact expected gradient until it vanishes; the regret there."""
    process = Process(torch.zeros(woaini()[-1].shape, dtype=torch.float64))
    best = BETA * (process.probability * (process.scores / BETA).exp()).sum().log().item()
    parameters = process.parameters.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.1)
    for _ in range(300):
        process = Process(parameters)
        penalty = F.kl_in_loss(process.logprobs, process.ref_logprobs, process.mask, estimator=estimator, level=level)
        penalty = penalty.sum(1) if level == "token" else penalty
        advantages = process.scores[:, None].expand_as(process.logprobs)
        parameters.grad = process.expected_gradient(process.policy_loss(advantages) + BETA * penalty)
        optimizer.step()
    assert best - process.objective.item() == pytest.approx(regret, abs=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals():
    mask, a, b, c = random_batch(10)
    with pytest.raises(ValueError, match=r"advantages must have the mask's shape \(6, 7\), got \(6, 1\)"):
        F.policy_loss_clipped(a, b, c[:, :1], mask)
    with pytest.raises(TypeError, match="bool"):
        F.masked_mean(a, mask.long())
    with pytest.raises(ValueError, match="gamma must be in"):
        F.gae(a, b, mask, gamma=1.1)
    with pytest.raises(ValueError, match="gae_lambda must be in"):
        F.gae(a, b, mask, gae_lambda=-0.1)
    for clip_range in (-0.1, 1.1, (0.2, float("inf")), float("nan")):
        with pytest.raises(ValueError, match="clip_range must be"):
            F.policy_loss_clipped(a, b, c, mask, clip_range=clip_range)
    with pytest.raises(ValueError, match="dual_clip must be"):
        F.policy_loss_clipped(a, b, c, mask, dual_clip=1.1)
    with pytest.raises(ValueError, match="importance_level must be .* got 'word'"):
        F.policy_loss_clipped(a, b, c, mask, importance_level="word")
    with pytest.raises(ValueError, match="clip_range_vf must be"):
        F.value_loss_clipped(a, b, c, mask, clip_range_vf=0.0)
    with pytest.raises(ValueError, match="token_mean, sequence_mean, sequence_sum, constant; got 'mean'"):
        F.aggregate_loss(a, mask, "mean", normaliser=3)
    with pytest.raises(ValueError, match="group_size must be .* got 4"):
        F.group_advantages(a[:, 0], 4)
    with pytest.raises(ValueError, match="baseline must be"):
        F.group_advantages(a[:, 0], 2, baseline="mean")
    with pytest.raises(ValueError, match=r"scores must have shape \(B,\)"):
        F.group_advantages(a, 2)
    with pytest.raises(ValueError, match=r"scores must have shape \(B,\) = \(6,\)"):
        F.advantage_scale(a, a, mask)
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'exact'"):
        F.kl_in_loss(a, b, mask, estimator="exact")
    with pytest.raises(ValueError, match="level must be"):
        F.kl_in_loss(a, b, mask, level="row")
