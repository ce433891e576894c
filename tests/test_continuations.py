"""Prompt and response as one text: rewards that read both are given the text that the ids say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from rlhf_gym.envs.prompts import Prompt
from rlhf_gym.envs.scoring import Scorer
from rlhf_gym.lm import load_language_model
from rlhf_gym.rewards import RewardInputs, as_reward, classifier, perplexity
from rlhf_gym.rewards.sequences import batches_by_length, encode_texts

TEXTS = [
    ("review of the kettle : the lid", "is sturdy ."),
    ("my sister gave me this lamp on sale .", "they call it great"),
]


@pytest.fixture(scope="module")
def tiny():
    return load_language_model("tiny-reviews")


def encoded(tokenizer, text, prompt=None):
    ids = tokenizer(text, add_special_tokens=prompt is None)["input_ids"]
    return Prompt(text, torch.tensor(ids)) if prompt is None else ids


def scored(tiny, reward, texts=TEXTS):
    prompts = [encoded(tiny.tokenizer, prompt) for prompt, _ in texts]
    responses = [encoded(tiny.tokenizer, response, prompt) for prompt, response in texts]
    scorer = Scorer(as_reward(reward), tiny.tokenizer)
    return scorer.score(prompts, responses, np.ones(len(texts), dtype=bool)).totals, prompts, responses


def test_perplexity_of_an_environment_is_that_of_the_ids(tiny):
    found, prompts, responses = scored(tiny, perplexity("tiny-reviews"))
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt.ids.tolist(), *response]])
        labels = ids.clone()
        labels[0, : len(prompt.ids)] = -100
        with torch.no_grad():
            expected.append(-tiny.model(input_ids=ids, labels=labels).loss.item())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = perplexity("tiny-reviews")([p for p, _ in TEXTS], [r for _, r in TEXTS])
    assert expected[0] > plain[0] + 5  # the negative control: "lidis" is no word of this model


def test_classifier_reads_the_ids_text(tiny):
    torch.manual_seed(0)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tiny.tokenizer), **shape)).eval()
    found, prompts, responses = scored(tiny, classifier(model, tiny.tokenizer))
    ids = [[*prompt.ids.tolist(), *response] for prompt, response in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Where there are no ids, `join` stands in for them.
    by_hand = RewardInputs([p for p, _ in TEXTS], [r for _, r in TEXTS], [[0]] * 2, [[1]] * 2)
    joined = as_reward(classifier(model, tiny.tokenizer, join=" ")).score(by_hand).total
    np.testing.assert_allclose(joined, expected, atol=1e-5)
    assert np.abs(as_reward(classifier(model, tiny.tokenizer)).score(by_hand).total - expected).max() > 1e-3


def test_continuations_reach_whoever_names_them(tiny):
    def whole(prompts, continuations):
        seen.extend(p + c for p, c in zip(prompts, continuations, strict=True))
        return [0.0] * len(prompts)

    def everything(prompts, **columns):
        assert "continuations" not in columns  # TRL's form stays as it is
        return [0.0] * len(prompts)

    seen: list[str] = []
    scored(tiny, whole)
    assert seen == [
        "review of the kettle : the lid is sturdy .",
        "my sister gave me this lamp on sale . they call it great",
    ]
    scored(tiny, everything)
    seen.clear()
    as_reward(whole).score(RewardInputs(["a"], [" b"], [[0]], [[1]]))
    assert seen == ["a b"]  # nobody knows better: the completion as it is


def test_a_space_that_is_there_already(tiny):
    assert Scorer(as_reward("length"), tiny.tokenizer).continuation(
        encoded(tiny.tokenizer, "the lid "), encoded(tiny.tokenizer, "is sturdy", "the lid ")
    ) == ("is sturdy")


def test_a_response_that_completes_a_character():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    first, second = "é".encode()
    assert (
        Scorer(as_reward("length"), Bytes()).continuation(Prompt("?", torch.tensor([65, first])), [second, 66]) == "�B"
    )


def test_a_chat_templates_bos_is_not_doubled(tiny):
    once = encode_texts(tiny.tokenizer, ["<bos>the lid"], [" is sturdy"], reads="prompt+response")[0]
    assert once == encode_texts(tiny.tokenizer, ["the lid"], [" is sturdy"], reads="prompt+response")[0]
    assert once[0].count(tiny.tokenizer.bos_token_id) == 1


def test_batches_by_length():
    batches = batches_by_length([3, 9, 1, 9, 2], max_tokens=18)
    assert batches == [[1, 3], [0, 4, 2]]
    assert batches_by_length([50], max_tokens=18) == [[0]]  # one row always fits
