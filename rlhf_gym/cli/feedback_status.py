"""``rlhf-gym feedback status``: what is in a store."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_gym.cli.data_check import print_table
from rlhf_gym.cli.feedback_export import existing_store
from rlhf_gym.cli.feedback_options import FeedbackStatus
from rlhf_gym.envs.render import visible
from rlhf_gym.feedback.summary import Habits, Summary, summarise
from rlhf_gym.intervals import Estimate


def run(options: FeedbackStatus) -> int:
    """Print the numbers."""
    with existing_store(options.db) as store:
        summary = summarise(store)
    if options.json:
        print(json.dumps(_plain(dataclasses.asdict(summary))))
        return 0
    print_table(visible(options.db), _facts(summary))
    _print_habits([*summary.annotators, *([summary.everyone] if len(summary.annotators) > 1 else [])])
    return 0


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "items", f"{summary.num_items:,}"
    yield "judgements that stand", f"{summary.num_standing:,}"
    for kind, count in sorted(summary.kinds.items()):
        yield f"recorded: {kind}", f"{count:,}"
    for name, agreements in (("Krippendorff's alpha", summary.alphas), ("Cohen's kappa", summary.kappas)):
        for agreement in agreements:
            shared = f"({agreement.num_units:,} judged by several)"
            yield f"{name}, {visible(agreement.name)}", f"{_number(agreement.estimate)} {shared}"


def _print_habits(rows: Sequence[Habits]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("annotator", title="Habits, with 95 % intervals", title_justify="left")
    for name in ("comparisons", "chose left", "chose the longer", "right where known", "median seconds"):
        table.add_column(name, justify="right")
    for habits in rows:
        shares = ("" if each is None else _number(each) for each in (habits.left, habits.longer, habits.gold))
        seconds = "" if habits.median_seconds is None else f"{habits.median_seconds:.1f}"
        table.add_row(escape(visible(habits.annotator)) or "everyone", f"{habits.num_comparisons:,}", *shares, seconds)
    if rows:
        Console().print(table)


def _number(estimate: Estimate) -> str:
    return "not known, all answers are alike" if math.isnan(estimate.mean) else str(estimate)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
