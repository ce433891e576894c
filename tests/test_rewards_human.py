"""People as the reward: the rule that makes a number of judgements, and waiting for answers from another thread."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from rlhf_gym.feedback import (
    Comparison,
    Correction,
    FeedbackStore,
    Flag,
    Item,
    Judgement,
    Score,
    SimulatedAnnotator,
    Skip,
    Undo,
)
from rlhf_gym.rewards import RewardError, RewardInputs, as_reward, human


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "feedback.sqlite") as opened:
        yield opened


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(sys.modules["rlhf_gym.rewards.human"], "POLL_S", 0.01)


def record(store, item, verdict, annotator="ann", shown=(0, 1)):
    key = f"k{len(store.events())}"
    store.record(Judgement(key, annotator, item.id, verdict, shown if isinstance(verdict, Comparison) else ()))
    return key


def looked_up(store, *responses, **options):
    return human(store, ask=None, **options)(["p"] * len(responses), list(responses))


@pytest.mark.parametrize(("rating", "score"), [(1, -1.0), (2, -0.5), (3, 0.0), (4, 0.5), (5, 1.0)])
def test_ratings(store, rating, score):
    item = store.add_item(Item("p", ("a", "b")))
    record(store, item, Score(1, "helpful", rating))
    assert looked_up(store, "b") == [score]


def test_mean_of_all_that_stands(store):
    """a: rated 5 (1) and 2 (-.5), won (1), tied (0) -> 1.5 / 4. b: lost (-1), tied (0) -> -1/2."""
    item = store.add_item(Item("p", ("a", "b")))
    record(store, item, Score(0, "helpful", 5))
    record(store, item, Score(0, "helpful", 2), "bob")
    record(store, item, Comparison(0))
    record(store, item, Comparison("tie"), "bob", shown=(1, 0))
    assert looked_up(store, "a", "b") == [0.375, -0.5]


def test_later_and_undone_judgements(store):
    item = store.add_item(Item("p", ("a", "b")))
    record(store, item, Comparison(0))
    record(store, item, Comparison(1))  # the same person on the same pair: this one stands
    assert looked_up(store, "a", "b") == [-1.0, 1.0]
    key = record(store, item, Score(0, "helpful", 5), "bob")
    assert looked_up(store, "a") == [0.0]
    record(store, item, Undo(key), "bob")
    assert looked_up(store, "a") == [-1.0]


def test_both_bad_correction_and_flag(store):
    item = store.add_item(Item("p", ("a", "b", "c")))
    record(store, item, Comparison("both bad"))
    record(store, item, Correction(2, "c, better"))
    record(store, item, Score(0, "helpful", 5), "bob")
    assert looked_up(store, "a", "b", "c", "c, better") == [0.0, -1.0, -1.0, 1.0]
    record(store, item, Score(0, "helpful", 5), "cat")
    record(store, item, Flag(0, "rude"), "dan")
    assert looked_up(store, "a") == [-1.0]


def test_the_same_text_in_several_items_and_under_another_prompt(store):
    record(store, store.add_item(Item("p", ("a", "b"))), Comparison(0))
    record(store, store.add_item(Item("p", ("c", "a"))), Comparison(0))
    record(store, store.add_item(Item("q", ("a", "b"))), Comparison(1))
    assert looked_up(store, "a", "b", "c") == [0.0, -1.0, 1.0]


def test_unknown_ones_from_the_store(store):
    item = store.add_item(Item("p", ("a", "b")))
    record(store, item, Score(0, "helpful", 4))
    record(store, item, Skip())
    assert looked_up(store, "a", "b", unknown="skip") == [0.5, None]
    with pytest.raises(
        ValueError, match=r"row 1: nobody has judged the response 'b' to 'p' in .*\(1 of 2 are not judged\)"
    ):
        looked_up(store, "a", "b")
    inputs = RewardInputs(["p", "p"], ["a", "b"], [[1]] * 2, [[2]] * 2)
    assert as_reward(human(store, ask=None, unknown="skip")).score(inputs).total.tolist() == [0.5, 0.0]
    with pytest.raises(RewardError, match="reward function 'human' raised ValueError: row 1"):
        as_reward(human(store, ask=None)).score(inputs)
    assert len(store.items()) == 1  # nothing was asked


def test_time_runs_out_and_what_was_said_is_kept(store, capsys):
    reward = human(store, timeout_s=0.05)
    with pytest.raises(ValueError, match=r"row 0: nobody .* after 0\.05 s \(2 of 2"):
        reward(["p", "p"], ["a", "b"])
    assert capsys.readouterr().err.count("waiting for people: 0 of 2 answers") == 1
    record(store, store.items()[0], Score(0, "helpful", 4))
    record(store, store.items()[1], Skip())  # no answer: another person may give one
    assert human(store, timeout_s=0.05, unknown="skip", progress=False)(["p", "p"], ["a", "b"]) == [0.5, None]
    assert capsys.readouterr().err == "" and len(store.items()) == 2  # asked again, but not twice


def test_what_is_asked_may_be_there_already_with_more_said_of_it(store):
    item = store.add_item(Item("p", ("a", "b"), checkpoint="run: before and after"))
    record(store, item, Comparison(1))
    store.add_item(Item("p", ("c", "d"), checkpoint="run: before and after"))
    reward = human(store, ask="compare", timeout_s=0.02, unknown="skip", progress=False)
    assert reward(["p"] * 2, ["c", "d"]) == [None, None] and len(store.items()) == 2
    assert reward(["p"] * 2, ["a", "b"]) == [-1.0, 1.0]


def test_a_flag_on_one_of_two_is_no_answer_about_the_other(store, capsys):
    item = store.add_item(Item("p", ("a", "b")))
    record(store, item, Flag(0, "rude"), shown=(0, 1))
    record(store, item, Skip(), shown=(0, 1))
    reward = human(store, ask="compare", timeout_s=0.05, unknown="skip")
    assert reward(["p", "p"], ["a", "b"]) == [-1.0, None]
    assert "0 of 1 answers" in capsys.readouterr().err  # it has waited
    record(store, item, Comparison(1), "bob")
    assert reward(["p", "p"], ["a", "b"]) == [-1.0, 1.0]


class Crowd:
    """Simulated people in a thread of their own, with their own connection to the file: they answer what they find."""

    def __init__(self, path, answer):
        self._path, self._answer, self._stop = path, answer, threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self):
        np_random, done = np.random.default_rng(0), set()
        with FeedbackStore(self._path) as store:
            while not self._stop.is_set():
                for item in store.items():
                    if item.id not in done:
                        done.add(item.id)
                        store.record(self._answer(item, f"{len(done)}", np_random))
                time.sleep(0.005)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


def test_people_rate_while_the_reward_waits(store, capsys):
    def rate(item, key, np_random):
        return Judgement(key, "ann", item.id, Score(0, "helpful", min(5, len(item.responses[0]))))

    with Crowd(store.path, rate):
        found = human(store, timeout_s=20)(["p", "p", "q", "p"], ["a", "aaaa", "aaa", "a"])
    assert found == [-1.0, 0.5, 0.0, -1.0]  # ratings 1, 4, 3, and the first once more
    assert len(store.items()) == 3 and "waiting for people: 3 of 3" in capsys.readouterr().err


def test_simulated_annotators_compare_while_the_reward_waits(store):
    """Quality is the number of letters; an annotator who never errs puts 4 responses in a circle in the right order."""
    ann = SimulatedAnnotator("ann", temperature=1e-6)

    def compare(item, key, np_random):
        return ann.compare(item, [len(response) for response in item.responses], key, np_random)

    prompts, completions = ["p"] * 4 + ["q"] * 2, ["a", "aa", "aaa", "aaaa", "b", "bb"]
    with Crowd(store.path, compare):
        found = human(store, ask="compare", timeout_s=20, progress=False)(prompts, completions)
    # Circle of p: 1-2, 2-3, 3-4, 4-1. So 1 loses twice, 2 and 3 win one of two, 4 wins twice.
    assert found == [-1.0, 0.0, 0.0, 1.0, -1.0, 1.0]
    assert len(store.items()) == 5 and all(len(item.responses) == 2 for item in store.items())


def test_the_labelling_page_asks_what_the_reward_wants_to_know(store):
    """The queue behind the page, on the same file: it finds items that are added while it is open."""
    pytest.importorskip("starlette")
    pytest.importorskip("jinja2")
    from rlhf_gym.feedback.page import Labelling, PageSettings

    stop = threading.Event()

    def label():
        with FeedbackStore(store.path) as own:
            page, number = Labelling(own, PageSettings()), 0
            while not stop.is_set():
                question = page.next("ann")
                if question is None:
                    time.sleep(0.005)
                    continue
                number += 1
                texts = own.item(question.item).responses
                verdict = (
                    Score(0, "quality", len(texts[0]))
                    if len(question.responses) == 1
                    else Comparison(max(question.responses, key=lambda place: len(texts[place])))
                )
                page.record([Judgement(f"k{number}", "ann", question.item, verdict, question.responses)])

    thread = threading.Thread(target=label)
    thread.start()
    try:
        assert human(store, timeout_s=20, progress=False)(["p", "p"], ["aaaaa", "aa"]) == [1.0, -0.5]
        found = human(store, ask="compare", timeout_s=20, progress=False)(["q"] * 3, ["b", "bb", "bbb"])
        assert found == [-1.0, 0.0, 1.0]
    finally:
        stop.set()
        thread.join()


def test_comparing_needs_two(store):
    with pytest.raises(ValueError, match='ask="compare" needs two different responses'):
        human(store, ask="compare", timeout_s=0)(["p", "p", "q"], ["a", "a", "b"])
    assert store.items() == []


def test_names_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no feedback store 'none.sqlite'"):
        human("none.sqlite", ask=None)
    assert list(tmp_path.iterdir()) == []
    assert as_reward("human").names == ("human",) and (tmp_path / "feedback.sqlite").is_file()
    for bad in ({"ask": "guess"}, {"unknown": "zero"}, {"timeout_s": -1}):
        with pytest.raises(ValueError, match=f"human: {next(iter(bad))} must be"):
            human("feedback.sqlite", **bad)
