"""Tiny reviews: the grammar against brute force, hand numbers and frequencies; the shipped model against the grammar."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import product as cartesian

import numpy as np
import pytest

from rlhf_gym.tasks import tiny_reviews
from rlhf_gym.tasks.tiny_reviews.grammar import END, Grammar
from rlhf_gym.tasks.tiny_reviews.reviews import build_rules

KETTLE = "review of the kettle :"


def derivations(rules, symbol):
    """Every derivation of a symbol as (words, probability), by brute force: nothing is shared with Grammar."""
    if symbol not in rules:
        return [((symbol,), 1.0)]
    total = sum(rules[symbol].values())
    found = []
    for rhs, weight in rules[symbol].items():
        for choice in cartesian(*(derivations(rules, name) for name in rhs.split())):
            words = tuple(word for part, _ in choice for word in part)
            found.append((words, weight / total * math.prod(p for _, p in choice)))
    return found


@pytest.fixture(scope="module")
def reduced():
    """The real rules with a few of their alternatives, chosen to keep the ambiguous ones, and all their derivations."""
    rules = build_rules({"kettle": {"lid": "built", "heater": "power"}})
    for symbol, alternatives in rules.items():
        names = list(alternatives)
        if symbol.startswith("MILD"):
            kept = [names[0], names[-1]]  # "is fine" is also neutral
        elif symbol.startswith(("BODY", "CLOSING", "SAYS", "YIELDS", "REVIEW", "STRONG")):
            kept = names[:: max(1, len(names) // 3)][-3:]
        else:
            few = symbol.startswith(("WHEN", "PERSON", "PERIOD", "OPENING", "PRAISE", "QUALITY", "PHRASE"))
            kept = names if symbol == "NEUTRAL" else names[-1 if few else -2 :]
        rules[symbol] = {name: alternatives[name] for name in kept}
    return rules, derivations(rules, "REVIEW")


def test_grammar_with_hand_numbers():
    grammar = Grammar({"S": {"a": 1, "A b": 3}, "A": {"a": 1, "": 1}}, "S")
    assert [math.exp(grammar.log_prob(text)) for text in ("a", "a b", "b")] == pytest.approx([0.25, 0.375, 0.375])
    assert grammar.next_token_probs("a") == pytest.approx({END: 0.4, "b": 0.6})
    assert grammar.next_token_probs() == pytest.approx({"a": 0.625, "b": 0.375})
    assert grammar.log_prob("b a") == grammar.log_prob("") == grammar.log_prob(f"a {END}") == -math.inf
    assert (grammar.vocabulary, grammar.max_tokens) == (["a", "b"], 2)
    # (ln 1/p summed) / (tokens, the end counted): a has 2, a b has 3.
    assert grammar.perplexity(["a", "a b"]) == pytest.approx((4 / 0.375) ** (1 / 5))


@pytest.mark.parametrize(
    ("rules", "start", "message"),
    [
        ({"S": {"a": 1}}, "T", "start must be"),
        ({"S": {"a": 0}}, "S", "weights of 'S'"),
        ({"S": {}}, "S", "weights of 'S'"),
        ({"S": {"A": 1}, "A": {"b": 1, "a S": 1}}, "S", "recursive"),
    ],
)
def test_grammar_refuses_bad_rules(rules, start, message):
    with pytest.raises(ValueError, match=message):
        Grammar(rules, start)


def test_log_prob_is_the_sum_over_all_derivations(reduced):
    rules, brute = reduced
    grammar = Grammar(rules, "REVIEW")
    totals, ways = Counter(), Counter()
    for words, p in brute:
        totals[" ".join(words)] += p
        ways[" ".join(words)] += 1
    assert sum(math.exp(grammar.log_prob(text)) for text in totals) == pytest.approx(1.0, abs=1e-10)
    assert [grammar.log_prob(text) for text in totals] == pytest.approx(
        [math.log(p) for p in totals.values()], abs=1e-10
    )
    # It would prove little if no text had more derivations than one for each latent sentiment.
    assert max(ways.values()) > 2
    assert grammar.max_tokens == max(len(text.split()) for text in totals)


def test_sampling_frequencies_are_the_probabilities(reduced):
    grammar, rng = Grammar(reduced[0], "REVIEW"), np.random.default_rng(0)
    num_samples = 20_000
    counts = Counter(grammar.sample(rng) for _ in range(num_samples))
    p = np.exp([grammar.log_prob(text) for text in counts])
    often = p * num_samples > 20
    z = (np.array(list(counts.values())) - num_samples * p) / np.sqrt(num_samples * p * (1 - p))
    assert often.sum() > 50 and np.abs(z[often]).max() < 4.5 and z[often].std() == pytest.approx(1, abs=0.3)


def test_next_token_probs_multiply_to_log_prob():
    rng = np.random.default_rng(1)
    for text in (tiny_reviews.sample(rng) for _ in range(15)):
        words, total = text.split(), 0.0
        for i, word in enumerate([*words, END]):
            probs = tiny_reviews.next_token_probs(" ".join(words[:i]))
            assert sum(probs.values()) == pytest.approx(1.0, abs=1e-12)
            total += math.log(probs[word])
        assert total == pytest.approx(tiny_reviews.log_prob(text), abs=1e-9)
    with pytest.raises(ValueError, match="beginning of a text"):
        tiny_reviews.next_token_probs("lid the")


def test_sentiment_by_hand():
    # A dashed hope means the body is negative: .8 for a negative writer, who is neutral in the claim with .1,
    # and .2 for a positive one, who is neutral in it with .3. Everything else is equal.
    text = f"{KETTLE} i wanted to love it , but the lid is okay ."
    assert tiny_reviews.sentiment(text) == pytest.approx(0.2 * 0.3 / (0.2 * 0.3 + 0.8 * 0.1), abs=1e-12)
    # Stars alone: the neutral body cancels only when both polarities are as likely, so take the ratio of two reviews.
    odds = [(s := tiny_reviews.sentiment(f"{text} {stars} .")) / (1 - s) for stars in ("five stars", "one star")]
    assert odds[0] / odds[1] == pytest.approx((38 / 5) ** 2)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ("the lid is not flimsy .", "the lid is not sturdy ."),
        ("the lid is not bad at all .", "the lid is not great ."),
        (
            "although the lid is terrible , the handle is great .",
            "although the lid is great , the handle is terrible .",
        ),
        ("despite the flimsy lid , the handle is great .", "despite the sturdy lid , the handle is terrible ."),
        ("the lid is weak , but the handle is strong .", "the lid is strong , but the handle is weak ."),
        ("i wanted to hate it , but the lid is sturdy .", "i wanted to love it , but the lid is flimsy ."),
        ("the lid is okay . i would buy it again .", "the lid is okay . i would not buy it again ."),
        ("the lid is okay . you will not regret it .", "the lid is okay . you will regret it ."),
    ],
)
def test_sentiment_is_more_than_word_counting(positive, negative):
    assert tiny_reviews.sentiment(f"{KETTLE} {positive}") > 0.6 and tiny_reviews.sentiment(f"{KETTLE} {negative}") < 0.4


def test_sentiment_is_calibrated():
    rng = np.random.default_rng(2)
    writers = {z: Grammar(build_rules(), f"REVIEW.{z}") for z in "+-"}
    texts = {z: [writers[z].sample(rng) for _ in range(2500)] for z in "+-"}
    scores = {z: np.array([tiny_reviews.sentiment(text) for text in texts[z]]) for z in "+-"}
    s, is_positive = np.concatenate([scores["+"], scores["-"]]), np.repeat([1.0, 0.0], 2500)
    for low in np.arange(10) / 10:
        inside = (s >= low) & (s < low + 0.1)
        sigma = math.sqrt((s[inside] * (1 - s[inside])).sum())
        assert abs(is_positive[inside].sum() - s[inside].sum()) < 3 * sigma
    # Informative, and not 0 or 1 everywhere.
    assert 0.7 < scores["+"].mean() < 0.9 and ((s > 0.1) & (s < 0.9)).mean() > 0.3
    # Both writers can write every review, so a likelihood ratio under either has mean exactly 1.
    for ratio in ((1 - scores["+"]) / scores["+"], scores["-"] / (1 - scores["-"])):
        assert abs(ratio.mean() - 1) < 3 * ratio.std() / math.sqrt(len(ratio))


def test_what_is_no_review_has_no_sentiment():
    for text in ("", KETTLE, "the lid is great .", f"{KETTLE} the lid is great", f"{KETTLE} the screen is great ."):
        assert not tiny_reviews.grammatical(text)
        assert (tiny_reviews.sentiment(text), tiny_reviews.log_prob(text)) == (0.0, -math.inf)
    with pytest.raises(ValueError, match="beginning of a review"):
        tiny_reviews.prefix_sentiment("kettle")


def test_reviews_have_the_promised_size():
    rng = np.random.default_rng(3)
    lengths = [len(tiny_reviews.sample(rng).split()) for _ in range(2000)]
    assert min(lengths) >= 8 and np.quantile(lengths, 0.98) <= 30
    assert 150 <= len(tiny_reviews.GRAMMAR.vocabulary) <= 300


def test_gold_sentiment_joins_texts_and_counts_rows():
    prompts = [KETTLE, f" {KETTLE} ", f"{KETTLE} the", KETTLE]
    completions = ["the lid is great .", " the  lid is great . ", "lid is great .", "the lid is"]
    scores = tiny_reviews.gold_sentiment(prompts, completions)
    assert scores == [tiny_reviews.sentiment(f"{KETTLE} the lid is great .")] * 3 + [0.0] and scores[0] > 0.8
    assert tiny_reviews.grammaticality(prompts, completions) == [1.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError):
        tiny_reviews.gold_sentiment([KETTLE], [])


def test_prompts():
    train, test = tiny_reviews.load_prompts("train"), tiny_reviews.load_prompts("test")
    assert (len(train), len(test)) == (512, 64)
    texts = [row["prompt"] for row in train + test]
    assert len(set(texts)) == 576, "the splits share prompts"
    assert max(len(text.split()) for text in texts) + 1 <= 16
    assert all(f" {row['product']} " in row["prompt"] for row in train + test)
    assert [tiny_reviews.prefix_sentiment(text) for text in texts] == pytest.approx([0.5] * 576, abs=1e-12)
    # The shortest prompt is a bare opening; the longest opening is 5 words longer, so at most this much can follow.
    assert tiny_reviews.GRAMMAR.max_tokens - 5 - min(len(text.split()) for text in texts) + 1 <= 32
    train[0]["prompt"] = "changed"
    assert tiny_reviews.load_prompts("train")[0]["prompt"] == texts[0]
    with pytest.raises(ValueError, match="split"):
        tiny_reviews.load_prompts("dev")


def test_grammar_imports_no_torch():
    code = "import sys, rlhf_gym.tasks.tiny_reviews as t; t.load_prompts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The shipped model.


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny_reviews.MODEL_DIR
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def test_model_is_the_recorded_one():
    weights = tiny_reviews.MODEL_DIR / "model.safetensors"
    record = json.loads((tiny_reviews.MODEL_DIR / "provenance.json").read_text())
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"]
    assert weights.stat().st_size <= 5_000_000


def test_tokenizer_round_trip(shipped):
    model, tokenizer = shipped
    rng = np.random.default_rng(4)
    for text in [tiny_reviews.sample(rng) for _ in range(200)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) == len(text.split()) + 1 and ids[0] == tokenizer.bos_token_id
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} & set(ids)
    assert len(tokenizer) == model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert tokenizer.decode([1, *tokenizer("great .")["input_ids"], 2, 0, 0], skip_special_tokens=True) == "great ."
    typed = tokenizer("The lid is great, but the handle is weak.")["input_ids"]
    assert tokenizer.decode(typed[1:]) == "the lid is great , but the handle is weak ."
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def test_model_perplexity_is_near_the_grammars(shipped):
    import torch

    model, tokenizer = shipped
    rng = np.random.default_rng(5)
    texts = sorted((tiny_reviews.sample(rng) for _ in range(2000)), key=len)
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(texts), 100):
            # Left to right by hand, row by row the plain way: every real token after <bos>, <eos> included.
            rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts[start : start + 100]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
            total -= chosen[mask[:, 1:].bool()].sum().item()
            num_tokens += sum(map(len, rows)) - len(rows)
    perplexity, floor = math.exp(total / num_tokens), tiny_reviews.true_perplexity(texts)
    assert 0.995 * floor < perplexity < 1.05 * floor
    measured = json.loads((tiny_reviews.MODEL_DIR / "provenance.json").read_text())["measured"]
    assert measured["perplexity"] / measured["true_perplexity"] == pytest.approx(perplexity / floor, abs=0.01)


def test_model_writes_reviews_of_undecided_sentiment(shipped):
    import torch

    model, tokenizer = shipped
    torch.manual_seed(0)
    prompts, completions = [], []
    for row in tiny_reviews.load_prompts("test")[::4]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        output = model.generate(ids, num_return_sequences=24, do_sample=True, top_k=0, max_new_tokens=32)
        prompts += [row["prompt"]] * 24
        completions += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    scores = np.array(tiny_reviews.gold_sentiment(prompts, completions))
    measured = json.loads((tiny_reviews.MODEL_DIR / "provenance.json").read_text())["measured"]["grammatical"]
    share = np.mean(tiny_reviews.grammaticality(prompts, completions))
    assert share > 0.9 and abs(share - measured) < 4 * math.sqrt(measured * (1 - measured) / len(scores))
    assert abs(scores.mean() - 0.5) < 0.02 + 3 * scores.std() / math.sqrt(len(scores))


def test_training_is_deterministic():
    from rlhf_gym.tasks.tiny_reviews.train import train

    first, second = (train(3, seed=0)[0].state_dict() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != weights).any() for name, weights in train(3, seed=1)[0].state_dict().items())
