"""Numbers of the report against hand-made judgements."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_gym.data import DataError, Labelled, Preference, Rating
from rlhf_gym.reward_models import Ranking, load_judgements
from rlhf_gym.reward_models.baselines import TfIdf, fit_baseline
from rlhf_gym.reward_models.examples import as_examples, choose_join, hold_out
from rlhf_gym.reward_models.metrics import (
    Predictions,
    calibration_curve,
    calibration_error,
    measure,
    pairs_of,
    rank_correlation,
    wilson,
)
from rlhf_gym.reward_models.objectives import BinaryObjective, PreferenceObjective
from rlhf_gym.reward_models.report import LONGER, Report, predict

PAIRS = [
    Preference("a", "xxxx", "y", annotator="ann"),
    Preference("b", "x", "yyyy", annotator="ann"),
    Preference("c", "xx", "yy", annotator="bob"),
    Preference("d", "xxx", "yy", tie=True, annotator="bob"),
]
GOLD = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), None]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- judgements


def test_files_of_judgements(tmp_path):
    file = lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "b", "gold": "rejected", "margin": 2},
        {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True},
    )
    found = load_judgements(file)
    assert found.gold == [(0.0, 1.0), None] and not found.implicit
    items = as_examples(found.records, gold=found.gold).items
    assert [item.ranks for item in items] == [(0.0, 1.0), (0.0, 0.0)]
    assert items[0].margin == 2 and items[0].gold == (0.0, 1.0)
    file = lines(
        tmp_path / "ranks.jsonl", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 1], "annotator": 7}
    )
    assert load_judgements(file).records == [Ranking("p", ("a", "b", "c"), (2.0, 1.0, 1.0), "7")]
    assert load_judgements(lines(tmp_path / "implicit.jsonl", {"chosen": "it is a", "rejected": "it is b"})).implicit


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1]},
            "line 1, column 1: 'ranks' must hold a number for each",
        ),
        ({"prompt": "p", "responses": ["a", 1], "ranks": [1, 2]}, "a ranking needs a 'prompt'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "gold": "left"}, "line 1: 'gold' must be 'chosen' or"),
        ({"prompt": "p", "completion": "a", "rating": 2, "gold": "x"}, "'gold' must be a number for each response"),
        ({"prompt": "p"}, "prompt-only"),
    ],
)
def test_refused_files(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_judgements(lines(tmp_path / "x.jsonl", row))


def test_ratings_by_one_criterion_of_several(tmp_path):
    rows = [
        {"prompt": "p", "completion": text, "rating": rating, "criterion": name, "gold": gold}
        for text, name, rating, gold in (("a", "kind", 1, 9), ("a", "true", 2, 8), ("b", "kind", 3, 7))
    ]
    file = lines(tmp_path / "x.jsonl", *rows)
    found = load_judgements(file, criterion="kind")
    assert [record.rating for record in found.records] == [1, 3] and found.gold == [(9.0,), (7.0,)]
    with pytest.raises(DataError, match="no rating by 'short'; it has kind, true"):
        load_judgements(file, criterion="short")
    with pytest.raises(DataError, match="no rating by 'kind'; it has no criterion"):
        load_judgements(lines(tmp_path / "y.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}), criterion="kind")


def test_kinds_are_told_by_the_records():
    rating = [Rating("p", "a", 1.0), Rating("q", "b", 3.0)]
    assert as_examples(rating).kind == "regression"
    levels = as_examples(rating, kind="ordinal")
    assert levels.classes == ("1", "3") and [item.target for item in levels.items] == [0, 1]
    truth = as_examples([Labelled("p", "a", True), Labelled("p", "b", False)])
    assert truth.kind == "binary" and truth.classes == ("False", "True") and truth.items[0].target == 1
    names = [Labelled("p", "a", "pos"), Labelled("p", "b", "neg")]
    assert as_examples(names).items[0].target == 1
    turned = as_examples(names, positive_label="neg")
    assert turned.classes == ("pos", "neg") and turned.items[0].target == 0
    numbers = as_examples([Labelled("p", "a", n) for n in (10, 9, 2)])
    assert numbers.kind == "multi-class" and numbers.classes == ("2", "9", "10")
    for records, more, message in (
        (rating, {"kind": "preference"}, "kind must be 'regression' or 'ordinal'"),
        ([*rating, *names], {}, "got Labelled, Rating"),
        ([names[0]], {}, "at least two classes"),
        ([Rating("p", "a", 1.0, "style"), Rating("p", "a", 2.0, "truth")], {}, "one criterion, got style, truth"),
        (names, {"classes": ("neg", "neutral")}, "must be among those trained on"),
        ([], {}, "at least one judgement"),
    ):
        with pytest.raises(ValueError, match=message):
            as_examples(records, **more)


def test_held_out_prompts_are_on_one_side():
    records = [Preference(f"prompt {i % 40}", f"a{i}", "b") for i in range(200)]
    train, held_out = hold_out(as_examples(records), 0.25, seed=0)
    sides = [{item.prompt for item in side.items} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 200 and len(sides[1]) > 3
    few = as_examples([Preference(f"{i}", "a", "b") for i in range(2)])
    assert [len(side) for side in hold_out(few, 0.01, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="one prompt only"):
        hold_out(as_examples(records[:1]), 0.5, seed=0)


def test_join():
    def join(*texts):
        return choose_join(as_examples([Preference(p, a, b) for p, a, b in texts]))

    assert join(("the lid", "is good", "is bad")) == " "
    assert join(("the lid", " is good", "is bad")) == ""  # TRL's form: the file knows where spaces go
    assert join(("你好", "世界", "我")) == "" and join(("", "good", "bad")) == "" and join(("a:", "b", "c")) == ""


# ---- metrics


def test_the_score_of_classes_is_the_probability_of_the_one_that_is_paid():
    examples = as_examples([Labelled("p", "a", name) for name in ("bad", "cat", "good")])
    outputs = np.log([[[0.2, 0.3, 0.5]] * 3])
    found = [predict(examples, outputs, [np.zeros(0)], [(0.0, 1.0)], paid=paid).scores[0] for paid in (0, 1, -1)]
    np.testing.assert_allclose(found, [0.2, 0.3, 0.5])


def test_pairs_of_a_ranking():
    pairs = pairs_of(as_examples([Ranking("p", ("a", "b", "c"), (2, 1, 1))]).items)
    assert list(zip(pairs.better, pairs.worse, pairs.tied, strict=True)) == [(1, 0, False), (2, 0, False), (1, 2, True)]


def test_preference_numbers_by_hand():
    examples = as_examples(PAIRS, gold=GOLD)
    scores = np.array([2.0, 1.0, 0.0, 1.0, 5.0, 5.0, 1.0, 0.0])  # right, wrong, equal, tie
    p = 1 / (1 + math.exp(-1))
    found = measure(examples, Predictions(scores, np.array([p, 1 - p, 0.5, p])))
    assert found["accuracy"].mean == pytest.approx(0.5)
    tie = -(math.log(p) + math.log(1 - p)) / 2
    assert found["log_loss"].mean == pytest.approx((-math.log(p) - math.log(1 - p) + math.log(2) + tie) / 4)
    # confidence p: one right of two, twice; confidence .5: half right
    assert found["ece"] == pytest.approx((2 * abs(0.5 - p) + 0) / 3)
    assert {name: (n, e.mean) for name, (n, e) in found["annotators"].items()} == {"ann": (2, 0.5), "bob": (2, 0.5)}
    # gold says: a right, b wrong side (gold prefers the rejected one, as the scores do), c nothing, d unknown
    assert found["gold"]["agreement"].mean == 1.0 and found["gold"]["agreement_of_the_judgements"].mean == 0.5
    longer = measure(examples, Predictions(np.array([4.0, 1, 1, 4, 2, 2, 3, 2])))
    assert longer["accuracy"].mean == pytest.approx(0.5) and longer["length_correlation"] == pytest.approx(1.0)
    assert "log_loss" not in longer


def test_calibration():
    confidence, right = np.array([0.55, 0.65, 0.66, 0.95]), np.array([1.0, 0.0, 1.0, 1.0])
    curve = calibration_curve(confidence, right)
    assert [(round(s["confidence"], 4), s["accuracy"], s["count"]) for s in curve] == [
        (0.55, 1.0, 1),
        (0.655, 0.5, 2),
        (0.95, 1.0, 1),
    ]
    assert calibration_error(confidence, right) == pytest.approx((0.45 + 2 * 0.155 + 0.05) / 4)
    three = calibration_curve(np.array([0.35, 0.9]), np.array([0.0, 1.0]))  # more classes: steps from 0
    assert [s["count"] for s in three] == [1, 1]


def test_wilson():
    low, high = wilson(np.array([1.0, 0.0]), np.array([10, 10]))
    np.testing.assert_allclose([low[0], high[0]], [0.722, 1.0], atol=1e-3)  # Brown, Cai and DasGupta 2001
    np.testing.assert_allclose([low[1], high[1]], [0.0, 0.278], atol=1e-3)


def test_label_numbers_by_hand():
    items = [Labelled("p", "aa", "no"), Labelled("q", "a", "yes"), Labelled("r", "aaa", "yes")]
    logits = np.array([[-1.0], [2.0], [-2.0]])[None]
    predictions = predict(as_examples(items), logits, [np.zeros(0)], [(0.0, 1.0)])
    found = measure(as_examples(items), predictions)
    assert found["accuracy"].mean == pytest.approx(2 / 3)
    assert found["log_loss"].mean == pytest.approx(np.log(1 + np.exp([-1.0, -2.0, 2.0])).mean())
    rated = as_examples([Rating("p", "a", 1.0), Rating("q", "b", 2.0), Rating("r", "c", 5.0)])
    outputs = np.array([[0.0], [1.0], [1.5]])[None]
    found = measure(rated, predict(rated, outputs, [np.zeros(0)], [(1.0, 2.0)]))  # 1, 3, 4
    assert found["rmse"] == pytest.approx(math.sqrt(2 / 3)) and found["rank_correlation"] == 1.0
    levels = as_examples([Rating("p", "a", 1.0), Rating("q", "b", 2.0), Rating("r", "c", 5.0)], kind="ordinal")
    far = predict(levels, np.array([[-40.0], [0.0], [40.0]])[None], [np.array([-20.0, 20.0])], [(0.0, 1.0)])
    np.testing.assert_allclose(far.values, [0, 1, 2], atol=1e-6)
    assert measure(levels, far)["accuracy"].mean == 1.0


def test_members_are_averaged_as_probabilities():
    examples = as_examples([Labelled("p", "a", True), Labelled("q", "b", False)])
    outputs = np.array([[[2.0], [0.0]], [[-1.0], [0.0]]])
    found = predict(examples, outputs, [np.zeros(0)] * 2, [(0.0, 1.0)] * 2)
    expected = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(1))) / 2
    np.testing.assert_allclose(found.probabilities[:, 1], [expected, 0.5])


def test_rank_correlation_with_ties_and_unknown():
    assert rank_correlation(np.array([1.0, 2, 3, 9]), np.array([10.0, 20, 20, np.nan])) == pytest.approx(
        math.sqrt(0.75)
    )
    assert rank_correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None


# ---- baselines


def test_tfidf_by_hand():
    vectors = TfIdf(["Good cat!", "good dog", "good, good cat"], 1)
    assert list(vectors.place) == ["cat", "good"]  # "dog" occurs in one text only
    idf = {"cat": 1 + math.log(4 / 3), "good": 1.0}
    np.testing.assert_allclose(vectors.idf, [idf["cat"], idf["good"]])
    row = np.array([idf["cat"], 1 + math.log(2)])
    np.testing.assert_allclose(vectors(["cat good good bird", ""]).toarray(), [row / np.linalg.norm(row), [0, 0]])
    assert list(TfIdf(["a b", "a b c"], 2).place) == ["a", "a b", "b"]


def test_baselines_find_words_and_pairs_of_words():
    rng = np.random.default_rng(0)
    fillers = ["cat", "dog", "sat", "ran"]
    pairs = []
    for i in range(80):
        same = " ".join(rng.choice(fillers, 3))
        pairs.append(Preference(f"{i}", f"{same} not bad", f"bad not {same}"))
    examples = as_examples(pairs)
    accuracy = {}
    for order in (1, 2):
        outputs = fit_baseline(examples, PreferenceObjective(), order)(examples)
        found = predict(examples, outputs[None], [np.zeros(0)], [(0.0, 1.0)])
        accuracy[order] = measure(examples, found)["accuracy"].mean
    assert accuracy[1] == pytest.approx(0.5, abs=0.01)  # the same words in another order
    assert accuracy[2] == 1.0
    labels = as_examples([Labelled(f"{i} good", "x", True) for i in range(20)] + [Labelled("bad", "x", False)] * 20)
    outputs = fit_baseline(labels, BinaryObjective(), 1)(labels)
    assert (outputs[:20] > 0).all() and (outputs[20:] < 0).all()  # labels: the prompt is read as well


def test_report_table_and_files(tmp_path):
    examples = as_examples(PAIRS, gold=GOLD)
    scores = np.array([2.0, 1.0, 0.0, 1.0, 5.0, 5.0, 1.0, 0.0])
    p = np.array([0.7, 0.4, 0.5, 0.7])
    models = {"reward model": Predictions(scores, p), LONGER: Predictions(np.array([4.0, 1, 1, 4, 2, 2, 3, 2]))}
    report = Report("preference", 4, 4, 1, {name: measure(examples, each) for name, each in models.items()})
    header, rows = report.table()
    cells = {row[0]: row[1:] for row in rows}
    assert header == ["", "reward model", "longer"]
    assert cells["accuracy"][0].startswith("0.500") and cells["log-loss, nats"][1] == ""
    assert cells["accuracy, ann (2)"][0].startswith("0.500") and cells["agreement with gold"][0].startswith("1.000")
    report.save(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["models"]["reward model"]["accuracy"]["mean"] == 0.5
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "Judged equal: 1 of" in (tmp_path / "README.md").read_text()
