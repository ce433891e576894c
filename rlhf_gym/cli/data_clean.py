"""``rlhf-gym data clean``: a file without the rows that repeat others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_gym.atomic import write_text
from rlhf_gym.cli.data_check import print_lines, print_problems, print_table
from rlhf_gym.cli.data_options import DataClean
from rlhf_gym.cli.files import new_file
from rlhf_gym.data import Dataset, Duplicate, find_duplicates, read_dataset, write_jsonl


def run(options: DataClean) -> int:
    """Write what stays and print what goes; returns 1 when the file has problems and they are not to be dropped."""
    out = new_file("--out", options.out, options.overwrite, options.file)
    dropped = (
        None if options.dropped is None else (new_file("--dropped", options.dropped, options.overwrite, options.file))
    )
    if dropped is not None and out.resolve() == dropped.resolve():
        raise ValueError("--out and --dropped must be two files")
    # All problems are kept: each is a dropped row.
    data = read_dataset(options.file, limit=10**9)
    if data.problems.total and not options.drop_problems:
        _print_some_problems(data, options.max_problems)
        print("nothing was written; mend these rows, or drop them with --drop-problems")
        return 1
    duplicates = find_duplicates(data.records, near=options.near, similarity=options.similarity)
    gone = {duplicate.index for duplicate in duplicates}
    kept = [row.text for i, row in enumerate(data.rows) if i not in gone]
    if not kept:
        raise ValueError(f"{options.file}: no row is left, so nothing was written")
    if dropped is not None:  # first: --out may replace the input, from which it takes the lines with problems
        write_jsonl(dropped, [*_problem_rows(data), *(_duplicate_row(data, duplicate) for duplicate in duplicates)])
    write_text(out, "".join(line + "\n" for line in kept))
    _report(options, data, duplicates, len(kept))
    return 0


def _report(options: DataClean, data: Dataset, duplicates: list[Duplicate], num_kept: int) -> None:
    broken = len({problem.line for problem in data.problems.listed()})
    lines = [("rows read", f"{len(data.rows) + broken:,}")]
    if broken:
        lines.append(("dropped: with problems", f"{broken:,}"))
    for reason in ("exact", "near", "same response twice"):
        count = sum(duplicate.reason == reason for duplicate in duplicates)
        if reason != "near" or options.near:
            lines.append((f"dropped: {'' if 'same' in reason else 'duplicate, '}{reason}", f"{count:,}"))
    lines.append(("rows written", f"{num_kept:,}"))
    if broken:
        _print_some_problems(data, options.max_problems)
    shown = duplicates[: options.max_problems]
    print_lines([_why(data, duplicate) for duplicate in shown], len(duplicates), "duplicates")
    print_table(str(options.out), lines)


def _why(data: Dataset, duplicate: Duplicate) -> str:
    line, of = data.rows[duplicate.index].line, data.rows[duplicate.of].line
    if duplicate.reason == "same response twice":
        return f"line {line}: its two responses are the same"
    if duplicate.reason == "exact":
        return f"line {line}: the same as line {of}"
    return f"line {line}: nearly the same as line {of} (similarity {duplicate.similarity:.2f})"


def _print_some_problems(data: Dataset, limit: int) -> None:
    problems = data.problems
    if limit < problems.total:
        print_lines([f"{problems.file}, {p}" for p in problems.listed()[:limit]], problems.total, "problems")
    else:
        print_problems(problems)


def _problem_rows(data: Dataset) -> list[dict[str, Any]]:
    """What is wrong with each line, and the line: with --overwrite it is nowhere else."""
    messages: dict[int, list[str]] = {}
    for problem in data.problems.listed():
        messages.setdefault(problem.line, []).append(problem.message)
    found = []
    with Path(data.problems.file).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number in messages:
                text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
                message = "; ".join(messages[number])
                found.append({"line": number, "reason": "problem", "message": message, "text": text})
    return found


def _duplicate_row(data: Dataset, duplicate: Duplicate) -> dict[str, Any]:
    return {
        "line": data.rows[duplicate.index].line,
        "reason": duplicate.reason,
        "of_line": data.rows[duplicate.of].line,
        "similarity": duplicate.similarity,
        "row": data.rows[duplicate.index].value,
    }
