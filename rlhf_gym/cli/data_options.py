"""The options of ``rlhf-gym data``. Like `options`, it imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Similar:
    """When two rows count as nearly the same."""

    near: bool = True
    """Look for near duplicates as well as for exact ones."""
    similarity: float = 0.8
    """Least similarity of each text of near duplicates: shared pairs of neighbouring words over all of both."""

    def __post_init__(self):
        if not 0 < self.similarity <= 1:
            raise ValueError(f"--similarity must be above 0 and at most 1, got {self.similarity:g}")


@dataclass(frozen=True, kw_only=True)
class DataCheck(Similar):
    """Check a file of prompts, preferences, demonstrations, labels or ratings; exit code 1 when a row has a problem."""

    file: str
    """A JSONL file in one of TRL's formats; see docs/data.md."""
    tokenizer: str | None = None
    """Measure lengths in its tokens, not in words: a packaged model, a directory or a hub id. Conversations are read
    with its chat template."""
    max_problems: int = 20
    """Problems to list; further ones are counted."""
    json: bool = False
    """Print the numbers and problems as JSON instead of the table."""

    def __post_init__(self):
        super().__post_init__()
        _check_max_problems(self.max_problems)


@dataclass(frozen=True, kw_only=True)
class DataClean(Similar):
    """Write a file again without the rows that repeat others; the first of several stays."""

    file: str
    """A JSONL file in one of TRL's formats; see docs/data.md."""
    out: str | None = None
    """File to write; its rows are those of the input, unchanged."""
    dropped: str | None = None
    """Write what was dropped, with the reason, to this .jsonl file."""
    drop_problems: bool = False
    """Drop rows with problems, too; without it such a file is refused."""
    overwrite: bool = False
    """Replace files that exist, the input included."""
    max_problems: int = 20
    """Problems and dropped rows to list; further ones are counted."""

    def __post_init__(self):
        super().__post_init__()
        _check_max_problems(self.max_problems)
        if self.out is None:
            raise ValueError("--out is missing: the file to write")


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """Divide a file by its prompts: no prompt is in two parts, and rows added later leave the others where they are."""

    file: str
    """A JSONL file in one of TRL's formats; see docs/data.md."""
    out: str | None = None
    """Directory to write a .jsonl file for each part to."""
    fractions: tuple[str, ...] = ("train=0.9", "test=0.1")
    """Parts as name=share; the shares add up to 1."""
    seed: int = 0
    """Another seed gives another split."""
    overwrite: bool = False
    """Replace an earlier split in the same directory."""

    def __post_init__(self):
        if self.out is None:
            raise ValueError("--out is missing: the directory to write to")


def _check_max_problems(value: int) -> None:
    if value < 1:
        raise ValueError(f"--max-problems must be at least 1, got {value}")
