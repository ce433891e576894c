"""The feedback store: one SQLite file to which judgements are added, and from which none is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .judgements import KINDS, Item, Judgement, Undo, check, same_but_for_the_clock
from .schema import KEEP_JUDGEMENTS, migrate

PATIENCE_S = 30.0
"""How long to wait while another program writes."""


class KeyReused(ValueError):
    """A key that another judgement has."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A judgement as it is stored."""

    number: int
    """From 1, in the order of arrival."""
    at: str
    """When it arrived: ISO 8601, UTC."""
    judgement: Judgement


class FeedbackStore:
    """Items and judgements in a file; every judgement that `record` has returned is on disk.

    Nothing is changed or removed but by `forget`: an undo is one more row. All methods may be called from any thread, and
    several programs may have the file open. The file must be on a local disk: its write-ahead log needs shared memory.

    Example:
        >>> import tempfile
        >>> from rlhf_gym.feedback import Comparison
        >>> with tempfile.TemporaryDirectory() as folder, FeedbackStore(folder + "/feedback.sqlite") as store:
        ...     item = store.add_item(Item("The sky is", (" blue.", " green.")))
        ...     event = store.record(Judgement("k1", "ann", item.id, Comparison(0), shown=(1, 0), seconds=2.5))
        ...     print(event.number, store.standing() == [event])
        1 True
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store, or make one.

        Raises:
            FileNotFoundError: If the folder does not exist.
            OSError: If the file cannot be written.
            ValueError: If the file is something else, or of a newer version.
        """
        self.path = Path(path).expanduser()
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(self.path.parent)!r} to keep {self.path.name!r} in")
        # One connection and one lock, not a connection per thread: SQLite lets writers wait by sleeping, for up to 100 ms
        # at a time, and under 32 of them some wait for seconds.
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise _cannot_write(self.path, error) from None
        try:
            self._configure()
            migrate(self._db, str(self.path))
        except sqlite3.DatabaseError as error:
            self._db.close()
            if "unable to open" in str(error) or "readonly" in str(error):
                raise _cannot_write(self.path, error) from None
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise ValueError(f"{self.path} is no feedback store ({error}); choose another name") from None
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_item(self, item: Item) -> Item:
        """Add an item; one that is there already, the same in all, stays as it is.

        Raises:
            ValueError: If another item has its id, or its sampling settings are no JSON.
        """
        return self.add_items([item])[0]

    def add_items(self, items: Iterable[Item]) -> list[Item]:
        """Add many items, all of them or none; otherwise as `add_item`.

        Raises:
            ValueError: If another item has the id of one, or the sampling settings are no JSON.
        """
        rows = [(item, _row(item)) for item in items]
        with self._writing():
            for item, row in rows:
                found = self._db.execute("SELECT * FROM items WHERE id = ?", (item.id,)).fetchone()
                if found is None:
                    self._db.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", row)
                elif found != row:
                    raise ValueError(
                        f"id {item.id!r} is that of another item; an item never changes, give it its own id"
                    )
        return [item for item, _ in rows]

    def item(self, item_id: str) -> Item:
        """One item.

        Raises:
            KeyError: If there is none with this id.
        """
        rows = self._read("SELECT * FROM items WHERE id = ?", item_id)
        if not rows:
            raise KeyError(f"there is no item {item_id!r} in {self.path}")
        return _item(rows[0])

    def items(self) -> list[Item]:
        """All items, in the order in which they were added."""
        return [_item(row) for row in self._read("SELECT * FROM items ORDER BY rowid")]

    def record(self, judgement: Judgement) -> Event:
        """Store a judgement, and return when it is on disk.

        Sent again with the same key it is not stored again, and the answer is the same; so whoever got no answer may
        simply repeat.

        Raises:
            KeyError: If there is no such item.
            KeyReused: If the key is that of a judgement that says something else.
            ValueError: If it makes no sense for the item, or undoes what cannot be undone.
        """
        return self.record_all([judgement])[0]

    def record_all(self, judgements: Sequence[Judgement]) -> list[Event]:
        """Store judgements that were made together, all of them or none; otherwise as `record`.

        Raises:
            KeyError: If there is no such item.
            KeyReused: If a key is that of a judgement that says something else, or some are stored and others are not.
            ValueError: If one makes no sense for its item, or undoes what cannot be undone.
        """
        for judgement in judgements:
            check(judgement, self.item(judgement.item))
        with self._writing():
            earlier = [self._by_key(judgement.key) for judgement in judgements]
            if not any(earlier):
                return [self._insert(judgement) for judgement in judgements]
            for judgement, event in zip(judgements, earlier, strict=True):
                if event is None or not same_but_for_the_clock(event.judgement, judgement):
                    raise KeyReused(f"key {judgement.key!r} is that of another judgement; make a new key for each")
            return [event for event in earlier if event is not None]

    def _insert(self, judgement: Judgement) -> Event:
        """Within a transaction, add a row of which the key is new."""
        said = judgement.verdict
        if isinstance(said, Undo):
            self._check_undo(judgement, said.cancels)
        at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        cursor = self._db.execute(
            "INSERT INTO judgements (at, key, annotator, item, kind, verdict, cancels, shown, seconds)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                at,
                judgement.key,
                judgement.annotator,
                judgement.item,
                judgement.kind,
                json.dumps(dataclasses.asdict(said)),
                said.cancels if isinstance(said, Undo) else None,
                json.dumps(judgement.shown),
                None if judgement.seconds is None else float(judgement.seconds),
            ),
        )
        assert cursor.lastrowid is not None
        return Event(cursor.lastrowid, at, judgement)

    def events(self, annotator: str | None = None, *, after: int = 0) -> list[Event]:
        """All that was ever recorded, undone or not, in the order of arrival; by one annotator or by all.

        Args:
            annotator: None: all of them.
            after: Only those with a larger number.
        """
        if annotator is None:
            return [_event(row) for row in self._read(f"{_EVENTS} WHERE number > ? ORDER BY number", after)]
        query = f"{_EVENTS} WHERE annotator = ? AND number > ? ORDER BY number"
        return [_event(row) for row in self._read(query, annotator, after)]

    def counts(self) -> tuple[int, int]:
        """How many items and how many judgements there are, undone ones as well."""
        query = "SELECT (SELECT count(*) FROM items), (SELECT count(*) FROM judgements)"
        return self._read(query)[0]  # type: ignore[return-value]

    def changes_by_others(self) -> int:
        """A number that is another one once another program has written to the file."""
        return int(self._read("PRAGMA data_version")[0][0])

    def standing(self, annotator: str | None = None) -> list[Event]:
        """The judgements that stand: not undone, and not replaced by a later one of the same person on the same thing."""
        return standing(self.events(annotator))

    def forget(self, annotator: str) -> int:
        """Remove all judgements of an annotator, so that neither the file nor its log holds a byte of them.

        Exports that were made before are not reached: make them anew.

        Returns:
            The number of judgements removed.

        Raises:
            TimeoutError: If another program keeps the log from being cleared; the judgements are gone from the tables then.
        """
        with self._lock:
            with self._writing():
                self._db.execute("DROP TRIGGER judgements_are_kept")
                removed = self._db.execute("DELETE FROM judgements WHERE annotator = ?", (annotator,)).rowcount
                self._db.execute(KEEP_JUDGEMENTS)
            if self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise TimeoutError(
                    f"the judgements of {annotator!r} are removed, but another program holds on to the log of {self.path}, "
                    "where they can still be read; close that program and call forget again"
                )
        return removed

    def _configure(self) -> None:
        mode = self._log_ahead()
        if mode != "wal":
            raise ValueError(f"{self.path} cannot have a write-ahead log (it got {mode!r}); put it on a local disk")
        self._db.execute("PRAGMA synchronous = FULL")  # each commit is on disk before `record` returns
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten, not only unlinked

    def _log_ahead(self) -> str:
        # Of several who make a new file at once, SQLite turns some away here without waiting.
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return str(self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction: all of the block or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")  # waits here, not with a half-done transaction
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _by_key(self, key: str) -> Event | None:
        rows = self._read(f"{_EVENTS} WHERE key = ?", key)
        return _event(rows[0]) if rows else None

    def _check_undo(self, judgement: Judgement, cancels: str) -> None:
        found = self._by_key(cancels)
        # One message for both: what others have sent is nobody's business.
        if found is None or found.judgement.annotator != judgement.annotator:
            raise ValueError(f"cancels must be the key of a judgement of {judgement.annotator!r}, got {cancels!r}")
        if found.judgement.item != judgement.item:
            raise ValueError(f"item must be that of the judgement undone, {found.judgement.item!r}")
        if found.judgement.kind == "undo":
            raise ValueError(f"{cancels!r} is an undo, which cannot be undone; judge the item again")
        if self._read("SELECT 1 FROM judgements WHERE cancels = ?", cancels):
            raise ValueError(f"{cancels!r} is undone already")


def standing(events: Sequence[Event]) -> list[Event]:
    """Of all events of a store, or all by some annotators, those whose judgements stand; see `FeedbackStore.standing`."""
    undone = {event.judgement.verdict.cancels for event in events if isinstance(event.judgement.verdict, Undo)}
    left = [event for event in events if event.judgement.kind != "undo" and event.judgement.key not in undone]
    last = {event.judgement.topic: event.number for event in left}
    return [event for event in left if last[event.judgement.topic] == event.number]


_EVENTS = "SELECT number, at, key, annotator, item, kind, verdict, shown, seconds FROM judgements"


def _cannot_write(path: Path, error: sqlite3.Error) -> OSError:
    return OSError(f"{path} cannot be written ({error}); choose a file in a folder that you may write to")


def _event(row: tuple[Any, ...]) -> Event:
    number, at, key, annotator, item, kind, verdict, shown, seconds = row
    said = KINDS[kind](**json.loads(verdict))
    return Event(number, at, Judgement(key, annotator, item, said, tuple(json.loads(shown)), seconds))


def _row(item: Item) -> tuple[Any, ...]:
    try:
        sampling = None if item.sampling is None else json.dumps(item.sampling, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampling must be an object that JSON holds ({error}), got {item.sampling!r}") from None
    return (item.id, item.prompt, json.dumps(item.responses), item.checkpoint, sampling, item.gold)


def _item(row: tuple[Any, ...]) -> Item:
    item_id, prompt, responses, checkpoint, sampling, gold = row
    settings = None if sampling is None else json.loads(sampling)
    return Item(prompt, tuple(json.loads(responses)), checkpoint, settings, gold, item_id)
