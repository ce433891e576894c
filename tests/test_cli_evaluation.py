"""Evaluation against numbers by hand and log-probs by plain transformers; the page and the model card made from it."""

from __future__ import annotations

import html.parser
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from worlds import EOS, PROMPTS, goodness, make_env, make_envs, model, tokenizer

from rlhf_gym.evaluation import Evaluation, evaluate
from rlhf_gym.plots import curves, histogram, running_mean
from rlhf_gym.report import Section, html_report, model_card, note, table
from rlhf_gym.rewards import normalize


def evaluation(scores, prompt_index, kl=None):
    scores, n = np.asarray(scores, dtype=float), len(scores)
    return Evaluation(
        scores=scores,
        terms={"f": scores},
        kl=None if kl is None else np.asarray(kl, dtype=float),
        lengths=np.full(n, 4),
        ended_by_eos=np.arange(n) % 2 == 0,
        others={},
        prompt_index=np.asarray(prompt_index),
        samples=[],
    )


def test_interval_is_over_prompts():
    """Prompt 0 has mean 1, prompt 1 mean 3: s = sqrt(2), error 1, and t(0.975, 1) = 12.7062; the number of samples does not matter."""
    for copies in (1, 5):
        found = evaluation([0.0, 2.0, 3.0] * copies, [0, 0, 1] * copies).score
        assert (found.mean, found.standard_error) == pytest.approx((2.0, 1.0))
        assert (found.low, found.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    three = evaluation([1.0, 2.0, 6.0], [0, 1, 2]).score  # s^2 = 7, t(0.975, 2) = 4.30265
    assert three.high - three.mean == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)


def test_of_one_prompt_the_responses_are_the_draws():
    """Scores 1 and 3: s = sqrt(2), error 1, t(0.975, 1) = 12.7062; one of two is [.0945, .9055] by Wilson."""
    found = evaluation([1.0, 3.0], [7, 7])
    assert (found.score.mean, found.score.standard_error) == pytest.approx((2.0, 1.0))
    assert (found.score.low, found.score.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    share = replace(found, samples=[{"prompt": "p", "response": "a b"}] * 2).texts["share_without_eos"]
    assert (share.low, share.mean, share.high) == pytest.approx((0.0945, 0.5, 0.9055), abs=1e-4)
    assert found.summary()["intervals_over"] == "responses" and "over responses to the one prompt" in note({"": found})

    several = evaluation([1.0, 3.0, 3.0], [0, 0, 1])
    assert several.summary()["intervals_over"] == "prompts" and "over prompts" in note({"": several})
    # The likeliest response again and again is one draw, and one response is no sample.
    for alone in (replace(found, greedy=True), evaluation([1.0], [0])):
        assert alone.score.low is None and alone.summary()["intervals_over"] is None
        assert "without intervals" in note({"": alone})


def test_evaluate_tells_whether_responses_are_draws():
    env = make_env(prompts=["the cat"])
    sampled, likeliest = (evaluate(None, env, num_episodes=4, greedy=greedy) for greedy in (False, True))
    assert sampled.intervals_over == "responses" and sampled.estimate(sampled.lengths.astype(float)).high is not None
    assert likeliest.intervals_over is None and len({s["response"] for s in likeliest.samples}) == 1


def test_nan_is_left_out():
    assert evaluation([1.0, math.nan, 3.0], [0, 1, 2]).score.mean == 2
    assert evaluation([math.nan], [0]).summary()["score"]["mean"] is None  # NaN is not JSON


@pytest.fixture(scope="module")
def found():
    """A policy that is not the reference, evaluated on 12 responses."""
    envs = make_envs(2, kl_coef=0.3)
    policy = model(seed=1)
    return evaluate(policy, envs, num_episodes=12, seed=5), policy, envs


def test_scores_are_the_reward_of_the_texts(found):
    result, _, envs = found
    assert [s["prompt"] for s in result.samples] == [PROMPTS[i % 4] for i in range(12)]
    assert result.scores.tolist() == goodness([s["response"] for s in result.samples])
    assert len(set(result.scores.tolist())) > 1 and envs.unwrapped.kl_coef == 0.3


def test_kl_is_that_of_plain_transformers(found):
    result, policy, envs = found
    reference = envs.unwrapped.language_model.model
    num_checked = 0
    for b, sample in enumerate(result.samples):
        prompt = tokenizer()(sample["prompt"])["input_ids"]
        response = tokenizer()(sample["response"])["input_ids"]
        ending = [EOS] if sample["stop_reason"] == "eos" else []
        if sample["num_tokens"] != len(response + ending):
            continue  # special tokens inside: the text does not give the ids back
        ids = prompt + response + ending
        num_checked += 1
        with torch.no_grad():
            logprobs = [m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for m in (policy, reference)]
        tokens = torch.tensor(ids)
        difference = sum(
            float(logprobs[0][t - 1, tokens[t]] - logprobs[1][t - 1, tokens[t]]) for t in range(len(prompt), len(ids))
        )
        assert result.kl[b] == pytest.approx(difference, abs=1e-4)
    assert num_checked >= 3 and result.kl.mean() > 0.5


def test_the_reference_is_at_kl_zero_and_seeds_repeat():
    env = make_env()
    first, again, other = (evaluate(None, env, num_episodes=6, seed=seed) for seed in (1, 1, 2))
    assert abs(first.kl).max() < 1e-5
    assert [s["response"] for s in first.samples] == [s["response"] for s in again.samples]
    assert [s["response"] for s in first.samples] != [s["response"] for s in other.samples]


def test_greedy_and_batching_do_not_depend_on_rows():
    env = make_env()
    one, many = (evaluate(model(seed=3), env, greedy=True, num_rows=rows) for rows in (1, 4))
    assert [s["response"] for s in one.samples] == [s["response"] for s in many.samples]


def test_held_out_prompts_keep_their_columns_and_other_rewards_are_reported():
    def matches(completions, wanted):
        return [float(w in text) for text, w in zip(completions, wanted, strict=True)]

    envs = make_envs(1, reward=matches, prompts=[{"prompt": "the", "wanted": "cat"}], max_prompt_tokens=4)
    held_out = [{"prompt": "a dog", "wanted": "sat"}, {"prompt": "a cat", "wanted": "ran"}]
    result = evaluate(None, envs, prompts=held_out, num_episodes=8, others={"goodness": goodness})
    texts = [s["response"] for s in result.samples]
    assert result.scores.tolist() == [float(w in text) for text, w in zip(texts, ["sat", "ran"] * 4, strict=True)]
    assert result.others["goodness"].tolist() == goodness(texts) == [s["goodness"] for s in result.samples]
    assert len(envs.unwrapped.prompts) == 1
    with pytest.raises(ValueError, match="column 'wanted'"):
        evaluate(None, envs, prompts=["a dog"])
    with pytest.raises(ValueError, match="num_episodes"):
        evaluate(None, envs, num_episodes=0)


# ---- what is made of it


class Page(html.parser.HTMLParser):
    """Tags, addresses and text of a page; every tag must be closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_one_file_and_escapes_what_models_write():
    evil = "</td><script>alert(1)</script> & \x1b[31m $title"
    figure = curves({"<b>": {"timesteps": [1, 2], "objective/scores": [0.1, 0.2], "objective/kl": [0.0, math.nan]}})
    section = Section("A & B", "see `x < y`", figure, 'a "caption"', ["prompt", "response"], [["p", evil]])
    page = Page(
        html_report("T <1>", "sum", [section, Section("C", figure=histogram({"a": [0.0, 1.0], "b": [1.0]}, "score"))])
    )
    assert (
        "script" not in page.tags
        and "</td><script>alert(1)</script> & \N{REPLACEMENT CHARACTER}[31m $title" in page.text
    )
    assert len(page.addresses) == 2 and all(
        address.startswith("data:image/svg+xml;base64,") for address in page.addresses
    )
    assert page.tags.count("code") == 1 and "T <1>" in page.text


def test_running_mean():
    assert running_mean([0.0, 3.0, 6.0, math.nan, 12.0], 1) == [1.5, 3, 4.5, 9, 12]


def test_table_and_model_card():
    before, after = evaluation([0.0, 1.0], [0, 1], kl=[0, 0]), evaluation([2.0, 3.0], [0, 1], kl=[1, 3])
    header, rows = table({"before": before, "after": after})
    assert header == ["", "before", "after"]
    assert rows[0] == ["score", "0.500 ± 6.353", "2.500 ± 6.353"]  # 12.706 / 2
    assert ["KL to the reference, nats", "0.000 ± 0.000", "2.000 ± 12.706"] in rows and [
        "ended by EOS",
        "50%",
        "50%",
    ] in rows
    options = {"agent": "ppo", "reward": ("m:f",), "prompts": "p.jsonl", "eval_prompts": None, "kl_coef": 0.05}
    card = model_card(options=options, base_model="base", before=before, after=after)
    assert "| score | 0.500 ± 6.353 | 2.500 ± 6.353 |" in card and "`m:f`" in card and "kl_coef: `0.05`" in card


def test_what_a_reward_remembers_is_not_moved_by_evaluations_or_failures():
    fails = []

    def fallible(completions):
        if fails:
            raise RuntimeError("no answer")
        return [0.0] * len(completions)

    envs = make_envs(
        2, reward={"n": (normalize(goodness), 1.0), "f": (fallible, 1.0)}, metrics={"m": normalize(goodness)}
    )
    scorer = envs.unwrapped.process.scorer
    start = scorer.memory()
    evaluate(None, envs, num_episodes=4)
    assert scorer.memory() == start == [{"count": 0, "mean": 0.0, "m2": 0.0}] * 2
    prompts, responses, ended = envs.unwrapped.process.prompts[:2], [[4, EOS], [5, EOS]], np.ones(2, dtype=bool)
    fails.append(True)
    with pytest.raises(ValueError, match="no answer"):
        scorer.score(prompts, responses, ended)
    assert scorer.memory() == start
    fails.clear()
    assert scorer.score(prompts, responses, ended).totals.tolist() == pytest.approx([1, -1], abs=1e-6)  # "good", "bad"
    assert [part["count"] for part in scorer.memory()] == [2, 2]


@pytest.mark.parametrize(
    ("column", "reward", "says"),
    [
        ("completions", goodness, "a column cannot be named 'completions'"),
        ("answer", lambda answer: 0.0, "'answer' would receive the response"),
    ],
)
def test_columns_of_a_taken_name_are_found_when_the_environment_is_made(column, reward, says):
    with pytest.raises(ValueError, match=says):
        make_envs(1, prompts=[{"prompt": "the", column: "x"}], reward=reward)
    with pytest.raises(ValueError, match=says):
        make_envs(1, prompts=[{"prompt": "the", column: "x"}], metrics={"m": reward})


def test_clone_state_knows_what_a_reward_remembers():
    envs = make_envs(1, reward=normalize(goodness)).unwrapped
    state = envs.clone_state()
    envs.process.scorer.score(envs.process.prompts[:1], [[4, EOS]], np.ones(1, dtype=bool))
    assert envs.process.scorer.memory()[0]["count"] == 1
    envs.restore_state(state)
    assert envs.process.scorer.memory() == [{"count": 0, "mean": 0.0, "m2": 0.0}]


def test_a_device_without_a_model_is_checked_as_well():
    with pytest.raises(ValueError, match="device must be .* got 'foo'"):
        gym.make_vec(
            "rlhf_gym/TextGeneration-v0", tokenizer=tokenizer(), prompts=["the"], reward=goodness, device="foo"
        )
