"""Linear layers by another kernel: the same values, gradients and second derivatives as PyTorch's own."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from lm_models import model, new_model, sequences

from rlhf_gym.lm import fast_linear, pad_sequences, response_logits


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_value_gradient_and_second_derivative(bias):
    inputs = [torch.randn(shape, dtype=torch.float32, requires_grad=True) for shape in ((2, 5, 4), (3, 4), (3,))]
    inputs = inputs if bias else inputs[:2]

    def derivatives(mode):
        with mode:
            y = F.linear(*inputs)
            first = torch.autograd.grad(y.tanh().pow(2).sum(), inputs, create_graph=True)
            return [y, *first, *torch.autograd.grad(sum(g.pow(3).sum() for g in first), inputs)]

    close(derivatives(fast_linear()), derivatives(contextlib.nullcontext()), 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_gradients_equal_plain_ones(family):
    """Through `response_logits`, which uses it, against the model's own forward and backward."""
    ids, lengths = pad_sequences(sequences(9, 9))
    found = new_model(family)
    response_logits(found, ids, lengths, torch.tensor([3, 3]), 4)[0].logsumexp(-1).sum().backward()
    plain = new_model(family)
    plain(input_ids=ids).logits[:, 3:7].logsumexp(-1).sum().backward()
    close([p.grad for p in found.parameters()], [p.grad for p in plain.parameters()], 1e-4)


def test_frozen_weights_get_no_gradient():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    with fast_linear():
        F.linear(x, weight).sum().backward()
    close([x.grad], [weight.sum(0).expand(2, 3)])
    assert weight.grad is None


def test_what_is_not_for_it_is_left_alone():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with fast_linear():
        assert F.linear(x.double(), weight.double()).dtype == torch.float64
        assert F.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16
        matrix = torch.ones(2, 4)
        found = [torch.addmm(matrix, x, weight.t()), torch.addmm(matrix[0], x, weight.t(), beta=0.5)]
    close(found, [1 + x @ weight.t(), 0.5 + x @ weight.t()])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_still_works(family):
    ids, lengths = pad_sequences(sequences(9, 9))
    gradients = []
    for checkpointing in (False, True):
        net = new_model(family)
        if checkpointing:
            getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)()
        net.train()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        response_logits(net, ids, lengths, torch.tensor([3, 3]), 4)[0].logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    close(*gradients, 1e-4)


def test_the_mode_ends_with_an_error():
    net = model("gpt2")
    with pytest.raises(RuntimeError), fast_linear():
        F.linear(torch.randn(2, 3), torch.randn(4, 5))
    assert not torch.overrides._get_current_function_mode_stack()
    assert net(input_ids=torch.tensor([[1]])).logits.shape == (1, 1, 37)
