"""Functions that the benchmark's tests call in other processes, which must not take long to begin."""

from __future__ import annotations

import os
import time
from pathlib import Path


def dies_at_two(x, folder):
    """Ends its process; a file for each time."""
    (Path(folder) / f"{x}-{os.getpid()}").touch()
    if x == 2:
        os._exit(3)
    return {"square": x * x}


def sleeps(x, folder):
    (Path(folder) / f"{os.getpid()}").touch()
    time.sleep(60)
