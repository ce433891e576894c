"""From a feedback store to the records and files that fine-tuning and reward models take, and to a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any, Literal

from rlhf_gym.atomic import write_text
from rlhf_gym.data import Demonstration, Labelled, Preference, Rating, Record, as_row, write_jsonl

from .judgements import Comparison, Correction, Flag, Item, Judgement, Score
from .store import FeedbackStore

CSV_COLUMNS = (
    *("number", "at", "key", "annotator", "item", "kind", "stands", "shown", "seconds"),
    *("choice", "strength", "response", "criterion", "rating", "text", "reason", "cancels"),
    *("checkpoint", "sampling", "gold"),
)


def preferences(store: FeedbackStore) -> list[Preference]:
    """Pairs of the comparisons that stand, and of the corrections, each better than the response it corrects.

    The margin is the strength that was given. Both "tie" and "both bad" are ties; the one shown left is then called chosen.
    """
    found = []
    for number, judgement, item in _standing(store):
        said = judgement.verdict
        if isinstance(said, Comparison):
            left, right = judgement.shown
            tie = isinstance(said.choice, str)
            chosen = left if tie else said.choice
            assert isinstance(chosen, int)
            rejected = right if chosen == left else left
            position: Literal["left", "right"] = "left" if chosen == left else "right"
            found.append(
                Preference(
                    item.prompt,
                    item.responses[chosen],
                    item.responses[rejected],
                    margin=None if said.strength is None else float(said.strength),
                    tie=tie,
                    position=position,
                    annotator=judgement.annotator,
                    id=f"judgement-{number}",
                )
            )
        elif isinstance(said, Correction):
            original = item.responses[said.response]
            by = judgement.annotator
            found.append(Preference(item.prompt, said.text, original, annotator=by, id=f"judgement-{number}"))
    return found


def demonstrations(store: FeedbackStore) -> list[Demonstration]:
    """The corrected responses that stand, to learn from."""
    return [
        Demonstration(item.prompt, judgement.verdict.text, judgement.annotator, f"judgement-{number}")
        for number, judgement, item in _standing(store)
        if isinstance(judgement.verdict, Correction)
    ]


def ratings(store: FeedbackStore) -> list[Rating]:
    """The ratings that stand, one per response, criterion and annotator."""
    return [
        Rating(
            item.prompt,
            item.responses[judgement.verdict.response],
            float(judgement.verdict.rating),
            judgement.verdict.criterion,
            judgement.annotator,
            f"judgement-{number}",
        )
        for number, judgement, item in _standing(store)
        if isinstance(judgement.verdict, Score)
    ]


def labels(store: FeedbackStore) -> list[Labelled]:
    """Responses that somebody called bad (flagged, "both bad", or corrected) and the corrected ones, which are good."""
    found = []
    for number, judgement, item in _standing(store):
        said = judgement.verdict
        texts: list[tuple[str, bool]] = []
        if isinstance(said, Correction):
            texts = [(said.text, True), (item.responses[said.response], False)]
        elif isinstance(said, Flag):
            texts = [(item.responses[said.response], False)]
        elif isinstance(said, Comparison) and said.choice == "both bad":
            texts = [(item.responses[shown], False) for shown in judgement.shown]
        found += [
            Labelled(item.prompt, text, label, judgement.annotator, f"judgement-{number}-{place}")
            for place, (text, label) in enumerate(texts)
        ]
    return found


def export(store: FeedbackStore, directory: str | Path) -> dict[str, int]:
    """Write ``preferences.jsonl``, ``demonstrations.jsonl``, ``ratings.jsonl``, ``labels.jsonl`` and
    ``judgements.csv``.

    A JSONL file without a row is not written, and one from an earlier export is removed: it may hold judgements that were
    undone or forgotten since.

    Args:
        store: The store.
        directory: Made if it is missing.

    Returns:
        The number of rows in each file, 0 for those that were not written.
    """
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, list[Any]] = {
        "preferences.jsonl": preferences(store),
        "demonstrations.jsonl": demonstrations(store),
        "ratings.jsonl": ratings(store),
        "labels.jsonl": labels(store),
    }
    for name, records in kinds.items():
        _write(directory / name, records)
    rows = csv_rows(store)
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(value) for name, value in row.items()} for row in rows)
    write_text(directory / "judgements.csv", text.getvalue())
    return {name: len(records) for name, records in kinds.items()} | {"judgements.csv": len(rows)}


def csv_rows(store: FeedbackStore) -> list[dict[str, Any]]:
    """A row for every judgement, undone ones as well, with what is known of its item; the columns of `CSV_COLUMNS`."""
    events = store.events()  # before the other two: an item is always there before its judgements
    standing = {event.number for event in store.standing()}
    items = {item.id: item for item in store.items()}
    rows = []
    for event in events:
        judgement, item = event.judgement, items[event.judgement.item]
        row = {
            "number": event.number,
            "at": event.at,
            "key": judgement.key,
            "annotator": judgement.annotator,
            "item": item.id,
            "kind": judgement.kind,
            "stands": event.number in standing,
            "shown": " ".join(map(str, judgement.shown)),
            "seconds": judgement.seconds,
            "checkpoint": item.checkpoint,
            "sampling": None if item.sampling is None else json.dumps(item.sampling, sort_keys=True),
            "gold": item.gold,
            **dataclasses.asdict(judgement.verdict),
        }
        rows.append(row)
    return rows


def _standing(store: FeedbackStore) -> list[tuple[int, Judgement, Item]]:
    events = store.standing()
    items = {item.id: item for item in store.items()}
    return [(event.number, event.judgement, items[event.judgement.item]) for event in events]


def _write(path: Path, records: list[Record]) -> None:
    if records:
        write_jsonl(path, map(as_row, records))
    else:
        path.unlink(missing_ok=True)


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe; the JSONL files hold it as it is."""
    return "'" + value if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
