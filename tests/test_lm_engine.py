"""The engines: whatever is done to the rows, the logits are those of a plain forward of each row alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_models import CONTEXT, FAMILIES, WINDOW, V, model, new_model, sequences, true_logits
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_gym.lm import Engine, LanguageModel, RaggedKV, Recompute, Recurrent, make_engine, pad_sequences
from rlhf_gym.lm.lean import LeanKV

TOLERANCE = 1e-5
CACHED = [family for family in FAMILIES if family != "gptneo"]


def close(found, expected, tolerance=TOLERANCE):
    # Relative as well: logits of these models go up to ten, where float32 itself is only good to 1e-6.
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def prefill(engine, rows):
    ids, lengths = pad_sequences(rows)
    return engine.prefill(torch.arange(len(rows)), ids, lengths)


@pytest.mark.parametrize("family", CACHED)
def test_prefill_and_ragged_decode_equal_each_row_alone(family):
    net = model(family)
    engine = make_engine(net, 4, 24)
    assert not isinstance(engine, Recompute)
    rows = sequences(1, 3, 8, 2 * WINDOW + 1)
    logits = prefill(engine, rows)
    for b, row in enumerate(rows):
        close(logits[b], true_logits(net, row)[-1])
    # Each row moves in a rhythm of its own: b misses every (b + 2)-th step.
    for step, token in enumerate(sequences(9, seed=1)[0]):
        active = torch.tensor([step % (b + 2) != 0 for b in range(4)])
        held = engine.snapshot()
        logits = engine.decode(token.expand(4).clone(), active)
        for b in active.nonzero()[:, 0].tolist():
            rows[b] = torch.cat([rows[b], token[None]])
            close(logits[b], true_logits(net, rows[b])[-1])
        now = engine.snapshot()
        for name in ("n", "ids", "logits", "hidden"):
            assert torch.equal(now[name][~active], held[name][~active]), name
    assert engine.n.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("engine_class", [LeanKV, RaggedKV, Recompute])
def test_every_engine_that_can_serve_a_llama_gives_its_logits(engine_class):
    net, rows = model("llama"), sequences(2, 7)
    engine = engine_class(net, 2, 16)
    prefill(engine, rows)
    logits = engine.decode(torch.tensor([3, 4]), torch.tensor([True, True]))
    for b, token in enumerate((3, 4)):
        close(logits[b], true_logits(net, torch.cat([rows[b], torch.tensor([token])]))[-1])


def test_which_engine_serves_what():
    expected = {"gpt2": LeanKV, "mistral-window": LeanKV, "gemma3-mixed": RaggedKV, "lstm": Recurrent}
    assert {family: type(make_engine(model(family), 1, 8)) for family in expected} == expected


def test_a_hook_in_the_model_is_obeyed():
    net = new_model("gpt2")
    plain = true_logits(net, torch.tensor([1, 2, 3]))
    net.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    engine = make_engine(net, 1, 8)
    logits = engine.prefill(torch.tensor([0]), torch.tensor([[1, 2, 3]]), torch.tensor([3]))[0]
    close(logits, true_logits(net, torch.tensor([1, 2, 3]))[-1])
    assert (logits - plain[-1]).abs().max() > 0.1


class Adapter(torch.nn.Linear):
    """As LoRA does it: a linear layer with something learned added, at first nothing."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight, self.added = base.weight, torch.nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x):
        return super().forward(x) + x @ self.added.t()


def test_an_adapter_put_in_after_the_first_engine_is_obeyed():
    net = new_model("llama")
    assert type(make_engine(net, 1, 8)) is LeanKV
    attention = net.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    engine = make_engine(net, 1, 8)  # at this moment both forwards agree, so that no proof could tell
    torch.nn.init.normal_(attention.q_proj.added, std=2.0)
    logits = engine.prefill(torch.tensor([0]), torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    close(logits[0], true_logits(net, torch.tensor([1, 2, 3]))[-1])
    with torch.no_grad():
        attention.q_proj.added.zero_()
    assert (logits[0] - true_logits(net, torch.tensor([1, 2, 3]))[-1]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:GPTNeoForCausalLM is run without a cache")
def test_logits_at_keeps_what_the_model_does_after_its_head(family):
    net, rows = model(family), sequences(4, 9, 13)
    ids, lengths = pad_sequences(rows, pad_token_id=V - 1)
    start = torch.tensor([3, 2, 5])
    found = make_engine(net, 1, 16).logits_at(ids, lengths, start, 4)
    for b, row in enumerate(rows):
        positions = (start[b] + torch.arange(4)).clamp(max=len(row) - 1)
        close(found[b], true_logits(net, row)[positions])


@pytest.mark.parametrize("family", ["gpt2", "gemma3-mixed", "lstm"])
def test_last_hidden_is_what_the_head_reads(family):
    net, rows = model(family), sequences(2, 6)
    engine = make_engine(net, 2, 12)
    prefill(engine, rows)
    engine.decode(torch.tensor([1, 1]), torch.tensor([True, False]))
    head = net.get_output_embeddings()
    close(head(engine.last_hidden).detach(), engine.state["logits"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2-mixed-softcap", "lstm"])
def test_a_full_row_disturbs_nobody(family):
    net, rows = model(family), sequences(8, 3)
    engine = make_engine(net, 2, 8)
    prefill(engine, rows)
    before = engine.snapshot()
    for step in range(3):  # row 0 is full: asked to move and not asked to move, it stays what it is
        logits = engine.decode(torch.tensor([5, step]), torch.tensor([step == 1, True]))
        rows[1] = torch.cat([rows[1], torch.tensor([step])])
        close(logits[1], true_logits(net, rows[1])[-1])
    assert engine.n.tolist() == [8, 6]
    for name, tensor in engine.snapshot().items():
        if not name.startswith(("keys", "values")):
            assert torch.equal(tensor[0], before[name][0]), name
        else:  # the spare column is nobody's
            assert torch.equal(tensor[0, :, :8], before[name][0, :, :8]), name


# The memo -------------------------------------------------------------------------------------------------------------

edits = st.lists(
    st.tuples(st.sampled_from(["append", "shorten", "replace", "edit", "nothing", "invalidate", "forget"]),
              st.integers(0, 2), st.integers(0, 10**6)),
    min_size=1, max_size=12,
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "lstm"])
@settings(max_examples=12, deadline=None)
@given(edits=edits)
def test_next_logits_under_arbitrary_edits(family, edits):
    net, limit = model(family), 12
    engine = make_engine(net, 3, limit)
    rows = sequences(3, 1, 5)
    for kind, b, number in edits:
        token = torch.tensor([number % V])
        if kind == "append" and len(rows[b]) < limit:
            rows[b] = torch.cat([rows[b], token])
        elif kind == "shorten" and len(rows[b]) > 1:
            rows[b] = rows[b][: 1 + number % (len(rows[b]) - 1)]
        elif kind == "replace":
            rows[b] = sequences(1 + number % limit, seed=number)[0]
        elif kind == "edit":
            rows[b] = rows[b].clone()
            rows[b][number % len(rows[b])] = token
        elif kind == "invalidate":
            engine.invalidate()
        elif kind == "forget":
            engine.forget(torch.tensor([b]))
        needed = torch.tensor([True, number % 2 == 0, number % 3 == 0])
        logits = engine.next_logits(*pad_sequences(rows, pad_token_id=number % V), needed)
        for i in needed.nonzero()[:, 0].tolist():
            close(logits[i], true_logits(net, rows[i])[-1])


class Counting(Recompute):
    """Counts the rows that were filled and the rows that were moved."""

    def __init__(self, *args):
        super().__init__(*args)
        self.filled = self.moved = 0

    def prefill(self, rows, *args):
        self.filled += len(rows)
        return super().prefill(rows, *args)

    def advance(self, tokens, active, longest=None):
        self.moved += int(active.sum())
        super().advance(tokens, active, longest)


def test_next_logits_does_no_more_than_it_must():
    engine = Counting(model("gpt2"), 3, 12)
    rows = sequences(2, 4, 6)
    engine.next_logits(*pad_sequences(rows))
    assert (engine.filled, engine.moved) == (3, 0)
    engine.next_logits(*pad_sequences(rows, pad_token_id=9))  # nothing changed: nothing is done, whatever the padding
    assert (engine.filled, engine.moved) == (3, 0)
    rows = [torch.cat([row, torch.tensor([7])]) for row in rows]
    engine.next_logits(*pad_sequences(rows), torch.tensor([True, False, True]))
    assert (engine.filled, engine.moved) == (3, 2)
    rows[1] = torch.cat([rows[1], torch.tensor([8])])  # two tokens further than what is held
    engine.next_logits(*pad_sequences(rows))
    assert (engine.filled, engine.moved) == (4, 2)


def test_next_logits_refuses_what_has_no_answer():
    engine = make_engine(model("gpt2"), 2, 6)
    with pytest.raises(ValueError, match="lengths must be from 1 to 4.*\\[0\\] in rows \\[1\\]"):
        engine.next_logits(torch.zeros(2, 4, dtype=torch.long), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="max_tokens=6"):
        engine.next_logits(torch.zeros(2, 8, dtype=torch.long), torch.tensor([3, 7]))
    assert engine.n.tolist() == [0, 0]


def test_weights_changed_in_place_are_seen_after_invalidate():
    for family in ("gpt2", "llama", "gemma3-mixed", "lstm"):
        net, rows = new_model(family), sequences(3, 5)
        engine = make_engine(net, 2, 8)
        before = engine.next_logits(*pad_sequences(rows))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.5)
        assert torch.equal(engine.next_logits(*pad_sequences(rows)), before)
        engine.invalidate()
        after = engine.next_logits(*pad_sequences(rows))
        for b, row in enumerate(rows):
            close(after[b], true_logits(net, row)[-1], 1e-4)
        assert (after - before).abs().max() > 0.01


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed", "lstm"])
def test_restore_gives_the_same_stream_again(family):
    engine = make_engine(model(family), 2, 16)
    prefill(engine, sequences(3, 6))
    addresses = {name: tensor.data_ptr() for name, tensor in engine.state.items()}
    held = engine.snapshot()
    everyone = torch.tensor([True, True])
    tokens = sequences(2, 2, 2, 2, seed=3)
    first = [engine.decode(pair, everyone) for pair in tokens]
    for _ in range(2):  # a snapshot survives being restored
        engine.restore(held)
        assert all(torch.equal(a, engine.decode(pair, everyone)) for a, pair in zip(first, tokens, strict=True))
    assert {name: tensor.data_ptr() for name, tensor in engine.state.items()} == addresses


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed", "lstm"])
def test_copied_rows_go_on_independently(family):
    net, rows = model(family), sequences(4, 7, 2)
    engine = make_engine(net, 3, 16)
    prefill(engine, rows)
    engine.copy_rows(torch.tensor([1, 0]), torch.tensor([0, 2]))  # source 0 is overwritten in the same call
    logits = engine.decode(torch.tensor([5, 6, 7]), torch.tensor([True, True, True]))
    for b, (source, token) in enumerate([(1, 5), (1, 6), (0, 7)]):
        close(logits[b], true_logits(net, torch.cat([rows[source], torch.tensor([token])]))[-1])


# The proof ------------------------------------------------------------------------------------------------------------


class LyingCache(LlamaForCausalLM):
    """Right without a cache, a little wrong with one."""

    def forward(self, *args, past_key_values=None, **kwargs):
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits * torch.linspace(1, 1.1, output.logits.shape[-1])
        return output


def test_a_model_whose_cache_lies_is_recomputed_with_one_warning():
    net = LyingCache(LlamaConfig(**FAMILIES["llama"][2])).eval()
    with pytest.warns(UserWarning, match="LyingCache is run without a cache.*logits differ") as caught:
        engine = make_engine(net, 2, 12)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(make_engine(net, 3, 12)) is Recompute  # the verdict stays
        assert type(make_engine(net, 3, 20)) is Recompute  # for more tokens it is proved anew, without another warning
    rows = sequences(2, 5)
    prefill(engine, rows)
    logits = engine.decode(torch.tensor([1, 2]), torch.tensor([True, True]))
    close(logits[1], true_logits(net, torch.cat([rows[1], torch.tensor([2])]))[-1])


def test_the_proof_looks_beyond_the_window(monkeypatch):
    """With its window ignored, a Mistral passes for short sequences and must fail for long ones."""
    monkeypatch.setattr("rlhf_gym.lm.cached.attention_windows", lambda config: {"attention": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(make_engine(new_model("mistral-window"), 1, WINDOW)) is LeanKV
    with pytest.warns(UserWarning, match="RaggedKV: logits differ"):
        assert type(make_engine(new_model("mistral-window"), 1, WINDOW + 4)) is Recompute


def test_gptneo_is_silently_wrong_with_a_cache_and_is_found_out():
    with pytest.warns(UserWarning, match="GPTNeoForCausalLM is run without a cache"):
        engine = make_engine(new_model("gptneo"), 2, 16)
    assert type(engine) is Recompute


def test_a_model_that_is_not_causal_is_refused():
    class Backwards(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids.flip(1), **kwargs)
            output.logits = output.logits.flip(1)
            return output

    with pytest.raises(ValueError, match="Backwards cannot be used: a batch with padding"):
        make_engine(Backwards(LlamaConfig(**FAMILIES["llama"][2])).eval(), 2, 12)


def test_a_second_engine_costs_no_proof(monkeypatch):
    net = new_model("llama")
    make_engine(net, 2, 20)
    monkeypatch.setattr("rlhf_gym.lm.make._objection", lambda *args: pytest.fail("proved again"))
    make_engine(net, 5, 10)
    with pytest.raises(pytest.fail.Exception):
        make_engine(copy.deepcopy(net), 2, 20)  # another model is another question


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match=f"max_tokens must not exceed the model's context of {CONTEXT} tokens, got 41"):
        make_engine(model("gpt2"), 1, CONTEXT + 1)
    assert make_engine(model("lstm"), 1, 1000).max_tokens == 1000


# Modes and precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "part_only"), [("gpt2", False), ("gpt2", True), ("gemma3-mixed", False)])
def test_dropout_never_reaches_an_engine(family, part_only):
    net = new_model(family, attention_dropout=0.5) if family != "gpt2" else new_model(family)
    row = torch.tensor([1, 2, 3, 4])
    expected = true_logits(net, row)[-1]
    net.train()
    list(net.modules())[-1].eval()  # a part that its owner keeps in eval mode
    if part_only:
        net.training = False
    modes = [module.training for module in net.modules()]
    engine = make_engine(net, 1, 8)
    engine.prefill(torch.tensor([0]), row[None, :3], torch.tensor([3]))
    close(engine.decode(row[3:], torch.tensor([True]))[0], expected)
    close(engine.logits_at(row[None], torch.tensor([4]), torch.tensor([3]), 1)[0, 0], expected)
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-window", "gemma3-mixed", "lstm"])
def test_bfloat16(family):
    net, rows = new_model(family).bfloat16(), sequences(3, 9)
    engine = make_engine(net, 2, 16)
    assert not isinstance(engine, Recompute)
    prefill(engine, rows)
    logits = engine.decode(torch.tensor([1, 2]), torch.tensor([True, True]))
    assert logits.dtype == torch.float32
    for b, token in enumerate((1, 2)):
        expected = true_logits(net, torch.cat([rows[b], torch.tensor([token])]))[-1]
        assert (logits[b].log_softmax(-1) - expected.log_softmax(-1)).abs().mean() < 0.05


def test_eager_attention():
    net, rows = new_model("gemma3-mixed"), sequences(3, 9)
    net.set_attn_implementation("eager")
    engine = make_engine(net, 2, 16)
    assert type(engine) is RaggedKV
    prefill(engine, rows)
    logits = engine.decode(torch.tensor([1, 2]), torch.tensor([True, True]))
    close(logits[1], true_logits(net, torch.cat([rows[1], torch.tensor([2])]))[-1])


class Table(Engine):
    """An engine that is no network at all: the next token depends on the last one."""

    def __init__(self, table, num_rows, max_tokens):
        super().__init__(num_rows, max_tokens, len(table))
        self.table = table

    def _prefill(self, rows, ids, lengths):
        return self.table[ids[torch.arange(len(ids)), lengths - 1]], None

    def _decode(self, tokens, active, longest):
        return self.table[tokens], None


def test_the_protocol_is_enough_for_a_table():
    table = torch.randn(5, 5)
    engine = Table(table, 2, 4)
    ids = torch.tensor([[1, 2, 0], [4, 0, 0]])
    assert torch.equal(engine.next_logits(ids, torch.tensor([2, 1])), table[[2, 4]])
    assert torch.equal(engine.next_logits(ids, torch.tensor([3, 1])), table[[0, 4]])
    assert engine.last_hidden is None


def test_a_language_model_is_taken_too():
    net = model("gpt2")
    wrapped = LanguageModel(net, None, "x", V, (0,), 0, None, CONTEXT)
    assert make_engine(wrapped, 1, 4).model is net
