"""The own forward of whole sequences against the models' own, row by row: values, gradients, and when it steps back."""

from __future__ import annotations

import pytest
import torch
from lm_models import new_model, true_logits

from rlhf_gym.lm import blocks, packed
from rlhf_gym.lm.forward import forward_at

FAMILIES = ["gpt2", "gpt2-scaled", "llama", "mistral-window", "qwen2-mixed", "qwen3"]
# Nearly equal lengths are computed as a rectangle, very different ones packed.
LENGTHS = {"rectangle": (9, 8, 9), "packed": (12, 2, 3)}


def world(family, kind):
    net = new_model(family)
    lengths = LENGTHS[kind]
    ids = torch.randint(2, 37, (3, max(lengths) + 2), generator=torch.Generator().manual_seed(1))
    # Of each row its last position and one before; the second row is asked for twice.
    rows = torch.tensor([0, 0, 1, 1, 2])
    columns = torch.tensor([lengths[0] - 1, 2, lengths[1] - 1, lengths[1] - 1, lengths[2] - 1])
    return net, ids, rows, columns


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_the_models_own(family, kind):
    net, ids, rows, columns = world(family, kind)
    assert packed.supports(net, {"use_cache": False})
    with torch.no_grad():
        logits, hidden, _ = forward_at(net, ids, rows, columns, use_cache=False)
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        expected = true_logits(net, ids[row, : column + 1])[-1]
        torch.testing.assert_close(logits[i], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.lm_head(hidden), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_the_models_own(family, kind):
    net, ids, rows, columns = world(family, kind)
    logits, _, _ = forward_at(net, ids, rows, columns)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for row, column, weight in zip(rows.tolist(), columns.tolist(), weights, strict=True):
        (net(input_ids=ids[row : row + 1, : column + 1]).logits[0, -1] * weight).sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointed_blocks_run_twice_and_have_the_same_gradients(family, monkeypatch):
    calls, apply_linear = [], blocks.apply_linear
    monkeypatch.setattr(blocks, "apply_linear", lambda *arguments: calls.append(0) or apply_linear(*arguments))
    gradients, counts = [], []
    for checkpointed in (False, True):
        net, ids, rows, columns = world(family, "packed")
        if checkpointed:
            blocks.checkpoint_blocks(net)
            assert packed.supports(net, {})  # or the blocks would not be asked
        hidden = packed.packed_hidden(net, ids, rows, columns)
        before = len(calls)
        hidden.square().sum().backward()
        counts.append((before, len(calls) - before))
        calls.clear()
        gradients.append([p.grad for p in net.parameters()])
    (forward, again), twice = counts
    assert again == 0 and twice == (forward, forward)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_checkpointing_is_refused_where_it_would_do_nothing():
    with pytest.raises(ValueError, match="gradient_checkpointing must be False for a model that is no plain GPT-2"):
        blocks.checkpoint_blocks(new_model("gemma2-mixed-softcap"))


def test_nothing_beyond_what_is_asked_for_matters():
    net, ids, rows, columns = world("gpt2", "rectangle")
    before = forward_at(net, ids, rows, columns)[0]
    ids[:, int(columns.max()) + 1 :] = 0
    ids[2, int(columns[4]) + 1 :] = 1
    torch.testing.assert_close(forward_at(net, ids, rows, columns)[0], before, atol=0, rtol=0)


def test_what_the_model_does_otherwise_is_left_to_it():
    net = new_model("gpt2")
    assert packed.supports(net, {}) and packed.supports(net, {"use_cache": False, "attention_mask": None})
    assert not packed.supports(net, {"attention_mask": torch.ones(1, 1)})
    assert not packed.supports(new_model("gptneo"), {}) and not packed.supports(new_model("lstm"), {})
    net.train()
    assert not packed.supports(net, {})  # GPT-2's dropout is .1 while it trains
    llama = new_model("llama").train()
    assert packed.supports(llama, {})
    getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)()
    assert not packed.supports(llama, {})
    eager = new_model("llama")
    eager.set_attn_implementation("eager")
    assert not packed.supports(eager, {})
    hooked = new_model("llama")
    hooked.model.layers[0].register_forward_hook(lambda *args: None)
    assert not packed.supports(hooked, {})


def test_attention_dropout_is_left_to_the_model():
    llama = new_model("llama").train()
    llama.model.layers[0].self_attn.attention_dropout = 0.1
    assert not packed.supports(llama, {}) and packed.supports(llama.eval(), {})


@pytest.mark.parametrize("most_scores", [512, 0], ids=["two products", "fused"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_attention_in_bfloat16_is_attention(num_rows, key_heads, window, most_scores, monkeypatch):
    """Values and gradients against the formula in float64, of queries that share keys, with and without a window."""
    monkeypatch.setattr(packed, "MOST_SCORES_PER_QUERY", most_scores)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (
        # Laid out as projections give it: a single row's heads lie between each other's tokens.
        torch.randn(num_rows, 7, heads, 8, generator=generator).bfloat16().transpose(1, 2)
        for heads in (4, key_heads, key_heads, 4)
    )
    distance = torch.arange(7)[:, None] - torch.arange(7)
    seen = (distance >= 0) & (distance < (window or 7))
    found = [part.clone().requires_grad_() for part in (q, k, v)]
    out = packed._bfloat16_attention(*found, None if window is None else seen, 0.4)
    (out * weights).float().sum().backward()
    exact = [part.double().requires_grad_() for part in (q, k, v)]
    keys, values = (part.repeat_interleave(4 // key_heads, 1) for part in exact[1:])
    scores = (0.4 * exact[0] @ keys.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1) @ values
    (expected * weights.double()).sum().backward()
    assert out.dtype == torch.bfloat16
    for ours, right in [(out, expected), *zip((x.grad for x in found), (x.grad for x in exact), strict=True)]:
        error = (ours.double() - right).abs().max() / right.abs().max()
        assert error < 2e-2
