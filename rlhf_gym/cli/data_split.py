"""``rlhf-gym data split``: parts of a file that share no prompt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_gym.atomic import CHECKSUMS, replaced_directory, write_json, write_text
from rlhf_gym.cli.data_check import print_problems, print_table
from rlhf_gym.cli.data_options import DataSplit
from rlhf_gym.data import read_dataset, split_of
from rlhf_gym.data.formats import IMPLICIT_PREFERENCE
from rlhf_gym.data.split import prompt_key

RECORD = "split.json"


def run(options: DataSplit) -> int:
    """Write the parts; returns 1 when the file has problems."""
    fractions = parse_fractions(options.fractions)
    split_of("", fractions)  # refuses wrong shares before anything is read
    out = _target(options)
    data = read_dataset(options.file)
    if data.problems.total:
        print_problems(data.problems)
        print("nothing was written; mend these rows, or drop them with rlhf-gym data clean --drop-problems")
        return 1
    implicit = data.format.name == IMPLICIT_PREFERENCE
    lines: dict[str, list[str]] = {name: [] for name in fractions}
    prompts: dict[str, set[str]] = {name: set() for name in fractions}
    for row, record in zip(data.rows, data.records, strict=True):
        key = prompt_key(record, implicit=implicit)
        name = split_of(key, fractions, options.seed)
        lines[name].append(row.text + "\n")
        prompts[name].add(key)
    with replaced_directory(out) as directory:
        for name, texts in lines.items():
            write_text(directory / f"{name}.jsonl", "".join(texts))
        source = Path(options.file).expanduser()
        record_of_it = {
            "file": source.name,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "format": str(data.format),
            "fractions": fractions,
            "seed": options.seed,
            "rows": {name: len(texts) for name, texts in lines.items()},
            "prompts": {name: len(keys) for name, keys in prompts.items()},
        }
        write_json(directory / RECORD, record_of_it)
    total = len(data.rows)
    print_table(
        str(options.out),
        [
            (
                f"{name}.jsonl",
                f"rows {len(lines[name]):,} ({len(lines[name]) / total:.1%}), prompts {len(prompts[name]):,}",
            )
            for name in fractions
        ],
    )
    for name in fractions:
        if not lines[name]:
            print(f"{name}.jsonl has no row: {sum(map(len, prompts.values())):,} prompts are too few for this share")
    return 0


def parse_fractions(given: Sequence[str]) -> dict[str, float]:
    """``["train=0.9", "test=0.1"]`` as a dict.

    Raises:
        ValueError: If one is not name=share, or a name cannot be a file's or comes twice.
    """
    fractions: dict[str, float] = {}
    for text in given:
        name, equals, share = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name in fractions:
            raise ValueError(f"--fractions must be name=share, each name once, as in train=0.9 test=0.1, got {text!r}")
        try:
            fractions[name] = float(share)
        except ValueError:
            raise ValueError(f"--fractions: the share of {name} must be a number, got {share!r}") from None
    return fractions


def _target(options: DataSplit) -> Path:
    """A directory that may be written: one that is new or empty, or an earlier split that is to be replaced."""
    out = Path(options.out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {options.out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()):
        if not ((out / RECORD).is_file() and (out / CHECKSUMS).is_file()):
            raise ValueError(f"--out {options.out} holds files that are no split; choose another directory")
        if not options.overwrite:
            raise ValueError(
                f"--out {options.out} holds a split; choose another directory, or replace it with --overwrite"
            )
    return out
