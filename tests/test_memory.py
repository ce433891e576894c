"""Freed memory is kept: filling the same large array again and again asks the system for its pages once."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FILLS = """
import resource, sys
import numpy as np
from rlhf_gym.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_pages_are_asked_for_once():
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FILLS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("give back", "keep")
    )
    # 64 MiB twenty times over, in pages of 4 KiB or 2 MiB, against once.
    assert given_back >= 20 * 32
    assert kept < given_back / 10


def test_other_systems_are_left_alone(monkeypatch):
    from rlhf_gym.memory import keep_freed_memory

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
