"""Log-probs straight from hidden states: against float64 log-softmax, whole, in pieces, kept and computed twice."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_gym.lm import head

N, D, V = 11, 5, 7


def world(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)


def truth(hidden, weight, tokens, gradient, temperature):
    """By autograd through float64 log-softmax."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    chosen = logprobs[torch.arange(N), tokens]
    (chosen * gradient).sum().backward()
    return chosen.detach(), -(logprobs.exp() * logprobs).sum(-1).detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "twice"])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(monkeypatch, kept, pieces, temperature):
    monkeypatch.setattr(head, "LOGITS_PER_PIECE", math.ceil(N / pieces) * V)
    monkeypatch.setattr(head, "PROBABILITIES_KEPT", N * V if kept else N * V - 1)
    hidden, weight, tokens, gradient = world()
    logprobs, entropies = head.head_logprobs(hidden, weight, tokens, temperature)
    assert logprobs.dtype == torch.float32 and not entropies.requires_grad
    (logprobs * gradient).sum().backward()
    expected = truth(hidden, weight, tokens, gradient, temperature)
    for found, right in zip((logprobs.detach(), entropies, hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)


def test_only_what_is_wanted_is_computed():
    hidden, weight, tokens, gradient = world()
    logprobs, _ = head.head_logprobs(hidden, weight.detach(), tokens)
    (logprobs * gradient).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    torch.testing.assert_close(
        hidden.grad.double(), truth(hidden, weight, tokens, gradient, 1.0)[2], atol=1e-5, rtol=1e-5
    )


def test_bfloat16_sums_in_float32():
    hidden, weight, tokens, gradient = world(torch.bfloat16)
    logprobs, entropies = head.head_logprobs(hidden, weight, tokens)
    right = truth(hidden, weight, tokens, gradient, 1.0)
    # The logits are rounded to 8 bits, 2**-8 of up to 5; the sums over them are not.
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.detach().double(), right[0], atol=3e-2, rtol=0)
    torch.testing.assert_close(entropies.double(), right[1], atol=3e-2, rtol=0)


def test_an_impossible_distribution_is_hard_but_finite():
    weight = torch.tensor([[200.0], [-200.0], [0.0]])
    logprobs, entropies = head.head_logprobs(torch.ones(1, 1), weight, torch.tensor([1]))
    assert logprobs.item() == -400.0 and entropies.item() == 0.0
