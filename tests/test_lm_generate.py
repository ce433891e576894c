"""Generation: what is recorded is what a plain forward says, and no response depends on how rows were shared out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lm_models import V, model, new_model, sequences, true_logits

from rlhf_gym.lm import Recompute, TokenFilter, generate, load_language_model, make_engine

STORIES = Path(__file__).parents[1].parent / "shared/assets/models/stories260K"
PROMPTS = sequences(3, 1, 7, 4, 9, 12, 2, 2, 5, 5, 6)
R, EOS = 16, (0, 5, 11)
UNIFORMS = torch.rand(len(PROMPTS), R, generator=torch.Generator().manual_seed(0))
FAMILIES = ["gpt2", "mistral-window", "gemma3-mixed", "lstm"]


def run(family, num_rows=4, **changes):
    arguments = {"max_response_tokens": R, "eos_token_ids": EOS, "uniforms": UNIFORMS} | changes
    return generate(make_engine(model(family), num_rows, 27), PROMPTS, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logprobs_are_those_of_a_plain_forward(family):
    responses = run(family)
    for b, prompt in enumerate(PROMPTS):
        response = responses.response_ids[b][responses.response_mask[b]]
        logprobs = true_logits(model(family), torch.cat([prompt, response])).log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = logprobs.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(responses.logprobs[b, : len(response)], chosen, rtol=0, atol=1e-5)
        # And each token is the one that its uniform number picks from the plain forward's distribution.
        cumulative = logprobs.double().exp().cumsum(-1)
        for t, token in enumerate(response):
            below = cumulative[t, token - 1] if token else 0.0
            assert below - 1e-5 <= UNIFORMS[b, t] <= cumulative[t, token] + 1e-5
    assert (responses.logprobs[~responses.response_mask] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_refilling_rows_changes_nothing(family):
    together = run(family, num_rows=len(PROMPTS))
    assert len(set(together.response_mask.sum(1).tolist())) > 3  # or nothing was refilled out of step
    for num_rows in (1, 3, 20):
        again = run(family, num_rows=num_rows)
        for name in ("response_ids", "response_mask", "ended_by_eos"):
            assert torch.equal(getattr(again, name), getattr(together, name)), name
        torch.testing.assert_close(again.logprobs, together.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_samples_of_a_prompt_compute_it_once(family):
    """Given as one tensor each prompt is computed once; given as equal tensors each time, with the same responses."""
    engine = make_engine(model(family), 6, 27)
    prefill, rows = engine.prefill, []
    engine.prefill = lambda *arguments: rows.append(len(arguments[0])) or prefill(*arguments)
    found = []
    for prompts in (
        [prompt for prompt in PROMPTS[:3] for _ in range(2)],
        [prompt.clone() for prompt in PROMPTS[:3] for _ in range(2)],
    ):
        uniforms = UNIFORMS[: len(prompts)]
        found.append(
            generate(engine, prompts, max_response_tokens=R, eos_token_ids=EOS, uniforms=uniforms, value_fn=values_of)
        )
    assert rows == [3, 6]
    assert torch.equal(found[0].response_ids, found[1].response_ids)
    assert not torch.equal(found[0].response_ids[0], found[0].response_ids[1])
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0].values, found[1].values, rtol=0, atol=1e-5)


def values_of(hidden):
    return hidden.sum(-1)


def test_a_response_does_not_depend_on_the_others():
    together = run("gpt2")
    engine = make_engine(model("gpt2"), 4, 27)
    for b in (0, 4, 10):
        alone = generate(
            engine, PROMPTS[b : b + 1], max_response_tokens=R, eos_token_ids=EOS, uniforms=UNIFORMS[b : b + 1]
        )
        assert torch.equal(alone.response_ids[0], together.response_ids[b])


def test_where_responses_end():
    responses = run("gpt2")
    lengths = responses.response_mask.sum(1)
    assert responses.ended_by_eos.any() and not responses.ended_by_eos.all()
    for b, length in enumerate(lengths.tolist()):
        response = responses.response_ids[b]
        assert responses.response_mask[b].tolist() == [True] * length + [False] * (
            R - length
        )  # one piece from the start
        assert not set(response[: length - 1].tolist()) & set(EOS)
        assert responses.ended_by_eos[b] == (response[length - 1].item() in EOS)
        assert length == R or responses.ended_by_eos[b]
        assert (response[length:] == min(EOS)).all()


def test_no_token_ends_a_response():
    responses = run("gpt2", eos_token_ids=())
    assert responses.response_mask.all() and not responses.ended_by_eos.any()


def test_the_padding_id_may_be_the_eos_id():
    """Only lengths tell padding from tokens: rows filled up with EOS, and prompts that hold EOS, are as good."""
    prompts = [torch.tensor([0, 3]), torch.tensor([4, 0, 0, 7, 0]), torch.tensor([0])]
    engine = make_engine(model("gpt2"), 2, 12)
    responses = generate(engine, prompts, max_response_tokens=6, eos_token_ids=(0,), uniforms=UNIFORMS[:3, :6])
    for b, prompt in enumerate(prompts):
        response = responses.response_ids[b][responses.response_mask[b]]
        logprobs = true_logits(model("gpt2"), torch.cat([prompt, response])).log_softmax(-1)[len(prompt) - 1 : -1]
        found = responses.logprobs[b, : len(response)]
        torch.testing.assert_close(found, logprobs.gather(1, response[:, None])[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family):
    responses = run(family, uniforms=None)
    for b in (1, 5):
        row = PROMPTS[b]
        for token in responses.response_ids[b][responses.response_mask[b]]:
            assert token == true_logits(model(family), row)[-1].argmax()
            row = torch.cat([row, token[None]])


def test_filters_look_at_the_reference():
    policy, reference = model("llama"), new_model("llama", seed=1)
    token_filter = TokenFilter(temperature=0.8, top_k=4, top_p=0.95)
    engines = [make_engine(net, 3, 27) for net in (policy, reference)]
    responses = generate(
        engines[0], PROMPTS, max_response_tokens=R, eos_token_ids=EOS, uniforms=UNIFORMS,
        token_filter=token_filter, reference_engine=engines[1],
    )  # fmt: skip
    for b, prompt in enumerate(PROMPTS):
        response = responses.response_ids[b][responses.response_mask[b]]
        row = torch.cat([prompt, response])
        for t, token in enumerate(response):
            logits, judged = (true_logits(net, row[: len(prompt) + t])[-1] / 0.8 for net in (policy, reference))
            likeliest = judged.topk(4)
            probs = likeliest.values.softmax(-1)
            allowed = [v for i, v in enumerate(likeliest.indices.tolist()) if probs[:i].sum() < 0.95]
            assert token in allowed
            expected = logits[token] - logits[allowed].logsumexp(0)
            torch.testing.assert_close(responses.logprobs[b, t], expected, rtol=0, atol=1e-5)


def test_only_allowed_tokens_are_chosen():
    responses = run("gpt2", token_filter=TokenFilter(allowed_tokens=(3, 4, 5)))
    assert set(responses.response_ids[responses.response_mask].tolist()) == {3, 4, 5}


def test_values_belong_to_the_state_before_the_token():
    """With "the hidden state's first entry" as value function; off by one would be found."""
    family = "llama"
    net = model(family)
    responses = run(family, value_fn=lambda hidden: hidden[:, 0], num_rows=3)
    for b, prompt in enumerate(PROMPTS):
        response = responses.response_ids[b][responses.response_mask[b]]
        with torch.no_grad():
            hidden = net.model(input_ids=torch.cat([prompt, response])[None]).last_hidden_state[0, :, 0]
        expected = hidden[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        torch.testing.assert_close(responses.values[b, : len(response)], expected, rtol=0, atol=1e-5)
        assert (responses.values[b, len(response) :] == 0).all()


def test_progress_counts_every_token():
    seen = []
    responses = run("gpt2", progress=seen.append)
    assert sum(seen) == responses.response_mask.sum()


def test_an_engine_without_a_cache_gives_the_same():
    plain = generate(
        Recompute(model("gpt2"), 4, 27), PROMPTS, max_response_tokens=R, eos_token_ids=EOS, uniforms=UNIFORMS
    )
    assert torch.equal(plain.response_ids, run("gpt2").response_ids)


def test_an_engine_that_is_in_use_keeps_a_true_memo():
    engine = make_engine(model("gpt2"), 3, 27)
    generate(engine, PROMPTS, max_response_tokens=R, eos_token_ids=EOS, uniforms=UNIFORMS)
    ids = torch.stack(sequences(4, 4, 4, seed=8))
    logits = engine.next_logits(ids, torch.tensor([4, 2, 3]))
    for b, length in enumerate((4, 2, 3)):
        torch.testing.assert_close(logits[b], true_logits(model("gpt2"), ids[b, :length])[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_response_tokens": 17, "uniforms": None}, r"prompts\[5\] must have from 1 to 11 tokens, so that 17 more"),
        ({"max_response_tokens": 0}, "max_response_tokens must be at least 1, got 0"),
        ({"uniforms": UNIFORMS[:, :3]}, r"uniforms must have .* shape \(11, 16\), got \(11, 3\)"),
        ({"token_filter": TokenFilter(top_k=2)}, "reference_engine must be given"),
    ],
)
def test_what_cannot_be_generated_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        run("gpt2", **changes)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"prompts\[1\] must have from 1 to .*; it has 0"):
        generate(make_engine(model("gpt2"), 2, 9), [torch.tensor([1]), torch.tensor([], dtype=torch.long)],
                 max_response_tokens=2, eos_token_ids=(), uniforms=None)  # fmt: skip


def test_one_token_responses_and_no_prompts():
    responses = run("gpt2", max_response_tokens=1, uniforms=UNIFORMS[:, :1])
    assert responses.response_mask.all() and responses.logprobs.max() < 0
    engine = make_engine(model("gpt2"), 2, 9)
    assert generate(engine, [], max_response_tokens=3, eos_token_ids=(), uniforms=None).response_ids.shape == (0, 3)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real model is not here")
def test_a_real_model_tells_its_story():
    """Its greedy text is known (llama2.c, doc/stories260K.md), and its recorded log-probs are a plain forward's."""
    stories = load_language_model(STORIES)
    engine = make_engine(stories, 2, 200)
    start = torch.tensor([stories.bos_token_id])
    told = generate(engine, [start], max_response_tokens=199, eos_token_ids=stories.eos_token_ids, uniforms=None)
    text = stories.tokenizer.decode(told.response_ids[0][told.response_mask[0]], skip_special_tokens=True)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
    logits = stories.model(input_ids=torch.cat([start, told.response_ids[0]])[None]).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, told.response_ids[0][:, None])[:, 0]
    mask = told.response_mask[0]
    torch.testing.assert_close(told.logprobs[0][mask], expected[mask], rtol=0, atol=1e-5)


def test_uniform_frequencies_over_whole_responses():
    """Two-token responses of a model whose logits are all equal: each of the V^2 is as likely."""
    net = new_model("gpt2")
    torch.nn.init.zeros_(net.lm_head.weight)  # tied to the embedding: every position is the same too
    count = 4000
    uniforms = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    prompts = [torch.tensor([1])] * count
    responses = generate(make_engine(net, 500, 3), prompts, max_response_tokens=2, eos_token_ids=(), uniforms=uniforms)
    torch.testing.assert_close(responses.logprobs, torch.full((count, 2), -math.log(V)))
    assert (responses.response_ids == (uniforms * V).floor()).float().mean() > 0.999
