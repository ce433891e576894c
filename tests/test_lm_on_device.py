"""The loop for a GPU, run where the tests run: the same responses, and a step that asks the device nothing."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from lm_models import model, new_model, sequences

from rlhf_gym.lm import Recompute, TokenFilter, generate, graphs, make_engine
from rlhf_gym.lm.generate import _generate_on_device
from rlhf_gym.lm.lean import LeanKV
from rlhf_gym.lm.on_device import DeviceLoop, Flags

PROMPTS = [prompt for prompt in sequences(3, 1, 7, 4, 9, 12, 2, 5, 6) for _ in range(2)]
R, EOS = 16, (0, 5, 11)
UNIFORMS = torch.rand(len(PROMPTS), R, generator=torch.Generator().manual_seed(0))
TOP_K = TokenFilter(temperature=0.8, top_k=4)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def values_of(hidden):
    return hidden.mean(-1)


def responses_on_device(engines, prompts=PROMPTS, uniforms=UNIFORMS, token_filter=None, progress=None):
    loop = DeviceLoop(engines, prompts, R, EOS, uniforms, token_filter or TokenFilter(), values_of)
    return _generate_on_device(loop, [len(prompt) for prompt in prompts], progress)


def close(found, expected):
    for name in ("response_ids", "response_mask", "ended_by_eos"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    for name in ("logprobs", "values"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("family", ["gpt2", "mistral-window", "gemma3-mixed", "lstm"])
def test_the_same_responses_as_on_a_cpu(family, num_rows):
    engine = make_engine(model(family), num_rows, 27)
    expected = generate(
        engine, PROMPTS, max_response_tokens=R, eos_token_ids=EOS, uniforms=UNIFORMS, value_fn=values_of
    )
    assert len(set(expected.response_mask.sum(1).tolist())) > 3  # or rows would not be refilled out of step
    engine.invalidate()
    counted = []
    close(responses_on_device([engine], progress=counted.append), expected)
    assert sum(counted) == expected.response_mask.sum()


@pytest.mark.parametrize("uniforms", [None, UNIFORMS], ids=["greedy", "sampled"])
@pytest.mark.parametrize("token_filter", [TOP_K, TokenFilter(allowed_tokens=(1, 2, 3, 4, 5))], ids=["top-k", "allowed"])
def test_the_same_responses_of_a_filter(uniforms, token_filter):
    engines = [make_engine(model("llama"), 4, 27), make_engine(new_model("llama", seed=1), 4, 27)]
    expected = generate(
        engines[0], PROMPTS, max_response_tokens=R, eos_token_ids=EOS, uniforms=uniforms, value_fn=values_of,
        token_filter=token_filter, reference_engine=engines[1],
    )  # fmt: skip
    used = engines if token_filter.uses_reference else engines[:1]
    close(responses_on_device(used, uniforms=uniforms, token_filter=token_filter), expected)


def test_the_host_reads_flags_while_the_next_step_runs(monkeypatch):
    events = []
    step, read = DeviceLoop.step, Flags.read
    monkeypatch.setattr(DeviceLoop, "step", lambda *args: events.append("step") or step(*args))
    monkeypatch.setattr(Flags, "read", lambda self: events.append("read") or read(self))
    responses_on_device([make_engine(model("gpt2"), 40, 27)])
    assert events == ["step"] + ["step", "read"] * (len(events) // 2)


def test_broken_weights_are_told():
    broken = copy.deepcopy(model("gpt2"))
    torch.nn.init.constant_(broken.transformer.ln_f.bias, torch.nan)
    with pytest.raises(ValueError, match="weights are NaN"):
        responses_on_device([LeanKV(broken, 4, 27)])


def meta(family, engine_class=LeanKV):
    """An engine without any data: whatever asks for a number fails, as it would make a host wait for its GPU.

    (A GPU waits at some other times too, when it is given a number; only on one can that be seen.)
    """
    net = copy.deepcopy(model(family))
    net.set_attn_implementation("eager")  # transformers' mask for the other looks at the data; only at construction
    return engine_class(net.to("meta"), 4, 27)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-window", "qwen3"])
def test_a_step_asks_the_device_nothing(family):
    loop = DeviceLoop([meta(family)], PROMPTS, R, EOS, UNIFORMS, TokenFilter(), values_of)
    loop.fill([0, 1, 2], [0, 1, 2], 3)
    for longest in (4, 5):
        loop.step(longest)
    loop.fill([2], [3], 1)
    assert loop.response_ids.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):  # and it would be noticed
        loop.busy.tolist()


def test_an_engine_that_asks_is_noticed():
    engine = meta("gpt2", Recompute)  # which computes what is active, and must know which rows are
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        engine.advance(torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), 3)


def test_nothing_to_do():
    empty = torch.zeros(0, R)
    found = generate(LeanKV(model("gpt2"), 2, 27), [], max_response_tokens=R, eos_token_ids=EOS, uniforms=empty)
    assert found.response_ids.shape == (0, R)


@pytest.mark.parametrize("family", ["gpt2", "gemma3-mixed", "lstm"])
def test_a_step_of_no_row_changes_nothing(family):
    """The last step of a loop, and the warming up of a graph."""
    for engine_class in {type(make_engine(model(family), 4, 27)), Recompute}:
        engine = engine_class(model(family), 4, 27)
        ids = torch.stack(sequences(5, 5, 5, 5))
        engine.prefill(torch.arange(4), ids, torch.tensor([5, 4, 3, 2]))
        before = engine.snapshot()
        engine._advance(torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool), 8)
        for name, tensor in engine.snapshot().items():
            held = [slice(None)] * tensor.dim()
            if name.startswith(("keys", "values")):
                held[2] = slice(engine.max_tokens)  # but for the spare column
            assert torch.equal(tensor[tuple(held)], before[name][tuple(held)]), name


class OnTheHost(graphs.StepGraphs):
    """Graphs that are replayed by taking the step that they were captured from."""

    def _capture(self, step, longest):
        self.captured = [*getattr(self, "captured", []), longest]
        return SimpleNamespace(replay=lambda: step(self._tokens, self._active, longest))


def test_a_graph_for_every_length(monkeypatch):
    monkeypatch.setattr(graphs, "COLUMNS_PER_GRAPH", 8)
    net, seen = torch.nn.Linear(2, 2), []
    made = OnTheHost(2, 20, net, torch.device("cpu"))

    def step(tokens, active, longest):
        seen.append((tokens.tolist(), active.tolist(), longest))

    def call(token, longest):
        made(step, torch.tensor([token, 0]), torch.tensor([True, False]), longest)

    for token, longest in enumerate((1, 8, 9, 16, 17, 20, None, 3)):
        call(token, longest)
    assert seen == [([token, 0], [True, False], asked) for token, asked in enumerate((8, 8, 16, 16, 20, 20, 20, 8))]
    assert made.captured == [8, 16, 20]
    net.weight.data.mul_(2)
    call(0, 8)
    assert made.captured == [8, 16, 20]
    old = net.weight.data  # held, so that the new ones cannot have its place
    net.weight.data = old.clone()
    call(0, 8)
    call(0, 8)
    assert made.captured == [8, 16, 20, 8]


def on_both(net, engine):
    """An engine on a GPU gives what one on the CPU does with a copy of its model."""
    expected = generate(
        make_engine(copy.deepcopy(net).cpu(), 4, 27), PROMPTS, max_response_tokens=R, eos_token_ids=EOS,
        uniforms=UNIFORMS, value_fn=values_of,
    )  # fmt: skip
    engine.invalidate()
    close(responses_on_device([engine]), expected)


@on_gpu
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-window", "qwen3"])
def test_graphs_say_what_the_steps_say(family, monkeypatch):
    monkeypatch.setattr(graphs, "COLUMNS_PER_GRAPH", 8)
    net = copy.deepcopy(model(family)).cuda()
    engine, other = make_engine(net, 4, 27), make_engine(net, 4, 27)
    assert type(engine) is LeanKV
    on_both(net, engine)
    assert len(engine._graphs._graphs) > 1
    # Weights that change in place are read, and those that move as well.
    net.get_output_embeddings().weight.data.mul_(1.1)
    on_both(net, engine)
    kept = [parameter.data for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.05
    assert not {data.data_ptr() for data in kept} & {parameter.data_ptr() for parameter in net.parameters()}
    on_both(net, engine)
    # What one engine leaves behind when it goes is nothing that another needs.
    on_both(net, other)
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    on_both(net, other)


@on_gpu
def test_the_host_does_not_wait():
    engine = make_engine(copy.deepcopy(model("gpt2")).cuda(), 4, 27)
    responses_on_device([engine])  # all graphs are there
    engine.invalidate()
    loop = DeviceLoop([engine], PROMPTS, R, EOS, UNIFORMS, TokenFilter(), values_of)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.fill([0, 1, 2], [0, 1, 2], 3)
        loop.step(4)
        loop.fill([2], [3], 1)
        loop.step(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
