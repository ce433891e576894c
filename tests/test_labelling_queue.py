"""What is asked of whom: pairs, sides, order, overlap, known answers, leases; and what others write meanwhile."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest

pytest.importorskip("starlette")

from rlhf_gym.feedback import Comparison, FeedbackStore, Item, Judgement, Score, Skip, Undo  # noqa: E402
from rlhf_gym.feedback.page import Labelling, PageSettings  # noqa: E402
from rlhf_gym.feedback.page.labelling import LEASE_S  # noqa: E402
from rlhf_gym.feedback.page.questions import Question, in_order, questions_of, shown  # noqa: E402

NUMBERS = count()


def pair(name, gold=None):
    return Item(f"prompt {name}", ("a", "b"), gold=gold, id=name)


@pytest.fixture
def make(tmp_path):
    """Makes a labelling; its clock is ``make.now``."""

    def labelling(*items, numbers=None, path="feedback.sqlite", **settings):
        store = FeedbackStore(tmp_path / path)
        settings = PageSettings(**{"gold_rate": 0.0, **settings})
        return Labelling(store, settings, items or None, numbers, clock=lambda: labelling.now)

    labelling.now = 0.0
    return labelling


def say(labelling, name, question, verdict=None):
    key = f"k{next(NUMBERS)}"
    said = verdict or Comparison("tie")
    labelling.record([Judgement(f"{key}/x", name, question.item, said, question.responses)])
    return key


def work(labelling, name, limit=1000):
    """Items in the order in which they are asked, all compared."""
    found = []
    while len(found) < limit and (question := labelling.next(name)):
        found.append(question.item)
        say(labelling, name, question)
    return found


def test_two_responses_make_one_question_and_many_a_circle():
    assert questions_of(pair("p"), 0) == [Question("p", (0, 1))]
    assert questions_of(Item("p", ("a",), id="i"), 0) == [Question("i", (0,))]
    for size in (3, 4, 7):
        item = Item("p", tuple(map(str, range(size))), id="i")
        circles = set()
        for seed in range(20):
            pairs = [question.responses for question in questions_of(item, seed)]
            assert len(set(pairs)) == size and all(a < b for a, b in pairs)
            assert Counter(place for each in pairs for place in each) == dict.fromkeys(range(size), 2)
            reached = {0}
            for _ in range(size):
                reached |= {place for each in pairs if set(each) & reached for place in each}
            assert len(reached) == size  # one circle, not several
            circles.add(tuple(pairs))
        assert size == 3 or len(circles) > 1


def test_the_same_text_is_not_compared_with_itself():
    assert questions_of(Item("p", ("a", "a", "b"), id="i"), 0) == [Question("i", (0, 2))]
    assert questions_of(Item("p", ("a", "a"), id="i"), 0) == [Question("i", (0,))]


def test_of_a_known_answer_only_its_pairs_are_asked():
    item = Item("p", ("a", "b", "c", "d", "e"), gold=3, id="i")
    pairs = [question.responses for question in questions_of(item, 0)]
    assert len(pairs) == 2 and all(3 in each for each in pairs)


def test_sides_are_drawn_for_each_person_and_question():
    questions = [Question(f"i{n}", (0, 1)) for n in range(400)]
    sides = {name: [shown(question, name, 0)[0] for question in questions] for name in ("ann", "bo")}
    for drawn in sides.values():
        assert 160 <= sum(drawn) <= 240  # 200 ± 4 standard deviations
    assert 160 <= sum(a == b for a, b in zip(*sides.values(), strict=True)) <= 240
    assert [shown(question, "ann", 0)[0] for question in questions] == sides["ann"]
    assert [shown(question, "ann", 1)[0] for question in questions] != sides["ann"]
    assert shown(Question("i", (0,)), "ann", 0) == (0,)


def test_the_largest_number_first_and_random_among_equals():
    questions = [Question(f"i{n:02}", (0, 1)) for n in range(20)]
    numbers = {question.item: n % 2 for n, question in enumerate(questions)}
    found = [int(question.item[1:]) for question in in_order(questions, numbers, 0)]
    assert all(n % 2 for n in found[:10]) and not any(n % 2 for n in found[10:])
    assert found[:10] != sorted(found[:10]) and found == [
        int(question.item[1:]) for question in in_order(reversed(questions), numbers, 0)
    ]
    assert in_order(questions, {}, 0) != in_order(questions, {}, 1)
    missing = in_order(questions, {"i05": -1.0}, 0)
    assert missing[0].item == "i05"  # one without a number comes last


def test_uncertain_items_come_first(make):
    labelling = make(pair("sure"), pair("torn"), pair("unsure"), numbers={"sure": 0.0, "torn": 0.9, "unsure": 0.5})
    assert work(labelling, "ann") == ["torn", "unsure", "sure"]


def test_each_question_goes_to_as_many_people_as_asked_for(make):
    items = [pair(f"i{n}") for n in range(10)]
    for overlap, people, expected in ((1, 3, 10), (2, 3, 20), (3, 2, 20)):
        labelling = make(*items, overlap=overlap, path=f"{overlap}")
        done = []
        while any(fresh := [work(labelling, f"a{n}", limit=1) for n in range(people)]):  # in turns
            done += [(n, item) for n, found in enumerate(fresh) for item in found]
        assert len(done) == len(set(done)) == expected
        assert set(Counter(item for _, item in done).values()) == {min(overlap, people)}
        assert labelling.num_judged() == ((10, 0) if people >= overlap else (0, 10))


def test_a_broken_overlap_doubles_some(make):
    labelling = make(*[pair(f"i{n}") for n in range(120)], overlap=1.2)
    first, second, third = (work(labelling, name) for name in ("a", "b", "c"))
    assert len(first) == 120 and 8 <= len(second) <= 40 and third == []  # 24 ± 3.6 standard deviations


def test_what_is_on_a_screen_is_kept_from_others_for_a_while(make):
    labelling = make(pair("i"), pair("j"))
    mine, yours = labelling.next("ann"), labelling.next("bo")
    assert {mine.item, yours.item} == {"i", "j"} and labelling.next("cy") is None
    assert labelling.next("ann") == mine
    assert labelling.progress("cy") == (0, 2)
    make.now = LEASE_S - 1
    labelling.next("bo")  # still there
    make.now = LEASE_S + 1
    assert labelling.next("cy") == mine
    say(labelling, "cy", mine)
    assert labelling.next("ann") is None and labelling.next("bo") == yours
    say(labelling, "ann", mine)  # the late answer is taken all the same
    assert len(labelling.store.events()) == 2


def test_a_skipped_question_goes_to_others(make):
    labelling = make(pair("i"))
    question = labelling.next("ann")
    say(labelling, "ann", question, Skip())
    assert labelling.next("ann") is None and labelling.progress("ann") == (1, 0)
    assert labelling.next("bo") == question and labelling.num_judged() == (0, 0)
    say(labelling, "bo", question)
    assert labelling.num_judged() == (1, 0)


def test_three_responses_are_three_questions_that_can_be_skipped(make):
    labelling = make(Item("p", ("a", "b", "c"), id="i"))
    for left in (2, 1, 0):
        say(labelling, "ann", labelling.next("ann"), Skip())
        assert labelling.progress("ann") == (3 - left, left)
    assert labelling.next("ann") is None


def test_one_response_is_done_once_it_is_rated(make):
    labelling = make(Item("p", ("a",), id="i"), Item("p", ("b",), id="j"))
    say(labelling, "ann", labelling.next("ann"), Score(0, "quality", 3))
    assert labelling.progress("ann") == (1, 1) and labelling.num_judged() == (1, 0)


def test_undo_of_the_last_and_then_of_the_one_before(make):
    labelling = make(pair("i"), pair("j"), pair("k"))
    questions = []
    for _ in range(2):
        questions.append(labelling.next("ann"))
        say(labelling, "ann", questions[-1])
    for question in reversed(questions):
        (last,) = labelling.last_submission("ann")
        for _ in range(2):  # sent twice
            labelling.undo("ann", last.key.removesuffix("/x"))
        assert labelling.next("ann") == question
    assert labelling.last_submission("ann") == [] and labelling.progress("ann") == (0, 3)
    assert len(labelling.store.events()) == 4 and labelling.store.standing() == []


def test_nobody_undoes_what_another_has_said(make):
    labelling = make(pair("i"))
    key = say(labelling, "ann", labelling.next("ann"))
    labelling.undo("bo", key)
    assert len(labelling.store.standing("ann")) == 1


def test_undone_questions_return_to_their_place(make):
    numbers = {"i": 3.0, "j": 2.0, "k": 1.0}
    labelling = make(*map(pair, numbers), numbers=numbers)
    key = say(labelling, "ann", labelling.next("ann"))
    say(labelling, "ann", labelling.next("ann"))
    labelling.undo("ann", key)
    make.now = 2 * LEASE_S
    assert labelling.next("bo").item == "i"


def test_known_answers_are_mixed_in_for_everybody(make):
    items = [pair(f"i{n}") for n in range(100)] + [pair(f"gold{n}", gold=0) for n in range(30)]
    labelling = make(*items, gold_rate=0.2)
    places = []
    for name in ("ann", "bo"):
        found = work(labelling, name, limit=50)
        gold = [place for place, item in enumerate(found) if item.startswith("gold")]
        assert 3 <= len(gold) <= 19 and len(set(found)) == 50  # 10 ± 2.8
        places.append(gold)
    assert places[0] != places[1]
    assert labelling.num_questions == 100 and labelling.progress("ann").answered == 50
    only = make(pair("g1", gold=0), pair("g2", gold=1), path="only")  # a test of skill: all are asked
    assert sorted(work(only, "ann")) == ["g1", "g2"] == sorted(work(only, "bo"))
    assert work(make(*items, path="none"), "ann") != [] and "gold" not in "".join(
        event.judgement.item for event in make(*items, path="none").store.events()
    )


def test_a_second_program_that_writes_is_noticed(make, tmp_path):
    labelling = make(pair("i"), pair("j"), overlap=1)
    with FeedbackStore(tmp_path / "feedback.sqlite") as other:
        other.record(Judgement("o1", "bo", "i", Comparison("tie"), (0, 1)))
        other.record(Judgement("o2", "bo", "i", Score(0, "x", 1)))  # says nothing of what was shown
        assert work(labelling, "ann") == ["j"]
        other.record(Judgement("o3", "bo", "i", Undo("o1")))
        assert work(labelling, "ann") == ["i"]
        assert other.forget("ann") == 2
        assert sorted(work(labelling, "cy")) == ["i", "j"] and labelling.progress("ann") == (0, 0)


def test_items_that_others_add_are_asked_where_none_were_given(make, tmp_path):
    with FeedbackStore(tmp_path / "feedback.sqlite") as other:
        other.add_item(pair("old"))
        labelling, chosen = make(), make(pair("mine"))
        assert sorted(work(labelling, "ann")) == ["mine", "old"]
        other.add_item(pair("new"))
        assert work(labelling, "ann") == ["new"] and work(chosen, "bo") == []


def test_a_restart_finds_everything(make):
    items = [pair(f"i{n}") for n in range(5)]
    first = make(*items)
    done = work(first, "ann", limit=2)
    shown_now = first.next("ann")
    first.store.close()
    again = make(*items)
    assert again.next("ann") == shown_now and again.progress("ann") == (2, 3)
    assert len(again.last_submission("ann")) == 1 and again.last_submission("ann")[0].item == done[-1]
