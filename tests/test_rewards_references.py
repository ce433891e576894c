"""Rewards against references and answers: numbers worked out by hand, and what happens when something is missing."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
from worlds import make_envs

from rlhf_gym.rewards import (
    RewardError,
    RewardInputs,
    as_reward,
    bleu,
    chrf,
    exact_match,
    numeric_answer,
    rouge_l,
    token_f1,
)
from rlhf_gym.rewards.numeric import last_number
from rlhf_gym.rewards.overlap import choose_tokenizer, chrf_metric, lcs_length, squad_words

GSM8K = Path(__file__).parents[1].parent / "shared/assets/data/gsm8k/test.jsonl"


def score(reward, text, cell):
    """Score of one response against one cell."""
    return reward([text], [cell])[0]


# ---- overlap


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("the cat sat", "the cat sat", 1),
        # 5/6, 3/5, 1/4, and 0/3 which smoothing makes 1/(2*3)
        ("the cat sat on the mat", "the cat is on the mat", (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25),
        ("cat", "the cat", math.exp(1 - 2)),  # one order only, and the brevity penalty
        (
            "the the the",
            "the cat",
            (1 / 3 * 1 / 4 * 1 / 4) ** (1 / 3),
        ),  # clipped: "the" counts once; 0/2 and 0/1 smoothed
        ("the cat", ["a dog", "the cat"], 1),
        ("", "the cat", 0),
        ("dog", "the cat", 0),
        # zh: 3/3, 1/2, 0/1 smoothed to 1/2, and 3 letters where 4 were wanted
        ("我爱你", "我很爱你", (1 * 1 / 2 * 1 / 2) ** (1 / 3) * math.exp(1 - 4 / 3)),
    ],
)
def test_bleu(text, references, expected):
    pytest.importorskip("sacrebleu")
    assert score(bleu(), text, references) == pytest.approx(expected, abs=1e-12)


def test_bleu_needs_a_tokenizer_where_there_are_no_spaces():
    pytest.importorskip("sacrebleu")
    assert score(bleu(tokenize="13a"), "我爱你", "我很爱你") == 0  # as a whole it is another word
    assert choose_tokenizer(["我很爱你, OK", "是"]) == "zh" and choose_tokenizer(["ねこ が 好き"]) == "char"
    assert choose_tokenizer(["The word 我 means I"]) == "13a" and choose_tokenizer([""]) == "13a"
    with pytest.raises(ValueError, match="bleu: tokenize must be one of '13a', .* got 'flores200'"):
        bleu(tokenize="flores200")


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        # orders 1 and 2: precision 1, recall (2/3 + 1/2)/2 = 7/12; F2 = 5 P R / (4 P + R)
        ("ab", "abc", 5 * 7 / 12 / (4 + 7 / 12)),
        ("ab", ["xyz", "ab"], 1),
        ("a b", "ab", 1),  # white space does not count
        ("", "ab", 0),
        ("我爱", "我爱你", 5 * 7 / 12 / (4 + 7 / 12)),
    ],
)
def test_chrf(text, references, expected):
    pytest.importorskip("sacrebleu")
    assert score(chrf(), text, references) == pytest.approx(expected, abs=1e-12)


def test_chrf_plus_plus_counts_words():
    pytest.importorskip("sacrebleu")
    assert score(chrf(word_order=2), "b a", "a b") < 1 == score(chrf(word_order=2), "a b", "a b")
    with pytest.raises(ValueError, match="word_order must be 0, 1 or 2, got 3"):
        chrf(word_order=3)


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004: S2 and S3 against S1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d", "b d", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("b d", ["x", "a b c d"], 2 / 3),  # the better one
        ("The CAT!", "the cat", 1),
        ("", "the cat", 0),
        ("...", "the cat", 0),
        ("我爱你。", "我很爱你", 6 / 7),  # 3 of 3 and 3 of 4 letters
    ],
)
def test_rouge_l(text, references, expected):
    assert score(rouge_l(), text, references) == pytest.approx(expected, abs=1e-12)


def test_lcs_is_that_of_the_table():
    def table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    draw = random.Random(0)
    for _ in range(200):
        a, b = (draw.choices("abcd", k=draw.randrange(90)) for _ in range(2))
        assert lcs_length(a, b) == table(a, b)


@pytest.mark.parametrize(
    ("text", "answers", "match", "f1"),
    [
        ("The  Seine.", "seine", 1, 1),
        ("the river Seine", "Seine", 0, 2 * 0.5 * 1 / 1.5),
        ("Seine", ["River Seine", "the Seine"], 1, 1),
        ("b c", "a b b c", 0, 2 * 1 * (2 / 3) / (5 / 3)),  # "a" is an article: 2 of 3 words
        ("b b b", "b", 0, 2 * (1 / 3) / (4 / 3)),  # saying it again does not pay
        ("", "Paris", 0, 0),
        ("", "", 1, 1),  # SQuAD 2.0: there is no answer
        ("Paris", "", 0, 0),
        ("", "A", 0, 0),  # multiple choice: an article is not nothing
        ("(A)", "A", 1, 1),
        ("我爱你。", "我 爱 你", 1, 1),
        ("我爱你", "我很爱你", 0, 6 / 7),
    ],
)
def test_exact_match_and_f1(text, answers, match, f1):
    assert score(exact_match(), text, answers) == match
    assert score(token_f1(), text, answers) == pytest.approx(f1, abs=1e-12)


def test_exact_match_as_written():
    plain = exact_match(normalize=False)
    assert plain([" 4\n", "4.", "Four"], ["4", "4", "four"]) == [1, 0, 0]
    assert squad_words("An apple: «the» pie") == ["apple", "pie"]


# ---- numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 * 14 = 42.", 42),
        ("So -$1,250.50 in all", -1250.5),
        ("1,234,567", 1234567),
        ("1,23", 23),
        ("1,2,3", 3),
        ("1,2345", 2345),
        ("half is .5", 0.5),
        ("1.5e-3", 0.0015),
        ("3/4", 0.75),
        ("3 1/4 cups", 3.25),
        ("-2 1/2", -2.5),
        ("2½", 2.5),
        (r"\boxed{-\frac{1}{2}}", -0.5),
        (r"2\frac{1}{2}", 2.5),
        ("7, or 1/0", 7),
        ("on 3/4/2025", 2025),
        ("50%", 50),
        ("7-4", 4),
        ("(3)-4", 4),
        ("−7", -7),
        ("x=-7", -7),
        ("答案是-5。", -5),
        ("４２", 42),
        ("٤٢", 42),
        ("42 of H2O and B12", 42),
        ("10²", 10),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == (None if expected is None else pytest.approx(expected, rel=1e-15))


def test_numeric_answer():
    exact = numeric_answer()
    assert exact(["It is 1,000.", "1000", "none", ""], ["#### 1000", 1000, 1, 1]) == [1, 1, 0, 0]
    assert exact(["about .333", "1/3", "50%", "50%"], ["1/3", "1/3", "50", "0.5"]) == [0, 1, 1, 0]
    assert exact(["4 or 5", "5 or 4"], [[4, "3"], [4, "3"]]) == [0, 1]  # the last one counts
    assert exact(["9" * 400, "7"], [7, None]) == [0, None]  # too large for a float is no answer
    rough = numeric_answer(tolerance=0.01)
    assert rough(["100.9", "101.1", "0.009", "0.011"], [100, 100, 0, 0]) == [1, 0, 1, 0]  # relative, but not below 1
    for bad in (-1, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="tolerance must be a finite number >= 0"):
            numeric_answer(tolerance=bad)


@pytest.mark.skipif(not GSM8K.exists(), reason="real data not present")
def test_numeric_answer_on_real_solutions():
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    finals, solutions = [row["final"] for row in rows], [row["answer"] for row in rows]
    assert len(rows) > 1000 and sum(numeric_answer()(finals, solutions)) == len(rows)
    assert sum(numeric_answer()(finals[1:] + finals[:1], solutions)) < 0.1 * len(rows)


# ---- columns


def inputs(**columns):
    n = len(next(iter(columns.values())))
    return RewardInputs(["p"] * n, ["a b"] * n, [[1]] * n, [[5, 0]] * n, columns)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("bleu", "reference"),
        ("chrf", "reference"),
        ("rouge_l", "reference"),
        ("exact_match", "answer"),
        ("token_f1", "answer"),
    ],
)
def test_names_and_columns(name, column):
    if name in ("bleu", "chrf"):
        pytest.importorskip("sacrebleu")
    reward = as_reward(name)
    assert reward.names == (name,) and reward.columns_needed == (column,)
    scores = reward.score(inputs(**{column: ["a b", ["x", "a b"], None, "x"]}))
    assert scores.total.tolist() == [1, 1, 0, 0] and math.isnan(scores.terms[name][2])  # None: does not apply
    with pytest.raises(RewardError, match=f"asks for the column '{column}', .*did you mean '{column}s'"):
        reward.check_columns([f"{column}s"])


def test_a_column_of_another_name_reaches_the_reward():
    prompts = [{"prompt": "the", "gold": ["cat", "dog"]}, {"prompt": "a", "gold": "dog"}]
    envs = make_envs(
        2, reward={rouge_l("gold"): 1.0, numeric_answer("n"): 1.0}, prompts=[p | {"n": 3} for p in prompts]
    )
    assert envs.unwrapped.reward.columns_needed == ("gold", "n")
    with pytest.raises(ValueError, match="asks for the column 'gold'"):
        make_envs(1, reward=rouge_l("gold"))
    for column in ("completions", "prompt", "two words", "", None):
        with pytest.raises(ValueError, match="rouge_l: column must be a name that Python allows"):
            rouge_l(column)


@pytest.mark.parametrize(
    ("reward", "cell", "says"),
    [
        (rouge_l, 4, "row 1: the column 'reference' must be a string or a list of strings, not an empty one, got 4"),
        (rouge_l, [], r"not an empty one, got \[\]"),
        (rouge_l, ["a", None], r"got \['a', None\]"),
        (rouge_l, " ", "row 1: the column 'reference' must not be blank; use None"),
        (exact_match, 4, "row 1: the column 'answer' must be a string"),
        (numeric_answer, "four", "row 1: the column 'answer' must hold a number, .* got 'four'"),
        (numeric_answer, True, "must hold a number, .* got True"),
        (numeric_answer, [1, math.nan], r"must hold a number, .* got \[1, nan\]"),
    ],
)
def test_bad_cells_are_named(reward, cell, says):
    column = "reference" if reward is rouge_l else "answer"
    with pytest.raises(RewardError, match=says):
        as_reward(reward()).score(inputs(**{column: ["1", cell]}))


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    chrf_metric.cache_clear()
    for make in (bleu, chrf, lambda: as_reward("bleu")):
        with pytest.raises(ImportError, match=r"needs sacrebleu .*: pip install rlhf_gym\[metrics\]"):
            make()
    assert score(rouge_l(), "a", "a") == 1
