"""Token filters and draws, checked by hand, by enumeration and by counting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_gym.lm import TokenFilter, sample_tokens

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3  # a constant added to all logits means nothing


def test_trivial_filter():
    token_filter = TokenFilter()
    assert token_filter.is_trivial and not token_filter.uses_reference
    assert token_filter.mask(LOGITS) is None
    torch.testing.assert_close(token_filter.logprobs(LOGITS).exp(), torch.tensor([0.5, 0.25, 0.125, 0.125]))


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [1, 1, 0, 0]),
        ({"top_k": 99}, [1, 1, 1, 1]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [1, 1, 0, 0]),  # 0.5 is not enough
        ({"top_p": 1.0}, [1, 1, 1, 1]),
        ({"top_p": 0.75, "top_k": 3}, [1, 1, 0, 0]),  # of the three, 0.571 + 0.286 reach 0.75
        ({"top_p": 0.9, "top_k": 3}, [1, 1, 1, 0]),
        ({"allowed_tokens": (3, 1)}, [0, 1, 0, 1]),
        ({"allowed_tokens": (3, 1), "top_k": 1}, [0, 1, 0, 0]),
        ({"allowed_tokens": (3, 1), "top_p": 0.6}, [0, 1, 0, 0]),  # 0.667 of the two
        ({"top_p": 0.6, "temperature": 0.5}, [1, 0, 0, 0]),  # the squares: 0.727
        ({"top_p": 0.6, "temperature": 2.0}, [1, 1, 0, 0]),  # the roots: 0.369 + 0.261
    ],
)
def test_masks_by_hand(arguments, allowed):
    token_filter = TokenFilter(**arguments)
    mask = token_filter.mask(LOGITS.expand(2, 3, 4))
    expected = torch.tensor(allowed, dtype=torch.bool)
    if arguments.get("top_k") == 3:  # the third of two equal tokens is either
        assert mask[..., :2].tolist() == expected[:2].expand(2, 3, 2).tolist()
        assert (mask.sum(-1) == expected.sum()).all()
    else:
        assert torch.equal(mask, expected.expand(2, 3, 4))


def test_policy_and_reference_are_renormalised_on_the_same_tokens():
    token_filter = TokenFilter(temperature=2.0, top_k=2)
    policy = torch.tensor([0.0, 2.0, 4.0, 6.0])
    logprobs = token_filter.logprobs(policy, token_filter.mask(LOGITS))
    torch.testing.assert_close(logprobs[:2].exp(), torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)]))
    assert (logprobs[2:] == -math.inf).all()
    tokens = torch.tensor([0, 1])
    torch.testing.assert_close(
        token_filter.token_logprobs(policy.expand(2, 4), tokens, token_filter.mask(LOGITS).expand(2, 4)),
        logprobs[tokens],
    )


def test_a_chosen_token_at_the_edge_stays_inside():
    """The same logits computed in another way differ in their last bits; the choice must not become impossible."""
    token_filter = TokenFilter(top_k=2)
    logits = torch.tensor([3.0, 2.0, 2.0 - 1e-6, -5.0])
    assert token_filter.mask(logits).tolist() == [True, True, False, False]
    assert token_filter.mask(logits, keep=torch.tensor(2)).tolist() == [True, True, True, False]
    assert token_filter.mask(logits, keep=torch.tensor(3)).tolist() == [True, True, False, False]


def test_gradients_are_finite_where_tokens_are_forbidden():
    logits = torch.randn(3, 6, requires_grad=True)
    token_filter = TokenFilter(top_k=2)
    token_filter.logprobs(logits, token_filter.mask(logits.detach())).max(-1).values.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad != 0).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k must be None or an integer of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, r"top_p must be None or a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.2}, "top_p"),
        ({"allowed_tokens": ()}, "allowed_tokens"),
        ({"allowed_tokens": (-1, 2)}, "allowed_tokens"),
    ],
)
def test_bad_filters_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TokenFilter(**arguments)


def test_allowed_tokens_outside_of_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="below the vocabulary size 4, got 4"):
        TokenFilter(allowed_tokens=(1, 4)).mask(LOGITS)


# Draws ----------------------------------------------------------------------------------------------------------------


def test_draws_invert_the_cumulative_distribution():
    logprobs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.9999, 1 - 2**-24])
    assert sample_tokens(logprobs.expand(8, 6), uniforms).tolist() == [1, 1, 1, 3, 3, 4, 4, 4]


def test_draws_have_the_right_frequencies():
    logprobs = torch.randn(50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    count = 20_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(1))
    found = sample_tokens(logprobs.expand(count, 50), uniforms).bincount(minlength=50) / count
    sigma = (logprobs.exp() * (1 - logprobs.exp()) / count).sqrt()
    assert ((found - logprobs.exp()).abs() < 5 * sigma).all()


@settings(max_examples=100, deadline=None)
@given(
    logits=arrays("float32", (3, 300), elements=st.floats(-60, 60, width=32)),
    forbidden=arrays("bool", (3, 300)),
    uniforms=arrays("float64", 3, elements=st.floats(0, 1, exclude_max=True)),
)
def test_a_forbidden_token_is_never_drawn(logits, forbidden, uniforms):
    forbidden[:, 7] = False
    logprobs = torch.from_numpy(logits).masked_fill(torch.from_numpy(forbidden), -math.inf).log_softmax(-1)
    tokens = sample_tokens(logprobs, torch.from_numpy(uniforms))
    assert (logprobs.gather(1, tokens[:, None]).exp() > 0).all()


@pytest.mark.parametrize(
    "arguments", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"allowed_tokens": (1, 4, 5)}]
)
def test_monte_carlo_kl_is_not_negative(arguments):
    """E_pi[log pi - log pi_ref] >= 0 when, and only when, both are normalised on the same tokens."""
    generator, count = torch.Generator().manual_seed(0), 100_000
    policy, reference = torch.randn(2, 8, generator=generator)
    token_filter = TokenFilter(**arguments)
    mask = token_filter.mask(reference)
    pi, ref = token_filter.logprobs(policy, mask), token_filter.logprobs(reference, mask)
    tokens = sample_tokens(pi.expand(count, 8), torch.rand(count, generator=generator))
    ratios = (pi - ref)[tokens]
    assert torch.isfinite(ratios).all()
    sigma = ratios.std() / count**0.5
    assert ratios.mean() >= -3 * sigma
    kept = torch.isfinite(pi)
    exact = (pi[kept].exp() * (pi - ref)[kept]).sum()
    assert (ratios.mean() - exact).abs() < 5 * sigma


def test_a_cut_of_each_model_for_itself_breaks_the_kl():
    """The negative control: log pi_ref is -inf for tokens that the policy chooses."""
    policy, reference = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0])
    token_filter = TokenFilter(top_k=2)
    pi = token_filter.logprobs(policy, token_filter.mask(policy))
    ref = token_filter.logprobs(reference, token_filter.mask(reference))
    assert (pi.exp() * (pi - ref))[0] == math.inf


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_cannot_be_drawn_from_is_refused(bad):
    logprobs = torch.log_softmax(torch.zeros(3, 4), -1)
    logprobs[1] = bad
    with pytest.raises(ValueError, match="those of row 1 sum to"):
        sample_tokens(logprobs, torch.rand(3, generator=torch.Generator().manual_seed(0)))
