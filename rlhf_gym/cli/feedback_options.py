"""The options of ``rlhf-gym label`` and ``rlhf-gym feedback``. Like `options`, it imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Label:
    """Open a page where people compare, rate and correct responses."""

    run: str | None = None
    """A run directory: its samples before and after the training are compared."""
    file: str | None = None
    """A .jsonl file with a "prompt" and "responses" (a list of texts) in each line; see docs/human_feedback.md. Without
    this and --run, the items that are in --db already."""
    db: str | None = None
    """The SQLite file that keeps the judgements; when left out feedback.sqlite in the run directory, or beside the file."""
    port: int = 8642
    """Port to listen on; 0 takes any that is free."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but loopback needs the token that is printed, and speaks plain HTTP."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which people reach this machine; requests to other names are refused."""
    open: bool = True
    """Open the page in a browser."""
    criteria: tuple[str, ...] = ()
    """What each response is rated for, from 1 to 5, besides being compared."""
    guidelines: str | None = None
    """A text file that annotators see above the questions."""
    overlap: float = 1.0
    """People who judge each question; 1.2 gives every fifth question to two."""
    gold_rate: float = 0.1
    """Share of questions of which the file knows the answer ("gold": place of the best response), where it has such."""
    order_by: str | None = None
    """A column of numbers; the largest are asked first, for instance how far an ensemble disagrees. Left out: random."""
    seed: int = 0
    """Seed of the order of questions and of what is shown left."""

    def __post_init__(self):
        if self.run is not None and self.file is not None:
            raise ValueError("--run and --file exclude each other: give one of them")
        if self.run is None and self.file is None and self.db is None:
            raise ValueError("nothing to judge: give --file, --run, or a --db that has items")
        if self.order_by is not None and self.run is None and self.file is None:
            raise ValueError("--order-by is a column of --file or --run; give one of them")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be from 0 to 65535, got {self.port}")


@dataclass(frozen=True, kw_only=True)
class FeedbackExport:
    """Write judgements as preferences, demonstrations and ratings in TRL's formats, and as one CSV table."""

    db: str
    """The SQLite file that keeps the judgements."""
    out: str | None = None
    """Directory to write to; what an earlier export has written there is replaced."""

    def __post_init__(self):
        if self.out is None:
            raise ValueError("--out is missing: the directory to write to")


@dataclass(frozen=True, kw_only=True)
class FeedbackForget:
    """Remove all judgements of an annotator for good; exports made before are not reached."""

    db: str
    """The SQLite file that keeps the judgements."""
    annotator: str | None = None
    """The name."""

    def __post_init__(self):
        if self.annotator is None:
            raise ValueError("--annotator is missing: the name of whom to forget")


@dataclass(frozen=True, kw_only=True)
class FeedbackStatus:
    """Say how much was judged, how far annotators agree, and what pulls them."""

    db: str
    """The SQLite file that keeps the judgements."""
    json: bool = False
    """Print the numbers as JSON instead of the tables."""
