"""Freed memory is kept: filling the same large array again and again asks the system for its pages once."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FILLS = """
import resource, sys
import numpy as np
from rlhf_gym.memory import give_back_freed_memory, keep_freed_memory
if sys.argv[1] != "default":
    assert keep_freed_memory()
if sys.argv[1] == "give back":
    assert give_back_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, size: int) -> int:
    command = [sys.executable, "-c", FILLS, how, str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_pages_are_asked_for_once():
    given_back, kept = (faults(how, 2**23) for how in ("default", "keep"))
    # 64 MiB twenty times over, in pages of 4 KiB or 2 MiB, against once.
    assert given_back >= 20 * 32
    assert kept < given_back / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_pages_are_given_back_when_memory_is_short():
    given_back, default = (faults(how, 2**20) for how in ("give back", "default"))
    # 8 MiB, which glibc of its own keeps from the second time on.
    assert given_back >= 20 * 4
    assert default < given_back / 2


def test_other_systems_are_left_alone(monkeypatch):
    from rlhf_gym.memory import keep_freed_memory

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
