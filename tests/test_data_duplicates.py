"""Duplicates by hand and against comparing all pairs; splits by prompts; what is counted."""

from __future__ import annotations

import hashlib
import itertools
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_gym.data import (
    Demonstration,
    Labelled,
    Preference,
    PromptOnly,
    Rating,
    find_duplicates,
    read_dataset,
    split_of,
)
from rlhf_gym.data.duplicates import MAX_ROWS_PER_PAIR
from rlhf_gym.data.split import prompt_key
from rlhf_gym.data.statistics import count_words, describe

# Ten words have nine pairs of neighbours. With the last one replaced eight are shared, of ten in all.
TEN = "one of the ten words here will become some other"
TEN_OTHER = "one of the ten words here will become some thing"


def found(*records, **arguments):
    return [(d.index, d.of, round(d.similarity, 4), d.reason) for d in find_duplicates(records, **arguments)]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (PromptOnly("The sky is"), PromptOnly("The  sky is\n", id="2"), "exact"),
        (PromptOnly("caf\u00e9"), PromptOnly("cafe\u0301"), "exact"),
        (PromptOnly("The sky is blue"), PromptOnly("the SKY is blue"), "near"),
        (PromptOnly("a"), PromptOnly("b"), None),
        (PromptOnly("a + b"), PromptOnly("a - b"), None),  # signs are words
        (PromptOnly(""), PromptOnly(" "), "exact"),
        (Preference("p", "a", "b"), Preference("p", "b", "a"), None),  # judged the other way
        (Preference("p", "a", "b"), Preference("p", "a", "b", tie=True), None),
        (Preference("p", "a", "b", annotator="x"), Preference("p", "a", "b", annotator="y"), None),
        (Preference("p", "a", "b", annotator="x"), Preference("p", "a", "b", annotator="x"), "exact"),
        (Labelled("p", "a", True), Labelled("p", "a", False), None),
        (Labelled("p", "a", True), Labelled("p", "a", 1), None),
        (Rating("p", "a", 4.0), Rating("p", "a", 5.0), None),
        (Rating("p", "a", 4.0, "kind"), Rating("p", "a", 4.0, "true"), None),
        (PromptOnly(TEN), PromptOnly(TEN_OTHER), "near"),
        (Preference(TEN, TEN, "no"), Preference(TEN_OTHER, TEN_OTHER, "no"), "near"),
        (Preference(TEN, TEN, "no"), Preference(TEN_OTHER, TEN_OTHER, "never"), None),  # one text is another
        (
            PromptOnly(TEN + " 12 30"),
            PromptOnly(TEN + " 12 31"),
            None,
        ),  # 10 of 12 pairs are shared, but not the numbers
        (PromptOnly(TEN + " 12 thirty"), PromptOnly(TEN + " 12 forty"), "near"),
        (PromptOnly("今天天气很好我们去公园"), PromptOnly("今天天气很好我们去公路"), "near"),  # 9 of 11
        (PromptOnly("今天天气很好我们去公园"), PromptOnly("今天天气真好我们去公园"), None),  # 8 of 12
    ],
)
def test_two_rows(first, second, reason):
    assert [why for *_, why in found(first, second)] == ([] if reason is None else [reason])
    assert [why for *_, why in found(second, first)] == ([] if reason is None else [reason])
    assert found(first, second, near=False) == ([(1, 0, 1.0, "exact")] if reason == "exact" else [])


def test_similarity():
    rows = PromptOnly(TEN), PromptOnly(TEN_OTHER)
    assert found(*rows) == [(1, 0, 0.8, "near")]
    assert found(*rows, similarity=0.81) == [] and found(*rows, similarity=0.1) == [(1, 0, 0.8, "near")]
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="similarity must be above 0 and at most 1"):
            find_duplicates(rows, similarity=wrong)


def test_the_first_stays():
    """Not a chain: the third is near the second, which is gone, but not near the first."""
    third = TEN_OTHER.replace("one of", "some of")
    assert found(*map(PromptOnly, (TEN, TEN_OTHER, third, TEN))) == [(1, 0, 0.8, "near"), (3, 0, 1.0, "exact")]
    assert found(PromptOnly(TEN_OTHER), PromptOnly(TEN), PromptOnly(third)) == [
        (1, 0, 0.8, "near"),
        (2, 0, 0.8, "near"),
    ]
    assert found() == [] and found(PromptOnly("")) == []


def test_the_same_response_twice():
    rows = Preference("p", "a", " a"), Preference("p", "a", "a", tie=True), Preference("p", "a", "A")
    assert found(*rows) == [(0, 0, 1.0, "same response twice"), (1, 1, 1.0, "same response twice")]


def slow(records, similarity):
    """The definition, by comparing each row with all that stay."""
    kept, gone = [], []
    for i, record in enumerate(records):
        for j in kept:
            scores = []
            for a, b in zip(vars(record).values(), vars(records[j]).values(), strict=True):
                if isinstance(a, str):
                    x, y = (set(itertools.pairwise(text.split())) or {tuple(text.split())} for text in (a, b))
                    scores.append(len(x & y) / len(x | y))
            if min(scores) >= similarity - 1e-9:
                gone.append((i, j, round(min(scores), 4), "near"))
                break
        else:
            kept.append(i)
    return gone


TEXT = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.builds(Demonstration, TEXT, TEXT), max_size=12, unique=True),
    st.sampled_from([0.3, 0.5, 2 / 3, 0.8, 1.0]),
)
@example([Demonstration("a b c d", ""), Demonstration("a b c", "")], 2 / 3)
def test_against_comparing_all_pairs(records, similarity):
    assert found(*records, similarity=similarity) == slow(records, similarity)


def test_boilerplate_costs_little_and_hides_nothing():
    """Rows that share a long beginning, more of them than are looked up by one pair; each is there twice."""
    np_random = random.Random(0)
    words = ["".join(np_random.choices("abcdefgh", k=6)) for _ in range(3000)]
    common = " ".join(words[:8])
    rows = [f"{common} {' '.join(np_random.choices(words, k=16))}" for _ in range(MAX_ROWS_PER_PAIR + 200)]
    records = [PromptOnly(row) for row in rows] + [PromptOnly(row + " indeed") for row in rows]
    duplicates = find_duplicates(records)
    assert [(d.index, d.of) for d in duplicates] == [(len(rows) + i, i) for i in range(len(rows))]


# ---- splits

PARTS = {"train": 0.8, "valid": 0.1, "test": 0.1}


def test_the_part_follows_from_the_hash():
    """By hand: 64 bits of BLAKE2b keyed with the seed, as a number in [0, 1)."""
    for seed, key in itertools.product((0, 17), ("", "the sky is", "天")):
        place = int(hashlib.blake2b(key.encode(), digest_size=8, key=str(seed).encode()).hexdigest(), 16) / 2**64
        expected = "train" if place < 0.8 else "valid" if place < 0.9 else "test"
        assert split_of(key, PARTS, seed) == expected


def test_shares_are_met():
    """4 standard deviations of a binomial: of 20,000 prompts .8 is 16,000 +- 226, .1 is 2,000 +- 170."""
    parts = [split_of(f"prompt {i}", PARTS) for i in range(20_000)]
    assert abs(parts.count("train") - 16_000) < 226
    assert abs(parts.count("valid") - 2_000) < 170 and abs(parts.count("test") - 2_000) < 170
    others = [split_of(f"prompt {i}", PARTS, seed=1) for i in range(20_000)]
    # Two seeds agree as often as chance has it: .8^2 + 2 * .1^2 = .66.
    assert abs(sum(map(str.__eq__, parts, others)) - 13_200) < 270


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_wrong_shares(shares):
    with pytest.raises(ValueError, match="fractions must be above 0 and add up to 1"):
        split_of("x", shares)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (PromptOnly("The sky is "), PromptOnly("the  SKY is:"), True),
        (PromptOnly("ﬁne １"), PromptOnly("fine 1"), True),  # compatibility forms
        (PromptOnly("The sky was"), PromptOnly("The sky is"), False),
        (PromptOnly("?"), PromptOnly("!"), False),
        (Preference("p", "a", "b"), Preference("P?", "c", "d"), True),
        (Preference("", "a", "b"), Preference("", "b", "a"), True),
        (Demonstration("", "a"), Demonstration("", "b"), False),  # without a prompt the text decides
        (Labelled("", "a", 1), Labelled("", "A", 0), True),
    ],
)
def test_which_prompts_are_one(first, second, same):
    assert (prompt_key(first) == prompt_key(second)) == same


def test_an_implicit_prompt_ends_where_the_answer_begins():
    """Two pairs of one prompt, whose responses have different beginnings in common."""
    asked = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"
    rows = [
        {"chosen": f"{asked} I am a", "rejected": f"{asked} I do"},
        {"chosen": f"{asked} No", "rejected": f"{asked} Yes"},
    ]
    keys = [prompt_key(record, implicit=True) for record in read_dataset(rows).records]
    assert len(set(keys)) == 1 and keys[0].endswith("human:who?assistant")


ROWS = st.lists(
    st.tuples(st.sampled_from(["a", "A ", "b", "b?", "c c", "cc", "d", "e"]), st.text(max_size=2)), max_size=20
)


@settings(max_examples=100, deadline=None)
@given(ROWS, ROWS, st.integers(0, 3))
def test_no_prompt_is_in_two_parts_and_rows_added_later_move_nothing(rows, later, seed):
    shares = {"train": 0.5, "test": 0.5}

    def divide(rows):
        return [split_of(prompt_key(Demonstration(*row)), shares, seed) for row in rows]

    parts = divide(rows + later)
    assert parts[: len(rows)] == divide(rows) and parts == divide((rows + later)[::-1])[::-1]
    where = {}
    for (prompt, _), part in zip(rows + later, parts, strict=True):
        plain = re.sub(r"[\s?]", "", prompt.lower())
        assert where.setdefault(plain, part) == part


# ---- statistics


def test_counts_by_hand():
    """Lengths of chosen and rejected: 2 and 1, 1 and 1, 1 and 3, and a tie of 1 and 2."""
    rows = [
        {"prompt": "p", "chosen": "a b", "rejected": "c", "position": "left", "annotator": "x"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "position": "left", "annotator": "y"},
        {"prompt": "q", "chosen": "b", "rejected": "a", "position": "right", "annotator": "x"},
        {"prompt": "r", "chosen": "a", "rejected": "b c d"},
        {"prompt": "s", "chosen": "", "rejected": "b c", "tie": True, "position": "left"},
    ]
    seen = describe(read_dataset(rows))
    assert (seen.rows, seen.prompts, seen.annotators, seen.ties, seen.both_ways) == (5, 4, 2, 1, 1)
    chosen = seen.lengths["chosen"]
    assert (chosen.mean, chosen.median, chosen.maximum, chosen.empty) == (1.0, 1.0, 2, 1)
    assert seen.chosen_longer.mean == 0.5  # of p and r
    assert seen.length_difference.mean == pytest.approx((1 + 0 - 2) / 3)  # each prompt counts once
    assert seen.chosen_left.mean == pytest.approx((1 + 1 / 2) / 2)
    assert seen.duplicates == {} and seen.cut_words is None and seen.labels is None


def test_other_kinds():
    seen = describe(read_dataset([{"text": "a", "label": v} for v in (1, 1, 0)] + [{"text": "a b", "label": "1"}]))
    assert seen.labels == {"1": 2, "0": 1, '"1"': 1} and seen.duplicates == {"exact": 1}
    labels = [{"prompt": "p", "completion": "x", "label": v} for v in (True, False)]
    assert describe(read_dataset(labels)).both_ways == 1
    ratings = [
        {"prompt": str(v), "completion": "x", "rating": v, "criterion": c} for v, c in ((1, "a"), (4, "b"), (5, "b"))
    ]
    assert {k: v.mean for k, v in describe(read_dataset(ratings)).ratings.items()} == {"a": 1.0, "b": 4.5}
    cut = [
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"chosen": "It is red.", "rejected": "It is so."},
    ]
    assert describe(read_dataset(cut)).cut_words == 1
    nothing = describe(read_dataset([{"x": 1}]))
    assert (nothing.rows, nothing.lengths, nothing.duplicates) == (0, {}, {})


def test_words():
    assert count_words(["Don't stop, now!", "我爱你", ""]) == [3, 3, 0]
