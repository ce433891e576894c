"""Teacher-forced passes: padding, chunks and gradients change nothing."""

from __future__ import annotations

import pytest
import torch
from lm_models import FAMILIES, V, model, new_model, sequences, true_logits

from rlhf_gym.lm import (
    TokenFilter,
    join_responses,
    pad_sequences,
    padded_logits,
    response_logits,
    response_logprobs,
    right_padded,
)

TOLERANCE = 1e-5


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def ragged(lengths, num_tokens, seed=5):
    """Responses of these lengths, with nonsense behind their ends."""
    response_ids = torch.stack(sequences(*[num_tokens] * len(lengths), seed=seed))
    return response_ids, torch.arange(num_tokens) < torch.tensor(lengths)[:, None]


def true_logprobs(net, prompts, response_ids, response_mask):
    """Log-probabilities from one plain forward per row."""
    expected = torch.zeros(response_ids.shape)
    for b, prompt in enumerate(prompts):
        response = response_ids[b][response_mask[b]]
        logprobs = true_logits(net, torch.cat([prompt, response])).log_softmax(-1)
        for t, token in enumerate(response):
            expected[b, t] = logprobs[len(prompt) + t - 1, token]
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_response_logprobs_equal_each_row_alone(family):
    net = model(family)
    prompts = sequences(3, 1, 7, 4, 2)
    response_ids, response_mask = ragged([6, 1, 3, 0, 5], 6)
    expected = true_logprobs(net, prompts, response_ids, response_mask)
    for rows_per_chunk in (None, 1, 2):
        found = response_logprobs(net, prompts, response_ids, response_mask, rows_per_chunk=rows_per_chunk)
        close(found, expected)
        assert (found[~response_mask] == 0).all()


def test_what_stands_after_the_end_changes_nothing_at_all():
    net, prompts = model("llama"), sequences(3, 5)
    response_ids, response_mask = ragged([2, 4], 6)
    other = torch.where(response_mask, response_ids, (response_ids + 1) % V)
    found = [response_logprobs(net, prompts, ids, response_mask) for ids in (response_ids, other)]
    assert torch.equal(*found)


def test_prompts_may_be_lists_and_are_not_changed():
    prompts = [[1, 2, 3], [4]]
    response_ids, response_mask = ragged([2, 3], 3)
    found = response_logprobs(model("gpt2"), prompts, response_ids, response_mask)
    close(found, response_logprobs(model("gpt2"), [torch.tensor(p) for p in prompts], response_ids, response_mask))
    assert prompts == [[1, 2, 3], [4]]


def test_filtered_logprobs_by_hand():
    """Temperature 2 and the reference's three likeliest tokens: the policy renormalised on them."""
    net, reference = model("llama"), new_model("llama", seed=1)
    prompt, response = sequences(4, 1)
    logits = true_logits(net, torch.cat([prompt, response]))[3]
    likeliest = true_logits(reference, torch.cat([prompt, response]))[3].topk(3).indices
    token = likeliest[2:]
    scaled = logits[likeliest] / 2
    expected = scaled[2] - scaled.exp().sum().log()
    found = response_logprobs(
        net, [prompt], token[None], torch.ones(1, 1, dtype=torch.bool),
        token_filter=TokenFilter(temperature=2, top_k=3), reference_model=reference,
    )  # fmt: skip
    close(found[0, 0], expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma2-mixed-softcap", "lstm"])
def test_response_logits_and_their_gradients(family):
    net = new_model(family)
    prompts = sequences(2, 5)
    response_ids, response_mask = ragged([4, 2], 4)
    ids, lengths, prompt_lengths = join_responses(prompts, response_ids, response_mask)
    logits, hidden = response_logits(net, ids, lengths, prompt_lengths - 1, 4)
    head = net.get_output_embeddings()
    assert logits.shape == (2, 4, V) and hidden.shape == (2, 4, head.weight.shape[1])
    for b in range(2):
        row = torch.cat([prompts[b], response_ids[b][response_mask[b]]])
        positions = (prompt_lengths[b] - 1 + torch.arange(4)).clamp(max=len(row) - 1)
        close(logits[b], true_logits(net, row)[positions])
    logits[0].sum().backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    alone = torch.cat([prompts[0], response_ids[0]])
    net(input_ids=alone[None]).logits[0, 1:5].sum().backward()
    for gradient, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_head_sees_response_positions_only():
    net, seen = model("gpt2"), []
    handle = net.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ids, lengths = pad_sequences(sequences(20, 30))
    response_logits(net, ids, lengths, lengths - 4, 3)
    handle.remove()
    assert seen == [(2, 3, V)]
    assert not net.lm_head._forward_pre_hooks


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-window", "gemma3-mixed", "lstm"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side(family, side):
    net, rows, width = model(family), sequences(4, 9, 1), 12
    ids = torch.full((3, width), V - 1)
    mask = torch.zeros(3, width, dtype=torch.long)
    for b, row in enumerate(rows):
        first = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
        ids[b, first : first + len(row)], mask[b, first : first + len(row)] = row, 1
    logits = padded_logits(net, ids, mask)
    for b, row in enumerate(rows):
        close(logits[b][mask[b].bool()].detach(), true_logits(net, row))
    moved, lengths = right_padded(ids, mask)
    assert [moved[b, : lengths[b]].tolist() for b in range(3)] == [row.tolist() for row in rows]


def test_left_padding_without_care_is_wrong():
    """The negative control: the plain call on a left-padded batch is off by far."""
    net, row = model("gpt2"), sequences(4)[0]
    ids, mask = torch.cat([torch.zeros(3, dtype=torch.long), row])[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    plain = net(input_ids=ids, attention_mask=mask).logits[0, 3:]
    assert (plain - true_logits(net, row)).abs().max() > 0.1
    close(padded_logits(net, ids, mask)[0, 3:].detach(), true_logits(net, row))


def test_join_responses_by_hand():
    response_ids, response_mask = torch.tensor([[7, 8, 9], [6, 9, 9]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    ids, lengths, prompt_lengths = join_responses([[1], [2, 3]], response_ids, response_mask, pad_token_id=9)
    assert ids.tolist() == [[1, 7, 8, 9, 9], [2, 3, 6, 9, 9]]
    assert lengths.tolist() == [4, 3] and prompt_lengths.tolist() == [1, 2]
    with pytest.raises(ValueError, match="as many rows, got 1 and 2"):
        join_responses([[1]], response_ids, response_mask)
