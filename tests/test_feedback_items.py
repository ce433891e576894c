"""Items from files and runs, and the numbers of a store."""

from __future__ import annotations

import json
import math

import pytest

from rlhf_gym.data import DataError
from rlhf_gym.feedback import Comparison, FeedbackStore, Item, Judgement, Score, Skip, Undo
from rlhf_gym.feedback.items import items_of_run, read_items
from rlhf_gym.feedback.summary import summarise


@pytest.fixture
def write(tmp_path):
    def to(name, *rows):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file

    return to


ROW = {"prompt": "p", "responses": ["a", "b"]}


def test_rows_become_items(write):
    full = {"id": 7, "gold": 1, "checkpoint": "step-3", "sampling": {"temperature": 0.5}, "gap": 2, "other": [1]}
    source = read_items(write("f.jsonl", ROW | full, ROW | {"gap": -0.5}), order_by="gap")
    assert source.items[0] == Item("p", ("a", "b"), "step-3", {"temperature": 0.5}, 1, "7")
    assert source.items[1] == Item("p", ("a", "b")) and list(source.numbers.values()) == [2.0, -0.5]
    assert read_items(write("g.jsonl", ROW)).numbers == {}


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ('{"responses": ["a", "b"]}', 1, '"prompt" must be a text'),
        ('{"prompt": [], "responses": ["a", "b"]}', 12, '"prompt" must be a text'),
        ('{"prompt": "p"}', 1, '"responses" must be a list of at least one text'),
        ('{"prompt": "p", "responses": []}', 30, '"responses" must be a list'),
        ('{"prompt": "p", "responses": ["a", 3]}', 36, "a response must be a text"),
        (
            '{"prompt": "p", "responses": ["a"], "gold": 1, "gap": 0}',
            45,
            "gold must be a response of the item, 0 to 0, got 1",
        ),
        ('{"prompt": "p", "responses": ["a"], "sampling": 1}', 49, '"sampling" must be an object'),
        ('{"prompt": "p", "responses": ["a"], "gap": "high"}', 44, '"gap" must be a number'),
        ('{"prompt": "p", "responses": ["a"], "gap": true}', 44, '"gap" must be a number'),
        ('{"prompt": "p", "responses": ["a"]}', 1, '"gap" must be a number'),
        (
            '{"prompt": "p", "responses": ["' + "x" * 50_001 + '"], "gap": 1}',
            31,
            "at most 50,000 characters, got 50,001",
        ),
        ('{"prompt": "p", "responses": ["a", "b"], "gap": 1}', 1, "stands in an earlier row"),
    ],
)
def test_bad_rows_are_named_with_their_place(write, row, column, message):
    with pytest.raises(DataError, match=message) as error:
        read_items(write("f.jsonl", ROW | {"gap": 0}, row), order_by="gap")
    assert f"line 2, column {column}: " in str(error.value)


def sample(prompt, response, score=0.0):
    return {"prompt": prompt, "response": response, "score": score}


def test_a_run_is_compared_with_what_it_was_before(write):
    write("run/config.json", {"options": {"temperature": 0.7, "top_k": None, "seed": 3, "model": "x"}})
    write("run/samples_before.jsonl", sample("p", "a", 0.1), sample("q", "same"), sample("p", "c", 0.9))
    file = write("run/samples_after.jsonl", sample("p", "b", 0.5), sample("q", "same"), sample("p", "d", 0.2))
    source = items_of_run(file.parent, "score")
    assert [item.responses for item in source.items] == [("a", "b"), ("c", "d")]
    assert list(source.numbers.values()) == [0.5, 0.9]
    assert (source.items[0].checkpoint, source.items[0].sampling) == (
        "run: before and after",
        {"temperature": 0.7, "seed": 3},
    )
    (file.parent / "samples_before.jsonl").unlink()
    assert [item.responses for item in items_of_run(file.parent).items] == [("b", "d")]
    write("run/samples_after.jsonl", sample("p", "b"))
    with pytest.raises(ValueError, match="have no two different responses to one prompt"):
        items_of_run(file.parent)
    write("run/samples_after.jsonl", {"prompt": "p"})
    with pytest.raises(DataError, match='line 1, column 1: "response" must be a text'):
        items_of_run(file.parent)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no samples_before.jsonl or samples_after.jsonl"):
        items_of_run(file.parent)


@pytest.fixture
def store(tmp_path):
    """Ten items, of which the second response is longer; in the first five the first response is known to be best."""
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        for n in range(10):
            store.add_item(Item(f"p{n}", ("short", "longer"), gold=0 if n < 5 else None, id=f"i{n}"))
        yield store


def say(store, name, n, verdict, shown=(0, 1), seconds=None, key=None):
    store.record(Judgement(key or f"{name}{n}/c", name, f"i{n}", verdict, shown, seconds))


def test_the_numbers_of_a_store(store):
    for n in range(10):
        say(store, "ann", n, Comparison(0), shown=(0, 1), seconds=float(n))
        say(store, "bo", n, Comparison(1 if n < 2 else 0), shown=(1, 0))
    say(store, "ann", 0, Score(0, "helpful", 4), seconds=0.0, key="ann0/r")
    say(store, "cy", 0, Comparison("tie")), say(store, "cy", 1, Skip())
    found = summarise(store)
    assert (found.num_items, found.num_standing) == (10, 23)
    assert found.kinds == {"comparison": 21, "rating": 1, "skip": 1}
    ann, bo, cy = found.annotators
    assert (ann.left.mean, ann.longer.mean, ann.gold.mean, ann.median_seconds) == (1.0, 0.0, 1.0, 4.5)
    # Wilson's interval for 10 of 10: 1 / (1 + 1.96^2 / 10) to 1.
    assert (ann.left.low, ann.left.high) == (pytest.approx(0.7225, abs=1e-3), 1.0)
    assert (bo.left.mean, bo.longer.mean, bo.gold.mean, bo.median_seconds) == (0.2, 0.2, 0.6, None)
    assert (cy.num_comparisons, cy.num_decided, cy.left, cy.gold.mean) == (1, 0, None, 0.0)
    assert found.everyone.num_comparisons == 21 and found.everyone.left.mean == pytest.approx(12 / 20, abs=0.01)
    # Of ann and bo: 8 of 10 agree, p_e = 1 * .8; so kappa is 0.
    by_name = {kappa.name: kappa for kappa in found.kappas}
    assert by_name["ann, bo"].num_units == 10 and by_name["ann, bo"].estimate.mean == pytest.approx(0.0)
    assert by_name["ann, cy"].num_units == 1 and len(by_name) == 3
    assert [(alpha.name, alpha.num_units) for alpha in found.alphas] == [("choices", 10)]


def test_alpha_is_of_the_responses_and_not_of_the_sides(store):
    for n in range(10):
        best = n % 2
        say(store, "ann", n, Comparison(best), shown=(0, 1))
        say(store, "bo", n, Comparison(best), shown=(1, 0))
        for name, rating in (("ann", 1 + n % 5), ("bo", 1 + n % 5)):
            say(store, name, n, Score(0, "honest", rating), key=f"{name}{n}/r")
    choices, honest = summarise(store).alphas
    assert (choices.name, choices.estimate.mean, choices.num_units) == ("choices", 1.0, 10)
    assert (honest.name, honest.estimate.mean, honest.num_units) == ("honest", 1.0, 10)


def test_what_was_undone_or_is_of_other_items_does_not_count(store):
    say(store, "ann", 0, Comparison(0)), say(store, "ann", 1, Comparison(1))
    store.record(Judgement("u", "ann", "i0", Undo("ann0/c")))
    found = summarise(store)
    assert (found.num_standing, found.everyone.longer.mean) == (1, 1.0) and found.kinds["undo"] == 1
    assert summarise(store, {"i5"}).num_standing == 0 and summarise(store, {"i5"}).num_items == 1


def test_an_empty_store(store):
    found = summarise(store)
    assert (found.alphas, found.kappas, found.annotators, found.kinds) == ([], [], [], {})
    assert found.everyone.left is None and found.everyone.median_seconds is None
    say(store, "ann", 0, Comparison("tie")), say(store, "bo", 0, Comparison("tie"))
    assert math.isnan(summarise(store).alphas[0].estimate.mean)
