"""The feedback store: one row per judgement, none lost, none changed; and what is exported from it."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_gym.data import Demonstration, Labelled, Preference, Rating, load_records
from rlhf_gym.feedback import (
    Comparison,
    Correction,
    FeedbackStore,
    Flag,
    Item,
    Judgement,
    KeyReused,
    Score,
    Skip,
    Undo,
    export,
    schema,
)

SKY = Item("The sky is", (" blue.", " green.", " =1+1"), "step-100", {"temperature": 0.7, "seed": 3}, gold=0, id="sky")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.sqlite"


@pytest.fixture
def store(path):
    with FeedbackStore(path) as store:
        store.add_item(SKY)
        yield store


def said(key, verdict, annotator="ann", shown=(1, 0), item="sky", seconds=2.5):
    return Judgement(key, annotator, item, verdict, shown, seconds)


ALL = [
    said("k1", Comparison(0, strength=2)),
    said("k2", Comparison("tie")),
    said("k3", Comparison("both bad"), shown=(0, 2)),
    said("k4", Score(1, "helpful", 4)),
    said("k5", Correction(1, " bläu\u202e\U0001f600.")),
    said("k6", Flag(2, "unsafe")),
    said("k7", Skip()),
    said("k8", Undo("k7"), shown=(), seconds=None),
]


def keys(events):
    return [event.judgement.key for event in events]


def test_what_goes_in_comes_out_after_the_file_was_closed(path, store):
    events = [store.record(judgement) for judgement in ALL]
    assert [event.judgement for event in events] == ALL and [event.number for event in events] == list(range(1, 9))
    store.close()
    with FeedbackStore(path) as again:
        assert again.events() == events and again.items() == [SKY] and again.item("sky") == SKY
        # k2 replaces k1 (the same pair by the same person), k8 undoes k7.
        assert keys(again.standing()) == ["k2", "k3", "k4", "k5", "k6"]


def test_the_same_key_twice_is_one_row_and_the_same_answer(store):
    first = store.record(ALL[0])
    again = store.record(dataclasses.replace(ALL[0], seconds=9.0))  # the second attempt came later
    assert again == first and store.events() == [first]
    for other in (
        said("k1", Comparison(1)),
        said("k1", Comparison(0, strength=2), annotator="bo"),
        said("k1", Comparison(0, strength=2), shown=(0, 1)),
    ):
        with pytest.raises(KeyReused, match="'k1' is that of another judgement; make a new key"):
            store.record(other)
    assert store.events() == [first]


def test_undo_brings_back_what_was_replaced(store):
    store.record(said("a", Comparison(0)))
    store.record(said("b", Comparison(1), shown=(0, 1)))
    store.record(said("c", Comparison(1), annotator="bo"))
    assert keys(store.standing()) == ["b", "c"] and keys(store.standing("bo")) == ["c"]
    undo = said("d", Undo("b"), shown=())
    assert store.record(undo) == store.record(undo)
    assert keys(store.standing()) == ["a", "c"] and len(store.events()) == 4
    for wrong, message in (
        (Undo("b"), "'b' is undone already"),
        (Undo("c"), "cancels must be the key of a judgement of 'ann', got 'c'"),
        (Undo("none"), "cancels must be the key of a judgement of 'ann', got 'none'"),
        (Undo("d"), "is an undo, which cannot be undone; judge"),
    ):
        with pytest.raises(ValueError, match=message):
            store.record(said("e", wrong))
    assert len(store.events()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": Comparison(2)}, r"choice must be 1, 0, 'tie' or 'both bad', got 2"),
        ({"verdict": Comparison(True)}, "choice must be"),
        ({"verdict": Comparison("left")}, "choice must be"),
        ({"verdict": Comparison(0, strength=4)}, "strength must be an integer from 1 to 3, got 4"),
        ({"verdict": Comparison("tie", strength=1)}, "strength must be None when choice is 'tie'"),
        ({"shown": (0,)}, "shown must name the left and the right response"),
        ({"shown": (0, 3)}, "shown must be a response of the item, 0 to 2, got 3"),
        ({"shown": (1, 1)}, "shown must name each response once"),
        ({"verdict": Score(0, "helpful", 6)}, "rating must be an integer from 1 to 5, got 6"),
        ({"verdict": Score(-1, "helpful", 5)}, "response must be a response of the item, 0 to 2, got -1"),
        ({"verdict": Score(0, "", 5)}, "criterion must have 1 to 200 characters, got 0"),
        ({"verdict": Correction(0, " blue.")}, "text must differ from the response"),
        ({"verdict": Correction(0, "\ud83d")}, "text holds half of a surrogate pair"),
        ({"verdict": Flag(0, 3)}, "reason must be a text, got 3"),
        ({"seconds": float("nan")}, "seconds must be a number >= 0 or None, got nan"),
        ({"seconds": -1}, "seconds must be"),
        ({"key": ""}, "key must have 1 to 200 characters"),
        ({"annotator": " ann"}, "annotator must not begin or end with white space"),
        ({"annotator": "a" * 201}, "annotator must have 1 to 200 characters, got 201"),
    ],
)
def test_what_makes_no_sense_is_refused(store, change, message):
    with pytest.raises(ValueError, match=message):
        store.record(dataclasses.replace(ALL[0], **change))
    assert store.events() == []


def test_items(store):
    assert store.add_item(SKY) == SKY and store.items() == [SKY]
    with pytest.raises(ValueError, match="id 'sky' is that of another item"):
        store.add_item(dataclasses.replace(SKY, prompt="The sea is"))
    nameless = store.add_item(Item("p", ["a", "b"]))
    assert nameless.id == Item("p", ("a", "b")).id != Item("p", ("b", "a")).id and store.items()[1] == nameless
    with pytest.raises(ValueError, match="id 'sky' is that of another item"):
        store.add_items([Item("p", ("x", "y")), dataclasses.replace(SKY, gold=None)])
    assert len(store.items()) == 2  # not the first of them either
    with pytest.raises(KeyError, match="no item 'x'"):
        store.record(said("k", Skip(), item="x"))
    with pytest.raises(ValueError, match="sampling must be an object that JSON holds"):
        store.add_item(Item("p", ("c",), sampling={"temperature": float("inf")}))
    with pytest.raises(ValueError, match="at least one text"):
        Item("p", ())
    with pytest.raises(ValueError, match="gold must be a response of the item, 0 to 0, got 1"):
        Item("p", ("a",), gold=1)


def test_rows_cannot_be_changed_or_removed_behind_its_back(path, store):
    store.record(ALL[0])
    other = sqlite3.connect(path)
    for statement in (
        "UPDATE judgements SET annotator = 'x'",
        "DELETE FROM judgements",
        "UPDATE items SET prompt = ''",
        "DELETE FROM items",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            other.execute(statement)
    other.close()


def test_every_commit_is_synced(path, store):
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_forgotten_to_the_last_byte(path, tmp_path, store):
    for n in range(40):
        for name in ("Zacharias", "bo"):
            store.record(said(f"{name}{n}", Correction(n % 3, f" secret-of-{name} {n} " + "x" * 300), annotator=name))
    store.record(said("u", Undo("Zacharias3"), annotator="Zacharias"))
    export(store, tmp_path / "out")

    def bytes_on_disk():
        return b"".join(file.read_bytes() for file in path.parent.glob("feedback.sqlite*"))

    assert b"Zacharias" in bytes_on_disk()
    assert store.forget("Zacharias") == 41 and store.forget("Zacharias") == 0
    assert b"Zacharias" not in bytes_on_disk() and b"secret-of-bo" in bytes_on_disk()
    assert len(store.events()) == 40 and {event.judgement.annotator for event in store.events()} == {"bo"}
    export(store, tmp_path / "out")
    assert not any(b"Zacharias" in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert store.record(ALL[0]).number == 82  # numbers are not given again
    with pytest.raises(sqlite3.IntegrityError, match="only ever added"):  # the guard is back
        store._db.execute("DELETE FROM judgements")


def test_a_reader_that_holds_the_log_is_reported(path, store):
    store._db.execute("PRAGMA busy_timeout = 50")
    store.record(ALL[0])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM judgements").fetchall()
    with pytest.raises(TimeoutError, match="close that program and call forget again"):
        store.forget("ann")
    reader.close()
    assert store.forget("ann") == 0 and store.events() == []


def test_many_threads_and_two_open_stores_lose_and_double_nothing(path):
    """Every judgement is sent twice, by different threads and through different connections."""
    gate = threading.Barrier(4)

    def opened(_n):
        gate.wait()
        return FeedbackStore(path)  # four at once make the file

    with ThreadPoolExecutor(16) as pool:
        stores = list(pool.map(opened, range(4)))
        stores[0].add_item(SKY)
        jobs = [(n, n + turn) for turn in range(2) for n in range(80)]
        answers = list(
            pool.map(lambda job: stores[job[1] % 4].record(said(f"k{job[0]}", Skip(), f"a{job[0]}")).number, jobs)
        )
    assert answers[:80] == answers[80:] and sorted(answers[:80]) == list(range(1, 81))
    assert len(stores[2].events()) == 80
    for store in stores:
        store.close()


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path):
    gate = threading.Barrier(8)

    def opened(name):
        gate.wait()
        with FeedbackStore(tmp_path / name) as store:
            return store.add_item(SKY)

    with ThreadPoolExecutor(8) as pool:
        for name in map(str, range(8)):
            assert list(pool.map(opened, [name] * 8)) == [SKY] * 8


WRITER = """
import sys, threading
from rlhf_gym.feedback import FeedbackStore, Item, Judgement, Score
store = FeedbackStore(sys.argv[1])
store.add_item(Item("p", ("a", "b"), id="i"))
def work(name):
    for n in range(100000):
        store.record(Judgement(f"{name}-{n}", name, "i", Score(0, str(n), 1 + n % 5)))
        sys.stdout.write(f"{name}-{n}\\n"); sys.stdout.flush()
for name in "abcd":
    threading.Thread(target=work, args=(name,)).start()
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_no_acknowledged_judgement_is_lost_when_the_writer_is_killed(path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [writer.stdout.readline() for _ in range(120)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += writer.stdout.readlines()
    assert writer.wait() == -signal.SIGKILL
    acknowledged = {line.strip() for line in acknowledged if line.endswith("\n")}
    with FeedbackStore(path) as store:
        stored = keys(store.events())
        assert len(acknowledged) >= 120 and acknowledged <= set(stored) and len(stored) == len(set(stored))
        assert len(set(stored) - acknowledged) <= 4  # one on its way in each thread
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        # Who got no answer repeats, and finds it stored or stores it.
        for name in "abcd":
            n = max(int(key.split("-")[1]) for key in stored if key[0] == name)
            assert store.record(Judgement(f"{name}-{n}", name, "i", Score(0, str(n), 1 + n % 5)))
        assert len(store.events()) == len(stored)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "text").write_text("no database, but longer than the hundred bytes of a header " * 4)
    with pytest.raises(ValueError, match="is no feedback store"):
        FeedbackStore(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(ValueError, match="database of another program"):
        FeedbackStore(tmp_path / "other")
    with pytest.raises(OSError, match="cannot be written .*choose a file in a folder"):
        FeedbackStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        FeedbackStore(tmp_path / "missing" / "x")


def test_an_older_file_is_migrated_whole_or_not_at_all(path, store, monkeypatch):
    store.record(ALL[0])
    store.close()
    broken = ("ALTER TABLE items ADD COLUMN note TEXT", "CREATE TABLE items (x)")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        FeedbackStore(path)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS[:1], ("CREATE TABLE notes (text TEXT)",)))
    with FeedbackStore(path) as newer:
        assert newer.events()[0].judgement == ALL[0]
        assert newer._db.execute("SELECT count(*) FROM notes").fetchone() == (0,)
        assert len(newer._db.execute("PRAGMA table_info(items)").fetchall()) == 6  # nothing is left of the broken one
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2 of the feedback store, and this rlhf_gym knows up to 1"):
        FeedbackStore(path)


def test_export(tmp_path, store):
    for judgement in ALL[1:]:
        store.record(judgement)
    store.record(said("k9", Comparison(0, strength=2), annotator="bo"))
    store.record(said("k10", Comparison(1), annotator="=cy"))
    folder = tmp_path / "out"
    assert export(store, folder) == {
        "preferences.jsonl": 5,
        "demonstrations.jsonl": 1,
        "ratings.jsonl": 1,
        "labels.jsonl": 5,
        "judgements.csv": 9,
    }
    blue, green, odd, edited = *SKY.responses, " bläu\u202e\U0001f600."

    def pair(chosen, rejected, number, **more):
        return Preference("The sky is", chosen, rejected, id=f"judgement-{number}", **{"annotator": "ann", **more})

    assert load_records(folder / "preferences.jsonl", Preference) == [
        pair(green, blue, 1, tie=True, position="left"),  # green was shown left
        pair(blue, odd, 2, tie=True, position="left"),
        pair(edited, green, 4),
        pair(blue, green, 8, margin=2.0, position="right", annotator="bo"),
        pair(green, blue, 9, position="left", annotator="=cy"),
    ]
    assert load_records(folder / "demonstrations.jsonl", Demonstration) == [
        Demonstration("The sky is", edited, "ann", "judgement-4")
    ]
    assert load_records(folder / "ratings.jsonl", Rating) == [
        Rating("The sky is", green, 4.0, "helpful", "ann", "judgement-3")
    ]
    assert load_records(folder / "labels.jsonl", Labelled) == [
        Labelled("The sky is", text, label, "ann", f"judgement-{number}")
        for text, label, number in (
            *((blue, False, "2-0"), (odd, False, "2-1")),  # both bad
            *((edited, True, "4-0"), (green, False, "4-1")),
            (odd, False, "5-0"),  # flagged
        )
    ]
    with (folder / "judgements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == ["k2", "k3", "k4", "k5", "k6", "k7", "k8", "k9", "k10"]
    assert [row["stands"] for row in rows] == ["True"] * 5 + ["False"] * 2 + ["True"] * 2
    assert rows[7] | {"at": ""} == {
        **dict.fromkeys(rows[0], ""),
        **{"number": "8", "key": "k9", "annotator": "bo", "item": "sky", "kind": "comparison", "stands": "True"},
        **{"shown": "1 0", "seconds": "2.5", "choice": "0", "strength": "2", "checkpoint": "step-100", "gold": "0"},
        "sampling": '{"seed": 3, "temperature": 0.7}',
    }
    assert rows[8]["annotator"] == "'=cy"  # no formula for a spreadsheet


def test_an_export_leaves_no_file_of_what_was_undone(tmp_path, store):
    store.record(said("k", Score(0, "helpful", 5)))
    assert export(store, tmp_path / "out")["ratings.jsonl"] == 1
    store.record(said("u", Undo("k")))
    assert export(store, tmp_path / "out")["ratings.jsonl"] == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["judgements.csv"]


def test_judgements_made_together_are_stored_together(store):
    together = [said("s/1", Comparison(0)), said("s/2", Score(0, "helpful", 4))]
    first = store.record_all(together)
    assert store.record_all(together) == first and keys(store.events()) == ["s/1", "s/2"]
    assert keys(store.events(after=1)) == ["s/2"] and store.counts() == (1, 2)
    for wrong in (
        [*together, said("s/3", Skip())],  # more than was sent before
        [said("t/1", Skip()), said("s/2", Score(0, "helpful", 5))],
    ):
        with pytest.raises(KeyReused):
            store.record_all(wrong)
    with pytest.raises(ValueError, match="is an undo|undone already"):
        store.record_all([said("u/1", Undo("s/1"), shown=()), said("u/2", Undo("s/1"), shown=())])
    assert keys(store.standing()) == ["s/1", "s/2"]  # not half of it


def test_skips_of_two_pairs_of_an_item_both_stand(store):
    store.record_all(
        [said("a", Skip(), shown=(1, 0)), said("b", Skip(), shown=(2, 0)), said("c", Skip(), shown=(0, 1))]
    )
    assert keys(store.standing()) == ["b", "c"]


def test_a_reader_sees_that_another_program_has_written(path, store):
    before = store.changes_by_others()
    store.record(ALL[0])
    assert store.changes_by_others() == before  # its own writing is no news
    with FeedbackStore(path) as other:
        other.record(ALL[1])
        assert store.changes_by_others() != before and store.counts() == (1, 2)
