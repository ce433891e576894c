"""Rewards that are models: a classifier, a reference and an independent language model, against plain transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_gym.lm import load_language_model
from rlhf_gym.rewards import RewardError, RewardInputs, as_reward, classifier, clip, perplexity, reference_logprob

STORIES = Path(__file__).parents[1].parent / "shared/assets/models/stories260K"
WORDS = "the sun sunny ny day is good bad very so".split()
PROMPTS = ["the sun", "the", "the day is", ""]
COMPLETIONS = [" is good", " very very very bad day", "", " sunny"]
INPUTS = RewardInputs(PROMPTS, COMPLETIONS, [[0]] * 4, [[1]] * 4, {})


def word_tokenizer(specials, template=None, **kwargs):
    """Whole words; the ids begin with the special tokens. Nothing like the tokenizer of any policy."""
    vocab = {token: i for i, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        pairs = {token: vocab[token] for token in specials}
        tokenizer.post_processor = processors.TemplateProcessing(special_tokens=list(pairs.items()), **template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=specials[0], **kwargs)


def bert(num_labels=2, **kwargs):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(
        ["[UNK]", "[PAD]", "[CLS]", "[SEP]"],
        {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"},
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        pad_token_id=1,
        num_labels=num_labels,
        initializer_range=0.5,
        **kwargs,
    )
    return BertForSequenceClassification(config).eval(), tokenizer


def gpt2(kind=GPT2ForSequenceClassification, pad=None, **kwargs):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<eos>"], eos_token="<eos>", bos_token="<eos>", **kwargs.pop("tokenizer", {}))
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=pad,
        initializer_range=0.5,
        **kwargs,
    )
    return kind(config).eval(), tokenizer


def ids_of(*words, specials):
    return [specials + WORDS.index(word) for word in words]


@torch.no_grad()
def alone(model, ids, **kwargs):
    return model(input_ids=torch.tensor([ids]), **kwargs).logits[0].double()


def score(spec, inputs=INPUTS):
    return as_reward(spec).score(inputs).total


def rows_alone(model, tokenizer, empty):
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    return torch.stack([alone(model, tokenizer(text)["input_ids"] or [empty]) for text in texts]).numpy()


# ---- classifier


def test_classifier_directory_with_another_tokenizer(tmp_path):
    model, tokenizer = bert(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    logits = rows_alone(model, tokenizer, None)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.ptp(logits[:, 1]) > 0.1, "a constant would prove nothing"

    assert as_reward(str(tmp_path)).names == as_reward(tmp_path).names == ("classifier",)
    np.testing.assert_allclose(score(str(tmp_path)), logits[:, 1], atol=1e-5)
    np.testing.assert_allclose(score(classifier(tmp_path, label="negative")), logits[:, 0], atol=1e-5)
    np.testing.assert_allclose(score(classifier(tmp_path, label=0, output="probability")), softmax[:, 0], atol=1e-5)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_allclose(score({loaded: 2.0}), 2 * logits[:, 1], atol=1e-5)  # a model object finds its tokenizer


def test_classifier_decoder_without_pad_token_batched_equals_alone():
    model, tokenizer = gpt2(num_labels=1)
    with pytest.raises(ValueError, match="no padding token"):  # what stock transformers does with a batch
        model(torch.zeros(2, 3, dtype=torch.long))
    expected = rows_alone(model, tokenizer, 0)[:, 0]
    np.testing.assert_allclose(score(classifier(model, tokenizer)), expected, atol=1e-5)
    assert model.config.pad_token_id is None  # as it was
    sigmoid = 1 / (1 + np.exp(-expected))
    np.testing.assert_allclose(score(classifier(model, tokenizer, output="probability")), sigmoid, atol=1e-5)


def test_classifier_pads_with_the_models_token_not_the_tokenizers():
    # The model pools at the last token that is not its own pad token; the tokenizer's is an ordinary token to it.
    model, tokenizer = gpt2(num_labels=1, pad=0, tokenizer={"pad_token": "so"})
    assert tokenizer.pad_token_id != 0
    np.testing.assert_allclose(score(classifier(model, tokenizer)), rows_alone(model, tokenizer, 0)[:, 0], atol=1e-5)
    padded = tokenizer([p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], padding=True, return_tensors="pt")
    with torch.no_grad():
        naive = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0].numpy()
    assert np.abs(naive - rows_alone(model, tokenizer, 0)[:, 0]).max() > 0.01  # the negative control


def test_classifier_reads():
    model, tokenizer = bert()
    inputs = RewardInputs(["the sun"], ["so good"], [[0]], [[1]], {})
    cls, sep, (the, sun, so, good) = 2, 3, ids_of("the", "sun", "so", "good", specials=4)
    response = alone(model, [cls, so, good, sep])[1]
    np.testing.assert_allclose(score(classifier(model, tokenizer, reads="response"), inputs), response, atol=1e-5)
    pair = [cls, the, sun, sep, so, good, sep]
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    expected, untyped = alone(model, pair, token_type_ids=types)[1], alone(model, pair)[1]
    np.testing.assert_allclose(score(classifier(model, tokenizer, reads="pair"), inputs), expected, atol=1e-5)
    assert abs(expected - untyped) > 1e-3


def test_classifier_truncation():
    model, tokenizer = gpt2(num_labels=1)
    long = RewardInputs(["the"], [" sun is good" + " very" * 10 + " bad"], [[0]], [[1]], {})
    ids = tokenizer(long.prompts[0] + long.completions[0])["input_ids"]
    assert len(ids) == 15 and model.config.n_positions == 12
    left, right = alone(model, ids[-12:])[0], alone(model, ids[:12])[0]
    assert abs(left - right) > 1e-3
    np.testing.assert_allclose(score(classifier(model, tokenizer), long), left, atol=1e-5)
    np.testing.assert_allclose(score(classifier(model, tokenizer, truncation="right"), long), right, atol=1e-5)
    five = classifier(model, tokenizer, max_tokens=5)
    np.testing.assert_allclose(score(five, long), alone(model, ids[-5:])[0], atol=1e-5)
    with pytest.raises(RewardError, match="row 0 has 15 tokens, more than the 12 that the classifier reads"):
        score(classifier(model, tokenizer, truncation="error"), long)
    assert tokenizer.truncation_side == "right"  # the caller's own stays as it was


def test_classifier_limit_of_models_that_count_positions_from_their_pad_token():
    config = RobertaConfig(
        vocab_size=14,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=10,
        pad_token_id=1,
        num_labels=1,
    )
    model, tokenizer = RobertaForSequenceClassification(config), bert()[1]
    long = RewardInputs(["the"], [" very" * 30], [[0]], [[1]], {})
    reward = classifier(model, tokenizer)
    assert reward.max_tokens == 8 and np.isfinite(score(reward, long)).all()  # positions 2..9 of the table
    with pytest.raises(RewardError, match="raised"):
        score(classifier(model, tokenizer, max_tokens=9), long)


def test_classifier_never_drops_out_and_never_changes():
    model, tokenizer = bert(hidden_dropout_prob=0.5)
    before = copy.deepcopy(model.state_dict())
    reward = classifier(model, tokenizer)
    expected = score(reward)
    model.train()
    np.testing.assert_array_equal(score(reward), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert copy.deepcopy(reward) is reward


def test_classifier_labels():
    three = {0: "neg", 1: "neutral", 2: "Positive"}
    model, tokenizer = bert(num_labels=3, id2label=three, label2id={v: k for k, v in three.items()})
    assert classifier(model, tokenizer).label == 2 and classifier(model, tokenizer, label="NEUTRAL").label == 1
    turned = {0: "POSITIVE", 1: "NEGATIVE"}
    model, tokenizer = bert(id2label=turned, label2id={v: k for k, v in turned.items()})
    assert classifier(model, tokenizer).label == 0
    model, tokenizer = bert(num_labels=3)
    with pytest.raises(ValueError, match=r"label must be given .*0: 'LABEL_0', 1: 'LABEL_1', 2: 'LABEL_2'"):
        classifier(model, tokenizer)
    for label in ("LABEL_7", 3, -1, True):
        with pytest.raises(ValueError, match=rf"label must be one of the model's .*, got {label!r}"):
            classifier(model, tokenizer, label=label)


def test_classifier_errors(tmp_path):
    model, tokenizer = gpt2(GPT2LMHeadModel)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is a language model; use perplexity"):
        classifier(model, tokenizer)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="no trained sequence classifier, it has no weights score.weight"):
        as_reward(str(tmp_path / "lm"))  # transformers alone would make up a random head
    model, tokenizer = bert()
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="there is no tokenizer in .*bare"):
        classifier(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"tokenizer must be given .*classifier\(model, tokenizer\)"):
        as_reward(model)
    small, _ = gpt2(num_labels=1)
    with pytest.raises(ValueError, match="token id 13, but the model's vocabulary is 11"):
        classifier(small, tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' cannot be loaded as a sequence classifier"):
        as_reward(tmp_path / "empty")
    for arguments in ({"output": "logits"}, {"reads": "all"}, {"truncation": "both"}, {"max_tokens": 0}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"classifier: {name} must be"):
            classifier(model, tokenizer, **arguments)


# ---- language models


@torch.no_grad()
def mean_logprob(model, context, response):
    """By the loss of plain transformers: the mean negative log-likelihood of the labels that are not -100."""
    ids = torch.tensor([[*context, *response]])
    labels = torch.tensor([[-100] * len(context) + response])
    return -model(input_ids=ids, labels=labels).loss.item()


def test_perplexity_equals_the_loss_of_transformers():
    model, tokenizer = gpt2(GPT2LMHeadModel)
    w = lambda *words: ids_of(*words, specials=1)  # noqa: E731
    eos = 0
    expected = [
        mean_logprob(model, w("the", "sun"), w("is", "good")),
        mean_logprob(model, w("the"), w("very", "very", "very", "bad", "day")),
        -math.log(11),  # nothing written: a uniform guess over 11 tokens
        mean_logprob(model, [eos], w("sunny")),  # no prompt: it starts as documents do
    ]
    reward = perplexity(model, tokenizer)
    np.testing.assert_allclose(score(reward), expected, atol=1e-5)
    np.testing.assert_allclose(score(perplexity(model, tokenizer, log=False)), -np.exp(-np.array(expected)), rtol=1e-5)
    assert as_reward(reward).names == ("perplexity",)


def test_perplexity_merges_at_the_seam():
    model, tokenizer = gpt2(GPT2LMHeadModel)
    inputs = RewardInputs(["the sun"], ["ny day"], [[0]], [[1]], {})  # together: the sunny day
    the, sunny, day = ids_of("the", "sunny", "day", specials=1)
    np.testing.assert_allclose(
        score(perplexity(model, tokenizer), inputs), mean_logprob(model, [the], [sunny, day]), atol=1e-5
    )


def test_perplexity_keeps_the_tokenizers_bos_and_drops_its_eos():
    template = {"single": "<eos> $A <bos>"}  # odd on purpose: the first is put before, the second after a text
    tokenizer = word_tokenizer(["<eos>", "<bos>"], template, eos_token="<bos>")
    model = gpt2(GPT2LMHeadModel)[0]
    model.resize_token_embeddings(12)
    model.generation_config.eos_token_id = 1
    inputs = RewardInputs(["the"], [" sun"], [[0]], [[1]], {})
    the, sun = ids_of("the", "sun", specials=2)
    expected = mean_logprob(model, [0, the], [sun])
    np.testing.assert_allclose(score(perplexity(model, tokenizer), inputs), expected, atol=1e-5)


def test_perplexity_beyond_the_context():
    model, tokenizer = gpt2(GPT2LMHeadModel)
    very, bad = ids_of("very", "bad", specials=1)
    inputs = RewardInputs(["very " * 20], ["bad"], [[0]], [[1]], {})  # the prompt gives way
    expected = mean_logprob(model, [very] * 11, [bad])
    np.testing.assert_allclose(score(perplexity(model, tokenizer), inputs), expected, atol=1e-5)
    with pytest.raises(RewardError, match="a response of 12 tokens does not fit the context of 12 tokens"):
        score(perplexity(model, tokenizer), RewardInputs(["very"], [" very" * 12], [[0]], [[1]], {}))


@pytest.mark.skipif(not STORIES.exists(), reason="real model not present")
def test_perplexity_of_a_real_model():
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    prompt, good, bad = "Once upon a time, there was a", " little girl named Lily.", " table above purple of jump."
    context = tokenizer(prompt)["input_ids"]
    full = tokenizer(prompt + good)["input_ids"]
    assert full[: len(context)] == context
    inputs = RewardInputs([prompt] * 2, [good, bad], [[0]] * 2, [[1]] * 2, {})
    scores = score(perplexity(str(STORIES)), inputs)
    np.testing.assert_allclose(scores[0], mean_logprob(model, context, full[len(context) :]), atol=1e-4)
    assert scores[0] > scores[1] + 1


def test_reference_logprob():
    model, tokenizer = gpt2(GPT2LMHeadModel)
    lm = load_language_model(model, tokenizer)
    prompt_ids, completion_ids = [[1, 2], [3], [4, 5, 6]], [[7, 8, 0], [9], []]
    inputs = RewardInputs(["a", "b", "c"], ["d", "e", ""], prompt_ids, completion_ids, {})

    def by_hand(prompt, response):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        return sum(logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(response))

    expected = np.array([by_hand(p, r) for p, r in zip(prompt_ids, completion_ids, strict=True)])
    reward = as_reward({"reference_logprob": 2.0, "length": 1.0}, language_model=lm)
    assert not reward.needs_language_model
    np.testing.assert_allclose(reward.score(inputs).terms["reference_logprob"], 2 * expected, atol=1e-4)
    mean = as_reward(reference_logprob(mean=True, language_model=lm))
    np.testing.assert_allclose(mean.score(inputs).total, expected / [3, 1, 1], atol=1e-4)
    np.testing.assert_allclose(score(reference_logprob(language_model=lm), inputs), expected, atol=1e-4)

    unbound = clip("reference_logprob", low=-5)  # made before there is an environment
    assert unbound.needs_language_model
    bound = as_reward(unbound, language_model=lm)
    np.testing.assert_allclose(bound.score(inputs).total, expected.clip(min=-5), atol=1e-4)
    assert unbound.needs_language_model and not bound.needs_language_model
