"""Metrics of texts and their intervals: by hand, against sacrebleu, by closed form; and what the command line makes of them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import make_envs, model, tokenizer

from rlhf_gym.cli import main
from rlhf_gym.evaluation import Evaluation, evaluate
from rlhf_gym.intervals import bootstrap_estimate, jackknife_estimate, mean_estimate, share_estimate
from rlhf_gym.report import table
from rlhf_gym.rewards.overlap import chrf_metric
from rlhf_gym.text_metrics import distinct_n, diversity, perplexity_estimate, reference_overlap, self_bleu


def random_texts(seed, num_texts=30, num_words=12):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(num_words, size=rng.integers(0, 9))) for _ in range(num_texts)]


def whole(texts):
    return np.ones(len(texts), dtype=bool)


# ---- diversity


def test_distinct_n_by_hand():
    texts = ["a b a", "A b!", ""]
    assert distinct_n(texts, 1)(whole(texts)) == 2 / 5
    assert distinct_n(texts, 2)(whole(texts)) == 2 / 3  # ab, ba, ab
    assert distinct_n(texts, 3)(whole(texts)) == 1
    assert distinct_n(texts, 1)(np.array([False, True, True])) == 1
    assert math.isnan(distinct_n(texts, 4)(whole(texts)))
    assert distinct_n(["我爱我"], 1)(whole([0])) == 2 / 3


def test_self_bleu_is_sacrebleus():
    metrics = pytest.importorskip("sacrebleu.metrics")
    metric = metrics.BLEU(tokenize="none", effective_order=True)
    for seed in range(3):
        texts = random_texts(seed)
        for keep in (whole(texts), np.arange(30) % 3 > 0):
            kept = [text for text, k in zip(texts, keep, strict=True) if k]
            expected = [
                metric.sentence_score(text, kept[:i] + kept[i + 1 :]).score / 100 if text else kept.count("") > 1
                for i, text in enumerate(kept)
            ]
            assert self_bleu(texts)(keep) == pytest.approx(np.mean(expected), abs=1e-12)


def test_self_bleu_at_its_ends():
    def of(*texts):
        return self_bleu(texts)(whole(texts))

    assert of("a b c d e", "a b c d e", "a b c d e") == pytest.approx(1)
    assert of("a b", "c d", "e f") == 0
    assert of("", "") == 1 and of("", "a") == 0  # a policy that says nothing is not diverse
    assert math.isnan(of("a"))
    # "a b" against "a c": 1/2 and 0/1 smoothed to 1/2, no brevity penalty
    assert of("a b", "a c") == pytest.approx((1 / 2 * 1 / 2) ** 0.5)


def test_diversity_of_one_prompt_and_of_nothing():
    found = diversity(["a b b", "a"], np.zeros(2, dtype=int))
    assert found["distinct_1"].mean == 0.5 and found["distinct_1"].low is None
    assert (
        found["repeated_bigrams"].mean == 0 and diversity(["a a a"], np.zeros(1, int))["repeated_bigrams"].mean == 0.5
    )
    assert all(math.isnan(estimate.mean) for estimate in diversity([], np.zeros(0, dtype=int)).values())


# ---- references


def test_corpus_scores_are_sacrebleus():
    metrics = pytest.importorskip("sacrebleu.metrics")
    texts = random_texts(0)
    groups = [[a, b] if a and b else ["w1 w2"] for a, b in zip(random_texts(1), random_texts(2), strict=True)]
    streams = [[group[0] for group in groups], [group[1] if len(group) > 1 else None for group in groups]]
    found = reference_overlap(texts, groups, np.arange(30) % 10)
    for name, metric in (("bleu", metrics.BLEU()), ("chrf", metrics.CHRF())):
        assert found[name].mean == pytest.approx(metric.corpus_score(texts, streams).score / 100, abs=1e-12)
        assert found[name].low < found[name].mean < found[name].high
    chinese = reference_overlap(["我爱你们大家"], [["我爱你们大家"]], np.zeros(1, dtype=int))
    assert chinese["bleu"].mean == pytest.approx(1) and chinese["rouge_l"].mean == 1


def test_without_sacrebleu_there_is_rouge_l(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    chrf_metric.cache_clear()
    found = reference_overlap(["a b"], [["a"]], np.zeros(1, dtype=int))
    assert list(found) == ["rouge_l"] and found["rouge_l"].mean == pytest.approx(2 / 3)


# ---- intervals


def test_wilson():
    one_each = np.arange(10)
    ten, five = share_estimate(np.ones(10, bool), one_each), share_estimate(one_each < 5, one_each)
    assert (ten.mean, ten.low, ten.high) == pytest.approx((1, 0.7225, 1), abs=1e-4)  # z^2/(n + z^2) = 3.8415/13.8415
    assert (five.mean, five.low, five.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert str(ten) == "1.000 [0.722, 1.000]" and str(five) == "0.500 ± 0.263"
    again = share_estimate(np.repeat(one_each < 5, 7), np.repeat(one_each, 7))  # more responses to the same prompts
    assert vars(again) == pytest.approx(vars(five))


def test_bootstrap_of_two_prompts():
    """Resamples of two prompts are (a, a), (a, b) and (b, b), so the percentiles are the two alone."""

    def ratio(sums):
        return sums[0] / sums[1]

    sums = np.array([[1.0, 4.0], [1.0, 4.0], [9.0, 10.0]])
    found = bootstrap_estimate(ratio, sums, np.array([0, 0, 1]))
    assert (found.mean, found.low, found.high) == (11 / 18, 0.25, 0.9)
    assert found == bootstrap_estimate(ratio, sums, np.array([0, 0, 1]))
    other = bootstrap_estimate(ratio, np.arange(1.0, 41.0).reshape(20, 2), np.arange(20), seed=0)
    assert other != bootstrap_estimate(ratio, np.arange(1.0, 41.0).reshape(20, 2), np.arange(20), seed=1)
    assert bootstrap_estimate(ratio, sums[:2], np.zeros(2)).low is None


def test_bootstrap_of_a_mean_is_near_students_interval():
    values = np.random.default_rng(0).normal(size=400)
    means = mean_estimate(values, np.arange(400))
    found = bootstrap_estimate(lambda s: s[0] / s[1], np.stack([values, np.ones(400)], 1), np.arange(400))
    assert found.mean == pytest.approx(means.mean) and found.standard_error == pytest.approx(
        means.standard_error, rel=0.1
    )
    assert (found.low, found.high) == pytest.approx((means.low, means.high), abs=0.02)


def test_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(0).normal(size=40)
    found = jackknife_estimate(lambda keep: float(values[keep].mean()), np.arange(40))
    assert vars(found) == pytest.approx(vars(mean_estimate(values, np.arange(40))))


def test_the_bootstrap_would_be_wrong_for_diversity():
    """Why distinct-n has the jackknife: a prompt drawn twice is repetition that the policy did not make."""
    texts, prompts = [f"w{3 * i} w{3 * i + 1} w0" for i in range(40)], np.arange(40)
    found = diversity(texts, prompts)["distinct_2"]
    rng = np.random.default_rng(0)
    resampled = [
        distinct_n([texts[i] for i in rng.integers(40, size=40)], 2)(np.ones(40, dtype=bool)) for _ in range(200)
    ]
    assert found.mean == 1 and np.quantile(resampled, 0.975) < 0.8
    assert found.low == found.high == 1  # all different, with any of them left out


def test_perplexity_by_hand():
    found = perplexity_estimate(np.array([-2.0, -4.0, 0.0]), np.array([1, 3, 0]), np.array([0, 1, 2]))
    assert found.mean == pytest.approx(math.exp(6 / 4)) and found.low < found.mean < found.high
    assert math.isnan(perplexity_estimate(np.zeros(2), np.zeros(2, dtype=int), np.arange(2)).mean)


# ---- evaluations


def evaluation(scores, responses=None, prompts=None):
    n = len(scores)
    prompts = list(range(n)) if prompts is None else prompts
    return Evaluation(
        scores=np.asarray(scores, dtype=float),
        terms={"f": np.asarray(scores, dtype=float)},
        kl=None,
        lengths=np.full(n, 3),
        ended_by_eos=np.arange(n) > 0,
        others={},
        prompt_index=np.asarray(prompts),
        samples=[{"prompt": f"p{i}", "response": r} for i, r in zip(prompts, responses or ["a b"] * n, strict=True)],
    )


def test_wins_ties_and_losses():
    first, second = evaluation([0.0, 1.0, 2.0, 3.0]), evaluation([1.0, 1.0 + 1e-9, 1.0, 4.0])
    shares = second.against(first)
    assert {name: share.mean for name, share in shares.items()} == {"wins": 0.5, "ties": 0.25, "losses": 0.25}
    assert shares["wins"].low == pytest.approx(0.15, abs=1e-3)  # Wilson, 2 of 4: [.150, .850]
    assert first.against(second)["losses"].mean == 0.5 and first.against(first)["ties"].mean == 1
    with pytest.raises(ValueError, match="same prompts in the same order"):
        first.against(evaluation([0.0, 1.0, 2.0, 3.0], prompts=[0, 1, 3, 2]))


def test_table_has_the_texts_and_the_comparison():
    first, second = evaluation([0.0, 1.0], ["a b a b", "c"]), evaluation([1.0, 1.0], ["a", "b"])
    header, rows = table({"base": first, "ppo": second})
    cells = {row[0]: row[1:] for row in rows}
    assert all(len(row) == len(header) for row in rows)
    assert cells["share without EOS"][0].startswith("0.500 ± ") and cells["ended by EOS"] == ["50%", "50%"]
    assert cells["repeated bigrams"][0].startswith("0.167 ± ")  # 1/3 and 0
    assert cells["wins against base"][0] == "" and cells["wins against base"][1].startswith("0.500 ± ")
    assert cells["ties against base"][1].startswith("0.500") and cells["losses against base"][1].startswith(
        "0.000 [0.000"
    )
    assert "BLEU" not in cells and "perplexity under another model" not in cells
    assert "wins against base" not in {row[0] for row in table({"base": first, "x": evaluation([1.0])})[1]}
    json.dumps(second.summary(), allow_nan=False)
    assert second.summary()["text/distinct_1"]["mean"] == 1 and second.summary()["text/distinct_2"]["mean"] is None


def test_references_and_perplexity_reach_the_evaluation():
    rows = [
        {"prompt": "the cat", "reference": "sat"},
        {"prompt": "a dog", "reference": ["ran", "sat"]},
        {"prompt": "the"},
    ]
    envs, judge = make_envs(1, prompts=rows), (model(seed=3), tokenizer())
    from rlhf_gym.lm import load_language_model

    found = evaluate(None, envs, num_episodes=9, perplexity_model=load_language_model(*judge, device="cpu"))
    assert found.references == [["sat"], ["ran", "sat"], None] * 3
    assert {"rouge_l", "perplexity", "distinct_1", "self_bleu"} <= found.texts.keys()
    logprob, num_tokens = 0.0, 0
    for sample in found.samples:
        before, response = (tokenizer()(sample[name])["input_ids"] for name in ("prompt", "response"))
        with torch.no_grad():
            table_ = judge[0](input_ids=torch.tensor([before + response])).logits[0].log_softmax(-1)
        logprob += sum(float(table_[len(before) - 1 + i, token]) for i, token in enumerate(response))
        num_tokens += len(response)
    assert found.texts["perplexity"].mean == pytest.approx(math.exp(-logprob / num_tokens), rel=1e-4)

    with pytest.raises(ValueError, match="no prompt has a 'refrence'; the columns are 'reference' .did you mean 'ref"):
        evaluate(None, envs, reference_column="refrence")
    numbers = make_envs(1, prompts=[{"prompt": "the", "reference": 3}])
    assert evaluate(None, numbers).references is None  # a column of that name for something else
    with pytest.raises(ValueError, match="column 'reference' must be a string or a list of strings"):
        evaluate(None, numbers, reference_column="reference")


def test_texts_are_not_needed():
    assert replace(evaluation([0.0, 1.0]), samples=[]).texts == {}


def test_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sacrebleu")
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "other")):
        model(seed=seed).save_pretrained(name)
        tokenizer().save_pretrained(name)
    rows = [{"prompt": "the cat", "gold": "sat good"}, {"prompt": "a dog", "gold": ["ran", "sat"]}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        "evaluate --model other --prompts p.jsonl --reward length --max-response-tokens 6 --num-episodes 6".split()
    )
    more = "--reference base --reference-column gold --perplexity-model base".split()
    assert main([*command, *more]) == 0
    printed = capsys.readouterr().out
    for row in (
        "BLEU",
        "chrF",
        "ROUGE-L",
        "distinct-3",
        "self-BLEU",
        "perplexity",
        "wins against",
        "standard error of",
    ):
        assert row in printed
    assert "[low, high]" in printed and printed.index(" reference ┃") < printed.index(" other ┃")  # the baseline first
    assert main([*command, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_episodes"] == 6 and found["kl"]["standard_error"] > 0 and "text/bleu" in found
    assert sum(found[name]["mean"] for name in ("wins", "ties", "losses")) == pytest.approx(1)
    assert abs(found["reference"]["kl"]["mean"]) < 1e-5
    assert main([*command, "--reference", "base", "--no-win-rate"]) == 0
    assert "wins" not in capsys.readouterr().out
    assert main([*command, "--json"]) == 0  # without a reference there is nothing to compare with
    assert not {"kl", "wins", "text/bleu"} & json.loads(capsys.readouterr().out).keys()
