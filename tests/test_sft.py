"""Fine-tuning: the loss is that of each example alone, packing leaks nothing, and what is interrupted goes on to the bit."""

from __future__ import annotations

import math
import os
import random
import signal

import gymnasium as gym
import pytest
import torch
from lm_models import V, new_model, true_logits
from lm_models import model as family_model
from safetensors.torch import load_file
from worlds import make_envs, model, tokenizer

from rlhf_gym.lm import load_language_model, scratch
from rlhf_gym.lm.forward import forward_at
from rlhf_gym.lm.lora import lora_off
from rlhf_gym.sft import Example, Ngram, Trainer, can_pack, lay_out, make_trainer, micro_batches, token_losses, train
from rlhf_gym.sft.packing import first_fit

ROWS = [{"prompt": p, "completion": c} for p in ("the cat", "a dog sat", "the") for c in ("good and very good", "bad")]


def random_examples(seed=1, shapes=((12, 1), (5, 2), (7, 3), (3, 1), (9, 4))):
    """Sequences of some lengths with some prompt lengths."""
    draw = random.Random(seed)
    return [Example(tuple(draw.randrange(V) for _ in range(n)), c, float(n - c)) for n, c in shapes]


def true_losses(network, example):
    """-log p of the learnt tokens by a plain forward of the example alone."""
    logprobs = torch.log_softmax(true_logits(network, torch.tensor(example.ids)), -1)
    return torch.stack([-logprobs[t - 1, example.ids[t]] for t in range(example.num_context, len(example.ids))])


def gradients(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


# ---- packing


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-window", "gemma3-mixed", "lstm"])
def test_losses_of_a_batch_are_those_of_each_example_alone(family):
    network, examples = family_model(family), random_examples()
    expected = torch.cat([true_losses(network, example) for example in examples])
    assert len(expected) == 11 + 3 + 4 + 2 + 5
    packs = can_pack(network)
    assert packs == (family != "lstm")
    for pack in {False, packs}:
        assert (token_losses(network, examples, pack=pack) - expected).abs().max() < 1e-5
    if packs:
        assert len(lay_out(examples, pack=True).ids) == 3 < len(examples)  # 11 | 8 + 2 | 6 + 4 positions


def test_a_packed_row_without_borders_would_leak():
    """The negative control: the same rows, but every token sees all before it."""
    network, examples = family_model("llama"), random_examples()
    layout = lay_out(examples, pack=True)
    logits = forward_at(network, layout.ids, layout.rows[None], layout.columns[None])[0][0]
    leaking = torch.nn.functional.cross_entropy(logits, layout.targets, reduction="none")
    assert (leaking - token_losses(network, examples, pack=True)).abs().max() > 0.01


def test_what_an_example_learns_does_not_depend_on_its_neighbours():
    network, examples = new_model("gpt2"), random_examples()
    found = []
    for neighbours in (examples[1:], random_examples(seed=2)[1:]):
        network.zero_grad()
        token_losses(network, [examples[0], *neighbours], pack=True)[: examples[0].num_tokens].sum().backward()
        found.append(gradients(network))
    assert (found[0] - found[1]).abs().max() < 1e-5 < found[0].abs().max()


def test_only_the_response_is_learnt():
    """Whatever prompt tokens *predict* counts for nothing: the gradient is that of the response's losses alone."""
    network, (example,) = new_model("llama"), random_examples(shapes=((8, 5),))
    token_losses(network, [example], pack=False).sum().backward()
    found = gradients(network)
    network.zero_grad()
    logits = network(input_ids=torch.tensor([example.ids])).logits[0]
    torch.nn.functional.cross_entropy(logits[4:7], torch.tensor(example.ids[5:]), reduction="sum").backward()
    assert (found - gradients(network)).abs().max() < 1e-5


def test_rows_are_filled():
    assert first_fit([2, 5, 3, 4], 5) == [[1], [3], [2, 0]]
    assert first_fit([1] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 30))]
        bins = first_fit(lengths, max(lengths))
        assert sorted(i for content in bins for i in content) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in content) <= max(lengths) for content in bins)


def test_without_packing_a_batch_holds_like_lengths():
    examples = random_examples(shapes=tuple((n, 1) for n in (20, 4, 19, 5, 11, 10, 4)))
    parts = [[len(example.ids) for example in part] for part in micro_batches(examples, None, pack=False)]
    assert parts == [[20, 19], [11, 10], [5, 4, 4]]
    assert [len(part) for part in micro_batches(examples, 3, pack=True)] == [3, 3, 1]


# ---- the loss of a step


def uniform_model():
    """A model that knows nothing: all weights 0, so that every token has the probability 1 / V."""
    network = new_model("gpt2")
    for parameter in network.parameters():
        parameter.data.zero_()
    return network


def as_lm(network):
    """A language model over ids alone."""
    lm = load_language_model(model(), tokenizer())
    return type(lm)(**{**vars(lm), "model": network, "vocab_size": V})


def test_measures_by_hand():
    examples = [Example((1, 2, 3, 4), 1, 6.0), Example((5, 6), 1, 2.0)]
    found = Trainer(as_lm(uniform_model()), examples, examples).evaluate()
    assert found["loss"] == pytest.approx(math.log(37)) and found["perplexity"] == pytest.approx(37)
    assert found["bits_per_byte"] == pytest.approx(4 * math.log2(37) / 8)


def test_a_step_minimises_the_mean_over_all_learnt_tokens():
    """Not a mean of the examples' means: 1 and 3 tokens weigh 1 to 3."""
    examples = [Example((1, 2, 3, 4), 1, 0.0), Example((5, 6), 1, 0.0)]
    network = family_model("llama")
    losses = [true_losses(network, example) for example in examples]
    metrics = []
    Trainer(as_lm(new_model("llama")), examples).learn(1, callback=lambda trainer, found: metrics.append(found))
    assert metrics[0]["train/loss"] == pytest.approx((losses[0].sum() + losses[1].sum()).item() / 4, abs=1e-5)
    assert metrics[0]["train/loss"] != pytest.approx((losses[0].mean() + losses[1].mean()).item() / 2, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "lstm"])
def test_micro_batches_and_packing_do_not_change_what_is_learnt(family):
    examples, weights = random_examples(), []
    for size, packs in ((None, True), (2, True), (1, True), (None, False)):
        trainer = Trainer(as_lm(new_model(family)), examples, config=None)
        trainer.config = type(trainer.config)(micro_batch_size=size, batch_size=5, learning_rate=0.01)
        trainer.packs = trainer.packs and packs
        trainer.learn(2)
        assert trainer.num_steps == 2 and trainer.num_timesteps == 2 * 25
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    # Adam divides by the root of the squares: where a gradient is nearly 0 its rounding error is all that it sees.
    assert all((other - weights[0]).abs().mean() < 1e-5 for other in weights[1:])


def test_schedules_by_hand():
    trainer = make_trainer(ROWS, model=model(), tokenizer=tokenizer(), learning_rate=1.0, warmup_share=0.25)
    rates = [trainer._learning_rate(step, 8) for step in range(8)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])  # 2 steps of warm-up
    assert rates[5] == pytest.approx(0.5) and rates[7] == pytest.approx((1 + math.cos(math.pi * 5 / 6)) / 2)
    for schedule, expected in (("linear", 0.5), ("constant", 1.0)):
        trainer = make_trainer(
            ROWS, model=model(), tokenizer=tokenizer(), learning_rate=1.0, lr_schedule=schedule, warmup_share=0.0
        )
        assert trainer._learning_rate(4, 8) == pytest.approx(expected)


def test_every_example_is_seen_once_in_an_epoch():
    trainer = Trainer(as_lm(new_model("lstm")), examples := random_examples())
    trainer.config = type(trainer.config)(batch_size=2)
    epochs = [[trainer._batch(3 * epoch + step) for step in range(3)] for epoch in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [2, 2, 1]
        assert sorted(example.ids for batch in epoch for example in batch) == sorted(e.ids for e in examples)
    assert epochs[0] != epochs[1]


# ---- learning


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_from_scratch_a_language_of_two_lines_is_learnt_to_its_entropy(kind):
    """Three of four lines are "a b", one is "a c": the best loss is H(1/4) / 3 nats, for a, then b or c, then the end."""
    lines = [{"text": "a b"}] * 3 + [{"text": "a c"}]
    words = scratch.train_tokenizer([line["text"] for line in lines], 261)  # two merges
    network = scratch.new_model(kind, words, hidden_size=16, num_layers=1, num_heads=2, max_tokens=8)
    trainer = train(
        lines, model=network, tokenizer=words, num_epochs=150, batch_size=4, learning_rate=0.02, weight_decay=0.0
    )
    found = trainer.evaluate(trainer.examples)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    num_tokens = sum(example.num_tokens for example in trainer.examples)
    assert found["loss"] * num_tokens / 4 == pytest.approx(entropy, abs=0.02)
    assert found["loss"] * num_tokens / 4 >= entropy - 1e-5
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * num_tokens / 4 / math.log(2) / 3)


def test_new_models_and_tokenizers():
    words = scratch.train_tokenizer(["ab ab é"], 260)
    assert len(words) == 260 and words("")["input_ids"] == [words.bos_token_id]
    text = "any text: é, 漢字, \t\n"
    assert words.decode(words(text)["input_ids"], skip_special_tokens=True) == text
    assert scratch.train_tokenizer(["ab ab é"], 260).get_vocab() == words.get_vocab()
    first, second, other = (scratch.new_model("transformer", words, hidden_size=16, seed=s) for s in (0, 0, 1))
    names = first.state_dict()
    assert all(torch.equal(names[n], t) for n, t in second.state_dict().items())
    assert not torch.equal(names["lm_head.weight"], other.state_dict()["lm_head.weight"])
    assert first.config.max_position_embeddings == 256 and first.config.num_hidden_layers == 4
    for arguments, says in (
        ({"kind": "mamba"}, "kind must be one of"),
        ({"hidden_size": 12}, "multiple of 2 \\* num_heads = 8"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            scratch.new_model(**{"kind": "transformer", "tokenizer": words} | arguments)
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        scratch.train_tokenizer(["a"], 258)


# ---- saving and going on


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix == ".safetensors"}


OPTIONS = [{}, {"lora_rank": 2}, {"dtype": "bfloat16"}, {"lora_rank": 2, "dtype": "bfloat16"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["float32", "lora", "bfloat16", "lora-bfloat16"])
def test_killed_and_resumed_is_uninterrupted(tmp_path, options):
    """A child process saves at every step and is killed by SIGKILL after the fourth of six."""

    def trainer():
        return make_trainer(
            ROWS,
            model=model("llama"),
            tokenizer=tokenizer(),
            batch_size=2,
            eval_data=ROWS[:2],
            learning_rate=0.01,
            **options,
        )

    def save_then_die(learner, metrics):
        learner.save(tmp_path / "a")
        if learner.num_steps == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            trainer().learn(2, callback=save_then_die)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    resumed = trainer().restore(tmp_path / "a")
    assert resumed.num_steps == 4 and len(resumed.history) == 1
    unbroken = trainer().learn(2)
    resumed.learn(2).save(tmp_path / "a")
    unbroken.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 2
    assert resumed.history == unbroken.history and resumed.num_timesteps == unbroken.num_timesteps


def test_a_trainer_goes_on_only_with_what_it_began_with(tmp_path):
    def trainer(rows=ROWS, **options):
        return make_trainer(rows, model=model(), tokenizer=tokenizer(), **options)

    trainer().save(tmp_path / "a")
    for other, says in (
        (trainer(ROWS[1:]), "other examples"),
        (trainer(batch_size=3), "other config"),
        (trainer(seed=1), "other seed"),
    ):
        with pytest.raises(ValueError, match=says):
            other.restore(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no trainer_state.json"):
        trainer().restore(tmp_path / "b")


def test_a_saved_model_is_a_model_for_environments(tmp_path):
    trainer = train(ROWS, model=model(), tokenizer=tokenizer(), num_epochs=2, learning_rate=0.01)
    trainer.save(tmp_path / "a")
    env = gym.make(
        "rlhf_gym/TextGeneration-v0",
        model=str(tmp_path / "a"),
        prompts=["the cat"],
        reward="length",
        max_response_tokens=8,
    )
    env.reset(seed=0)
    assert env.step(4)[4]["ref_logprob"] < 0
    loaded = load_language_model(str(tmp_path / "a")).model
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_somebody_elses_reference_is_not_trained():
    envs = make_envs()
    before = {name: t.clone() for name, t in envs.language_model.model.state_dict().items()}
    trainer = train(ROWS, model=envs.language_model, learning_rate=0.1)
    assert all(torch.equal(t, before[name]) for name, t in envs.language_model.model.state_dict().items())
    assert not torch.equal(trainer.model.state_dict()["lm_head.weight"], before["lm_head.weight"])


# ---- LoRA


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft's own loading, at the end
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_learns_and_its_base_does_not(tmp_path, kind):
    base = model(kind)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    ids = torch.tensor([[4, 5, 6, 7]])
    plain = base(input_ids=ids).logits
    trainer = make_trainer(ROWS, model=str(tmp_path / "base"), lora_rank=2, learning_rate=0.01)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert torch.equal(trainer.model(input_ids=ids).logits, plain)  # it begins as its base
    before = trainer.evaluate(trainer.examples)["loss"]
    trainer.learn(20)
    assert trainer.evaluate(trainer.examples)["loss"] < before - 0.1
    adapted = trainer.model(input_ids=ids).logits
    with lora_off(trainer.model):
        assert torch.equal(trainer.model(input_ids=ids).logits, plain)
    trainer.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trained) and all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in saved)
    merged = load_language_model(str(tmp_path / "adapter")).model
    assert type(merged) is type(base) and (merged(input_ids=ids).logits - adapted).abs().max() < 1e-5
    from peft import PeftModel

    assert (PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits - adapted).abs().max() < 1e-5


def test_what_lora_cannot_do_is_said():
    words = tokenizer()
    with pytest.raises(ValueError, match="LSTMForCausalLM has no linear layers"):
        make_trainer(ROWS, model=model("lstm"), tokenizer=words, lora_rank=2)
    with pytest.raises(ValueError, match="lora must be a rank of at least 1, got 0"):
        make_trainer(ROWS, model=model(), tokenizer=words, lora_rank=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rates": 1}, "did you mean 'learning_rate'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"lr_schedule": "step"}, 'lr_schedule must be "cosine"'),
        ({"max_tokens": 33}, "max_tokens must be in 1 to the model's context of 32"),
        ({"eval_share": 0.1, "eval_data": ROWS}, "exclude each other"),
    ],
)
def test_bad_arguments_are_refused(options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make_trainer(ROWS, model=model(), tokenizer=tokenizer(), **options)


# ---- the baseline


def test_the_ngram_by_hand():
    """Two texts, "1 2 3" and "1 2 4" of 5 tokens, D = 1/2, up to trigrams."""
    counted = Ngram([Example((1, 2, 3), 1, 5.0), Example((1, 2, 4), 1, 5.0)], 5, order=3, discount=0.5)
    # No context: 2, 3 and 4 were each seen after one token: 3 types of 3 in all.
    assert counted.probability((), 3) == pytest.approx((0.5 + 0.5 * 3 / 5) / 3)
    assert counted.probability((), 0) == pytest.approx(0.5 * 3 / 5 / 3)
    # After 2, seen after one token each: 3 and 4. After 1 2: 3 and 4, once each.
    after_2 = (0.5 + 0.5 * 2 * (0.5 + 0.5 * 3 / 5) / 3) / 2
    assert counted.probability((2,), 3) == pytest.approx(after_2)
    assert counted.probability((0, 1, 2), 3) == pytest.approx((0.5 + 0.5 * 2 * after_2) / 2)
    # After 1, twice: 2.
    assert counted.probability((1,), 2) == pytest.approx((1.5 + 0.5 * (0.5 + 0.5 * 3 / 5) / 3) / 2)
    found = counted.evaluate([Example((0, 0), 1, 1.0)])
    assert found["loss"] == pytest.approx(-math.log(0.1)) and found["bits_per_byte"] == pytest.approx(math.log2(10))


def test_the_ngram_is_a_distribution():
    counted = Ngram(random_examples(shapes=((40, 1), (30, 5))), V)
    for context in ((), random_examples()[0].ids[:3], (1, 1, 1)):
        assert sum(counted.probability(context, token) for token in range(V)) == pytest.approx(1)
