"""``rlhf-gym feedback export``: judgements as files to train on."""

from __future__ import annotations

from pathlib import Path

from rlhf_gym.cli.data_check import print_table
from rlhf_gym.cli.feedback_options import FeedbackExport
from rlhf_gym.envs.render import visible
from rlhf_gym.feedback import FeedbackStore, export


def run(options: FeedbackExport) -> int:
    """Write the files and say how many rows each has."""
    with existing_store(options.db) as store:
        written = export(store, str(options.out))
    print_table(visible(str(options.out)), [(name, f"{rows:,} rows") for name, rows in written.items() if rows])
    if not any(written.values()):
        print("there are no judgements yet")
    return 0


def existing_store(path: str) -> FeedbackStore:
    """Open a store that is there.

    Raises:
        FileNotFoundError: If it is not; opening would make an empty one.
    """
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"there is no file {path!r}; rlhf-gym label makes one")
    return FeedbackStore(path)
