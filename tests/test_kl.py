"""KL estimators against sums written out by hand, and the controllers against the published rule."""

from __future__ import annotations

import doctest
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_gym import kl
from rlhf_gym.kl import AdaptiveKL, FixedKL, estimate_kl, exact_kl, k1, k2, k3

P = [0.5, 0.2, 0.2, 0.1]
Q = [0.1, 0.3, 0.2, 0.4]
KL_PQ = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


def log(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_docstring_examples():
    assert doctest.testmod(kl).failed == 0


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    p = torch.tensor(P, dtype=torch.float64)
    expected = {name: (p * estimate_kl(log(P), log(Q), name)).sum().item() for name in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(KL_PQ, abs=1e-12)
    assert expected["k3"] == pytest.approx(KL_PQ, abs=1e-12)
    assert abs(expected["k2"] - KL_PQ) > 0.05
    assert estimate_kl(log(P), log(Q), "exact").item() == pytest.approx(KL_PQ, abs=1e-12)


def test_gradients_of_the_estimators_in_expectation():
    """On the policy's own samples: E[grad k1] = 0, E[grad k2] = grad KL(pi||ref), E[grad k3] = grad KL(ref||pi)."""
    logits = log(P).requires_grad_()
    logprobs = logits.log_softmax(-1)
    p = logprobs.detach().exp()

    def gradient(objective):
        return torch.autograd.grad(objective, logits, retain_graph=True)[0]

    forward = gradient((logprobs.exp() * (logprobs - log(Q))).sum())
    backward = gradient((log(Q).exp() * (log(Q) - logprobs)).sum())
    assert gradient((p * k1(logprobs, log(Q))).sum()).abs().max() < 1e-15
    torch.testing.assert_close(gradient((p * k2(logprobs, log(Q))).sum()), forward, atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient((p * k3(logprobs, log(Q))).sum()), backward, atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient(exact_kl(logprobs, log(Q))), forward, atol=1e-14, rtol=0)
    assert (forward - backward).abs().max() > 0.01


def test_k3_is_not_negative_in_float32():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(10_000, generator=generator) * 10
    sizes = 10 ** (-8 * torch.rand(10_000, generator=generator))
    ref_logprobs = logprobs + sizes * torch.randn(10_000, generator=generator)
    assert k3(logprobs, ref_logprobs).min() >= 0
    log_r = ref_logprobs - logprobs
    assert (log_r.exp() - 1 - log_r).min() < 0  # the formula as written is not


def test_exact_kl_ignores_masked_actions():
    logits = torch.tensor([[1.0, 0.0, -torch.inf], [0.5, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.0, 0.5, -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
    result = exact_kl(logits.log_softmax(-1), reference.log_softmax(-1))
    result.sum().backward()

    two = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    logp, logq = two.log_softmax(-1), torch.tensor([0.0, 0.5], dtype=torch.float64).log_softmax(-1)
    expected = (logp.exp() * (logp - logq)).sum()
    expected.backward()
    assert result[0].item() == pytest.approx(expected.item(), abs=1e-15)
    torch.testing.assert_close(logits.grad[0, :2], two.grad, atol=1e-15, rtol=0)
    assert logits.grad[0, 2] == 0
    # What the reference thinks of an action that the policy never takes is of no account, -inf included.
    assert exact_kl(log([1.0, 0.0]), log([0.5, 0.5])).item() == pytest.approx(math.log(2))
    assert exact_kl(log([0.5, 0.5]), log([1.0, 0.0])).item() == math.inf


def test_estimate_kl_refuses():
    with pytest.raises(ValueError, match="k1, k2, k3, exact; got 'k4'"):
        estimate_kl(log(P), log(Q), "k4")
    with pytest.raises(ValueError, match=r"same shape, got \(4,\) and \(4, 1\)"):
        k1(log(P), log(Q)[:, None])
    with pytest.raises(ValueError, match="vocabulary"):
        exact_kl(torch.tensor(-1.0), torch.tensor(-1.0))


def test_fixed_controller_stays():
    controller = FixedKL(0.0)
    assert controller.update(kl=100.0, num_episodes=64) == 0.0 == controller.coef
    controller.load_state_dict(json.loads(json.dumps(FixedKL(0.3).state_dict())))
    assert controller.coef == 0.3


@pytest.mark.parametrize(
    ("kl_now", "factor"),
    [
        (6.0, 1.0),  # on target: unchanged
        (6.6, 1 + 0.1 * 64 / 1000),  # 10 % above
        (5.4, 1 - 0.1 * 64 / 1000),
        (60.0, 1 + 0.2 * 64 / 1000),  # far above: clipped at 20 %
        (0.0, 1 - 0.2 * 64 / 1000),
        (-3.0, 1 - 0.2 * 64 / 1000),  # an estimate may be negative
    ],
)
def test_adaptive_controller_moves_as_published(kl_now, factor):
    controller = AdaptiveKL(0.2, target=6.0, horizon=1000)
    assert controller.update(kl_now, num_episodes=64) == pytest.approx(0.2 * factor, rel=1e-12)
    assert controller.coef == pytest.approx(0.2 * factor, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(kl_now=st.floats(-1e6, 1e6), target=st.floats(0.01, 100), share=st.floats(1e-6, 4.9))
def test_adaptive_controller_grows_no_faster_than_published(kl_now, target, share):
    """Ziegler et al. 2019: the error is clipped to [-.2, .2] and K_beta = .1 times it is the growth of one update; in
    general it is episodes / horizon times it. The coefficient moves towards the target, and is never 0."""
    controller = AdaptiveKL(0.3, target=target, horizon=1000 / share)
    growth = controller.update(kl_now, num_episodes=1000) / 0.3 - 1
    assert abs(growth) <= 0.2 * share * (1 + 1e-9) and controller.coef > 0
    assert growth * (kl_now - target) >= 0
    assert AdaptiveKL(0.3, target, 1000).update(kl_now, 100) == pytest.approx(0.3, rel=0.02 + 1e-9)  # K_beta = .1


def test_adaptive_controller_reaches_its_target():
    """With a KL that falls as the coefficient rises, as it does in training, the loop settles on the target."""
    controller = AdaptiveKL(0.01, target=5.0, horizon=500)
    for _ in range(400):
        controller.update(kl=1 / controller.coef, num_episodes=64)
    assert 1 / controller.coef == pytest.approx(5.0, rel=1e-3)


def test_adaptive_controller_resumes():
    straight, saved = AdaptiveKL(0.2, 6.0, 1000), AdaptiveKL(0.2, 6.0, 1000)
    for value in (9.0, 2.0):
        straight.update(value, 64)
        saved.update(value, 64)
    resumed = AdaptiveKL(0.5, 6.0, 1000)
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert resumed.update(7.0, 64) == straight.update(7.0, 64)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FixedKL(-0.1), ValueError, "kl_coef must be a finite number >= 0, got -0.1"),
        (lambda: FixedKL(math.nan), ValueError, "kl_coef"),
        (lambda: FixedKL("0.1"), TypeError, "kl_coef .* got '0.1'"),
        (lambda: FixedKL(True), TypeError, "kl_coef"),
        (lambda: AdaptiveKL(0.0, 6.0), ValueError, "kl_coef must be a finite number > 0"),
        (lambda: AdaptiveKL(0.1, 0.0), ValueError, "ref_kl_target"),
        (lambda: AdaptiveKL(0.1, 6.0, math.inf), ValueError, "kl_horizon"),
        (lambda: AdaptiveKL(0.1, 6.0).update(math.nan, 64), ValueError, "kl must be finite, got nan"),
        (lambda: AdaptiveKL(0.1, 6.0).update(6.0, 0), ValueError, "num_episodes must be > 0"),
        (lambda: AdaptiveKL(0.1, 6.0, horizon=10).update(6.0, 64), ValueError, "kl_horizon .* got 10 for 64 episodes"),
        (lambda: AdaptiveKL(0.1, 6.0).load_state_dict({"coef": -1.0}), ValueError, "kl_coef"),
    ],
)
def test_controllers_refuse(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_refused_update_changes_nothing():
    controller = AdaptiveKL(0.1, 6.0)
    with pytest.raises(ValueError):
        controller.update(math.nan, 64)
    assert controller.coef == 0.1
