"""Data: reading and checking files of prompts, demonstrations, preferences, labels and ratings; see ``docs/data.md``.

A *row* is an object of a JSONL file, a *format* says what its columns mean (TRL's names), and a *record* is the row in the
one form that fine-tuning, reward models and feedback share.
"""

from .duplicates import Duplicate, find_duplicates
from .formats import Format
from .jsonl import Row, read_jsonl, write_jsonl
from .load import Dataset, load_records, read_dataset
from .problems import DataError, Problem, Problems
from .records import (
    Demonstration,
    Labelled,
    Preference,
    PromptOnly,
    Rating,
    Record,
    as_demonstrations,
    as_labelled,
    as_row,
)
from .split import split_of

__all__ = [
    "DataError",
    "Dataset",
    "Demonstration",
    "Duplicate",
    "Format",
    "Labelled",
    "Preference",
    "Problem",
    "Problems",
    "PromptOnly",
    "Rating",
    "Record",
    "Row",
    "as_demonstrations",
    "as_labelled",
    "as_row",
    "find_duplicates",
    "load_records",
    "read_dataset",
    "read_jsonl",
    "split_of",
    "write_jsonl",
]
