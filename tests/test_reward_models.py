"""Training reward models: a classifier that `reward=` takes, the same for the same seed, also after a kill."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from worlds import V, model, tokenizer

from rlhf_gym.data import Labelled, Preference, Rating
from rlhf_gym.lm import LanguageModel
from rlhf_gym.reward_models import Ranking, RewardModelConfig, train_reward_model
from rlhf_gym.reward_models import fit as fit_module
from rlhf_gym.reward_models.examples import as_examples, hold_out
from rlhf_gym.reward_models.network import blocks_of, freeze, head_of, init_head, load_network, outputs_of, without_head
from rlhf_gym.rewards import RewardInputs, as_reward
from rlhf_gym.rewards.classify import RECORDED

PROMPTS = ("the cat", "a dog", "the dog", "a very", "the", "and the cat")
PAIRS = [Preference(p, f"sat {g}", f"sat {b}") for p in PROMPTS for g, b in (("good", "bad"), ("good cat", "bad cat"))]
TEXTS = [(pair.prompt, text) for pair in PAIRS for text in (pair.chosen, pair.rejected)]
QUICK = {"learning_rate": 3e-3, "num_epochs": 6, "batch_size": 4}


def train(records=PAIRS, *, base=None, members=1, **settings):
    more = {
        name: settings.pop(name) for name in ("checkpoint", "seed", "reference", "rule", "held_out") if name in settings
    }
    config = RewardModelConfig(**(QUICK | settings))
    return train_reward_model(
        records,
        model=model(std=0.2) if base is None else base,
        tokenizer=tokenizer(),
        config=config,
        num_members=members,
        **{"held_out": 0.0} | more,
    )


def score(spec, texts=TEXTS):
    prompts, responses = map(list, zip(*texts, strict=True))
    empty = [[0]] * len(texts)
    return as_reward(spec).score(RewardInputs(prompts, responses, empty, empty)).total


def weights(reward_model):
    return [p for member in reward_model.members for p in member.model.state_dict().values()]


def bert():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(vocab_size=V, max_position_embeddings=16, pad_token_id=0, **shape)).eval()


# ---- preferences


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_directory_that_reward_takes(kind, tmp_path):
    base = bert() if kind == "bert" else model(kind, std=0.2)
    before = copy.deepcopy(base.state_dict())
    trained = train(base=base)
    scores = score(trained)
    assert (scores[0::2] > scores[1::2]).all()
    np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())  # passed, not changed

    trained.save(tmp_path / "rm")
    np.testing.assert_allclose(score(str(tmp_path / "rm")), scores, atol=1e-5)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    recorded = getattr(stock.config, RECORDED)
    assert recorded["join"] == " " and recorded["reads"] == "prompt+response" and stock.config.num_labels == 1
    ids = tokenizer()(" ".join(TEXTS[0]), return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logit = stock(**ids).logits.item()
    # The spread is folded into the head; the mean too where the head has a bias.
    assert logit - recorded["shift"] == pytest.approx(scores[0], abs=1e-5)
    assert (recorded["shift"] == 0) == (kind == "bert")
    again = json.loads((tmp_path / "rm" / "training.json").read_text())
    assert again["num_judgements"] == len(PAIRS) and len(again["members"][0]["epochs"]) == 6


@pytest.mark.parametrize("reads", ["response", "pair"])
def test_what_a_model_reads_is_recorded(reads, tmp_path):
    trained = train(base=bert(), reads=reads, num_epochs=1)
    trained.save(tmp_path / "rm")
    np.testing.assert_allclose(score(str(tmp_path / "rm")), score(trained), atol=1e-6)
    other = score(trained, [("a dog", text) for _, text in TEXTS])
    assert np.allclose(other, score(trained), atol=1e-6) == (reads == "response")


def test_continuations_and_joins_read_the_same():
    trained = train(num_epochs=1)
    prompts, responses = map(list, zip(*TEXTS, strict=True))
    with_space = trained(prompts, responses, [" " + response for response in responses])
    np.testing.assert_allclose(trained(prompts, responses), with_space, atol=1e-6)
    assert np.abs(trained(prompts, responses, responses) - with_space).max() > 1e-3  # "catsat": the negative control


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first, second, other = train(num_epochs=1), train(num_epochs=1), train(num_epochs=1, seed=1)
    assert all(map(torch.equal, weights(first), weights(second)))
    assert not all(map(torch.equal, weights(first), weights(other)))


@pytest.mark.parametrize(("stop", "more"), [(1, {}), (4, {"early_stopping": True}), (5, {"dropout": True})])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path, monkeypatch, stop, more):
    monkeypatch.setattr(fit_module, "CHECKPOINT_EVERY", 1)
    settings = {"num_epochs": 3} | more
    whole = train(**settings)
    save, calls = fit_module.Fit._save, iter(range(100))

    def killed(self):
        save(self)
        if next(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit_module.Fit, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=tmp_path / "state", **settings)
    monkeypatch.setattr(fit_module.Fit, "_save", save)
    resumed = train(checkpoint=tmp_path / "state", **settings)
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert whole.details["members"] == resumed.details["members"]


def test_early_stopping_takes_the_best_epoch():
    # Coins, learnt by heart: what is set aside is predicted worse and worse.
    rng = np.random.default_rng(0)
    prompts = [f"the {a} {b}" for a in ("cat", "dog", "very") for b in ("a", "and", "the", "ran", "very")]
    coins = [Preference(p, *map(str, rng.permutation(["sat good", "sat bad"]))) for p in prompts]
    trained = train(coins, early_stopping=True, num_epochs=6, learning_rate=2e-2)
    losses = [epoch["held_aside_loss"] for epoch in trained.details["members"][0]["epochs"]]
    best = int(np.argmin(losses))
    assert best < 5 and losses[best] < losses[-1] - 0.1
    _, aside = hold_out(as_examples(coins), 0.1, seed=-1)
    spread = getattr(trained.members[0].model.config, RECORDED)["spread"]
    texts = [(item.prompt, response) for item in aside.items for response in item.responses]
    gaps = spread * np.diff(score(trained, texts).reshape(-1, 2))[:, 0]  # the rejected one minus the chosen one
    assert np.logaddexp(0, gaps).mean() == pytest.approx(losses[best], abs=1e-4)


def test_a_tenth_is_set_aside_of_what_is_not_held_out(monkeypatch):
    sizes = []

    class Stops(fit_module.Fit):
        def __init__(self, network, parameters, texts, *more, held_aside, **options):
            sizes.extend((len(texts.items), len(held_aside.items)))
            raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_gym.reward_models.train.Fit", Stops)
    pairs = [Preference(f"the cat {i}", "sat good", "sat bad") for i in range(200)]
    with pytest.raises(KeyboardInterrupt):
        train(pairs, early_stopping=True, held_out=0.1)
    # 200 * .9 * .1 = 18 in the mean, with a standard deviation of 4: the report's tenth must not be drawn again.
    assert 6 <= sizes[1] <= 30 and 150 <= sum(sizes) <= 195


def test_rankings_and_ties():
    rankings = [Ranking(p, ("sat good", "sat cat", "sat bad"), (1, 2, 3)) for p in PROMPTS]
    rankings += [Preference(p, "sat dog", "sat cat", tie=True) for p in PROMPTS]
    scores = score(train(rankings, num_epochs=10), [("the cat", f"sat {w}") for w in ("good", "cat", "dog", "bad")])
    assert scores[0] > scores[1] > scores[3] and scores[0] > scores[2] > scores[3]
    assert abs(scores[1] - scores[2]) < 0.5 * abs(scores[0] - scores[3])


def test_reference_samples_set_the_scale():
    reference = [("the cat", "sat good"), ("the cat", "sat bad"), ("the cat", "ran")]
    trained = train(reference=reference)
    scores = score(trained, reference)
    np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-5)
    with pytest.raises(ValueError, match="the same reward"):
        train(reference=reference[:1] * 2)


def test_training_goes_on_from_a_reward_model(tmp_path):
    train().save(tmp_path / "rm")
    again = train(base=str(tmp_path / "rm"), learning_rate=1e-9, num_epochs=1)
    np.testing.assert_allclose(score(again), score(str(tmp_path / "rm")), atol=1e-3)  # the head was kept


def test_from_scratch_and_layers():
    trained = train(from_scratch=True, num_epochs=1)
    assert not torch.equal(trained.members[0].model.transformer.wte.weight, model(std=0.2).transformer.wte.weight)
    low = train(num_layers=1, train_layers=0).members[0].model
    base = model(std=0.2)
    assert len(blocks_of(low)) == low.config.num_hidden_layers == 1
    kept = dict(base.transformer.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in low.transformer.named_parameters())
    top = train(train_layers=1, num_epochs=1).members[0].model
    changed = {n for n, value in top.transformer.named_parameters() if not torch.equal(kept[n], value)}
    assert {name.split(".")[0] for name in changed} == {"h", "ln_f"} and all(".0." not in name for name in changed)


def test_a_solved_head_is_the_minimum():
    trained = train(train_layers=0, center_coef=0.0)
    network = copy.deepcopy(trained.members[0].model)
    rows = [tokenizer()(f"{p} {r}")["input_ids"] for p, r in TEXTS]
    with without_head(network):
        features = outputs_of(network, rows).double().numpy()
    spread = getattr(network.config, RECORDED)["spread"]
    raw = spread * score(trained)
    # The slope of the loss along the standardised features is minus the penalty times the weights.
    scale = features.std(0)
    gaps = ((features - features.mean(0)) / np.where(scale < 1e-12, 1, scale))[0::2]
    gaps = gaps - ((features - features.mean(0)) / np.where(scale < 1e-12, 1, scale))[1::2]
    w = spread * head_of(network)[1].weight[0].double().numpy() * scale
    slope = -(gaps / (1 + np.exp(raw[0::2] - raw[1::2]))[:, None]).mean(0)
    np.testing.assert_allclose(slope, -trained.details["members"][0]["penalty"] * w, atol=2e-3)


# ---- labels


def test_ratings():
    ratings = [Rating(p, f"sat {w}", r) for p in PROMPTS for w, r in (("good", 9.0), ("cat", 6.0), ("bad", 3.0))]
    trained = train(ratings, num_epochs=15, learning_rate=1e-2)
    recorded = getattr(trained.members[0].model.config, RECORDED)
    texts = [("the cat", f"sat {w}") for w in ("good", "cat", "bad")]
    rated = recorded["rating_mean"] + recorded["rating_per_score"] * score(trained, texts)
    np.testing.assert_allclose(rated, [9, 6, 3], atol=0.7)
    steps = train(ratings, kind="ordinal", num_epochs=12)
    recorded = getattr(steps.members[0].model.config, RECORDED)
    assert recorded["levels"] == ["3", "6", "9"] and recorded["thresholds"] == sorted(recorded["thresholds"])
    good, cat, bad = score(steps, texts)
    assert good > recorded["thresholds"][1] > cat > recorded["thresholds"][0] > bad


def test_classes(tmp_path):
    labels = [Labelled(p, f"sat {w}", w) for p in PROMPTS for w in ("good", "cat", "bad")]
    trained = train(labels, positive_label="good", num_epochs=8)
    trained.save(tmp_path / "rm")
    texts = [("the cat", f"sat {w}") for w in ("good", "cat", "bad")]
    found = score(str(tmp_path / "rm"), texts)
    assert found[0] > 0.6 and found[1:].max() < 0.4  # the probability of "good"
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert stock.config.id2label == {0: "bad", 1: "cat", 2: "good"}
    binary = train([Labelled(p, f"sat {w}", w == "good") for p in PROMPTS for w in ("good", "bad")])
    good, bad = score(binary, [("the", "sat good"), ("the", "sat bad")])
    assert good > 0 > bad


# ---- ensembles


def test_ensemble_directory(tmp_path):
    trained = train(members=3, rule="min", num_epochs=2)
    prompts, responses = map(list, zip(*TEXTS, strict=True))
    members = trained.member_scores(prompts, responses)
    assert members.shape == (3, len(TEXTS)) and trained.disagreement(prompts, responses).min() > 1e-4
    np.testing.assert_allclose(members.mean(1), 0, atol=1e-5)
    trained.save(tmp_path / "rm")
    np.testing.assert_allclose(score(str(tmp_path / "rm")), members.min(0), atol=1e-5)
    np.testing.assert_allclose(score(trained.reward), members.min(0), atol=1e-6)
    alone = score(str(tmp_path / "rm" / "member_1"))
    np.testing.assert_allclose(alone, members[1], atol=1e-5)


def test_solved_heads_differ_by_the_judgements_drawn():
    trained = train(members=2, train_layers=0)
    first, second = (member.model for member in trained.members)
    assert first.transformer is second.transformer  # one trunk
    assert not torch.equal(first.score.weight, second.score.weight)
    prompts, responses = map(list, zip(*TEXTS, strict=True))
    assert trained.disagreement(prompts, responses).max() > 1e-3


def test_probability_of_a_preference():
    trained = train(members=2, num_epochs=2)
    scores = trained.member_scores(["the"] * 2, ["sat good", "sat bad"])
    spreads = [getattr(member.model.config, RECORDED)["spread"] for member in trained.members]
    expected = np.mean([1 / (1 + math.exp(-s * (a - b))) for s, (a, b) in zip(spreads, scores, strict=True)])
    assert trained.preference_probability(scores[:, :1], scores[:, 1:])[0] == pytest.approx(expected)


# ---- the network


def test_new_heads_have_the_published_scale():
    shape = {"hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape))
    network, _ = load_network(base, tokenizer(), names=["reward"] * 64, config=RewardModelConfig())
    init_head(network, torch.Generator().manual_seed(0))
    assert head_of(network)[1].weight.detach().std().item() == pytest.approx(1 / math.sqrt(513), rel=0.02)


def test_frozen_layers():
    network, _ = load_network(model("llama"), tokenizer(), names=["reward"], config=RewardModelConfig())
    everything = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for p in freeze(network, None)) == everything
    assert sum(p.numel() for p in freeze(network, 0)) == 16
    freeze(network, 1)
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in names} == {"layers", "norm", "weight"} and not any("layers.0" in n for n in names)
    with pytest.raises(ValueError, match="at most the model's 2, got 3"):
        freeze(network, 3)


def test_padding_changes_no_output():
    network, words = load_network(model("llama"), tokenizer(), names=["reward"], config=RewardModelConfig())
    init_head(network, torch.Generator().manual_seed(0))
    rows = [words(text)["input_ids"] for text in ("the", "the cat sat on a very good dog", "a dog")]
    alone = [outputs_of(network, [row]).item() for row in rows]
    np.testing.assert_allclose(outputs_of(network, rows)[:, 0], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "nowhere"}, "nowhere"),
        ({"base": model("lstm")}, "has no form with a head for texts"),
        ({"num_layers": 7}, "num_layers must be at most the model's 2"),
        ({"train_layers": 7}, "train_layers must be at most the model's 2"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\)"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"from_scratch": True, "train_layers": 1}, "from_scratch trains the whole model"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0"),
        ({"train_layers": 0, "early_stopping": True}, "leave early_stopping and dropout out"),
        ({"positive_label": "good"}, "positive_label is for labels"),
        ({"records": [Rating("a", "cat", 1.0)], "label_smoothing": 0.1}, "not ratings"),
        ({"rule": "least"}, "rule must be"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train(**change)


def test_a_language_model_object():
    lm = LanguageModel(model(), tokenizer(), "x", V, (2,), 0, 1, 32)
    trained = train_reward_model(PAIRS, model=lm, held_out=0, config=RewardModelConfig(num_epochs=1))
    assert np.isfinite(score(trained)).all()
