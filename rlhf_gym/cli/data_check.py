"""``rlhf-gym data check``: what a file holds, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlhf_gym.cli.data_options import DataCheck
from rlhf_gym.data import Dataset, Problems, read_dataset
from rlhf_gym.data.statistics import Count, Statistics, count_words, describe
from rlhf_gym.envs.render import visible
from rlhf_gym.intervals import Estimate

_MAX_LABELS = 10


def run(options: DataCheck) -> int:
    """Print the table; returns 1 when a row has a problem."""
    tokenizer: Any = None
    count: Count = count_words
    if options.tokenizer is not None:
        from rlhf_gym.cli.setup import quiet_transformers
        from rlhf_gym.lm.load import load_tokenizer

        quiet_transformers()
        tokenizer = load_tokenizer(options.tokenizer)
        count = token_counter(tokenizer)
    try:
        data = read_dataset(options.file, tokenizer, limit=options.max_problems)
    except ValueError as error:
        if tokenizer is None or getattr(tokenizer, "chat_template", None):
            raise
        raise ValueError(f"--tokenizer {options.tokenizer}: {error}; leave it out to count words") from None
    statistics = describe(data, count, near=options.near, similarity=options.similarity)
    if options.json:
        print(json.dumps(as_json(data, statistics)))
    else:
        print_table(visible(options.file), facts(data, statistics, "tokens" if tokenizer else "words"))
        print_problems(data.problems)
    return 1 if data.problems.total else 0


def token_counter(tokenizer: Any) -> Count:
    """Counts a text's tokens, without the special ones that the tokenizer would put around it."""
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def as_json(data: Dataset, statistics: Statistics) -> dict[str, Any]:
    """All of it as plain values."""
    problems = [{"line": p.line, "column": p.column, "message": p.message} for p in data.problems.listed()]
    form = None if data.format is None else {"name": data.format.name, "conversational": data.format.conversational}
    return {"format": form, **statistics.as_dict(), "num_problems": data.problems.total, "problems": problems}


def facts(data: Dataset, found: Statistics, unit: str) -> Iterator[tuple[str, str]]:
    """The lines of the table."""
    yield "format", str(data.format or "none")
    yield "rows", f"{found.rows:,}"
    yield "problems", f"{data.problems.total:,}"
    if not found.rows:
        return
    yield "different prompts", f"{found.prompts:,}"
    if found.annotators:
        yield "annotators", f"{found.annotators:,}"
    for name, lengths in found.lengths.items():
        if lengths.empty == found.rows:
            continue
        empty = f", {lengths.empty:,} empty" if lengths.empty else ""
        spread = f"median {lengths.median:g}, mean {lengths.mean:.1f}, 95 % up to {lengths.percentile_95:.0f}"
        yield f"{name}, {unit}", f"{spread}, longest {lengths.maximum:,}{empty}"
    yield "duplicates", ", ".join(f"{count:,} {reason}" for reason, count in found.duplicates.items()) or "none"
    if found.both_ways:
        yield "judged both ways", f"{found.both_ways:,}"
    if found.ties:
        yield "ties", f"{found.ties:,}"
    if found.chosen_longer:
        yield "chosen is longer", _share(found.chosen_longer)
    if found.length_difference:
        yield f"chosen - rejected, {unit}", _number(found.length_difference)
    if found.chosen_left:
        yield "chosen was on the left", _share(found.chosen_left)
    if found.cut_words:
        yield "implicit prompts that end inside a word", f"{found.cut_words:,}"
    if found.labels:
        shown = [f"{visible(name)}: {count:,}" for name, count in list(found.labels.items())[:_MAX_LABELS]]
        more = len(found.labels) - len(shown)
        yield "labels", ", ".join(shown) + (f" and {more} more" if more else "")
    for name, rating in (found.ratings or {}).items():
        yield f"rating{f' of {visible(name)}' if name else ''}", _number(rating)


def print_table(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Two columns."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, value in lines:
        table.add_row(escape(name), escape(value))
    Console().print(table)


def print_problems(problems: Problems) -> None:
    """A line for each of the first ones; what is quoted from the file drives no terminal."""
    listed = problems.listed()
    print_lines([f"{problems.file}, {problem}" for problem in listed], problems.total, "problems")


def print_lines(lines: Sequence[str], total: int, what: str) -> None:
    """Lines, and how many are left out."""
    for line in lines:
        print(visible(line))
    if total > len(lines):
        print(f"and {total - len(lines):,} more {what}")


def _share(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.1%}"
    return f"{estimate.mean:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _number(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.2f}"
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
