"""Files and directories that are there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from rlhf_gym import atomic
from rlhf_gym.atomic import replaced_directory, verified_files, write_json


def save(directory, text="new"):
    with replaced_directory(directory) as folder:
        (folder / "a.txt").write_text(text)


def test_what_a_killed_save_leaves_is_gone_after_the_next(tmp_path):
    code = """
import os, signal, sys
from rlhf_gym.atomic import replaced_directory
with replaced_directory(sys.argv[1]) as folder:
    (folder / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "x[1]"  # no pattern
    (tmp_path / ".other.new-1").mkdir()
    save(target, "old")
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 3
    assert (target / "a.txt").read_text() == "old"
    save(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.new-1", "x[1]"]
    assert (verified_files(target, "a.txt") / "a.txt").read_text() == "new"


def test_windows_opens_no_directory_and_syncs_only_what_it_may_write(tmp_path, monkeypatch):
    opened, real = [], os.open

    def recorded(path, flags, *mode, **more):
        opened.append((os.path.isdir(path), flags & os.O_ACCMODE))
        return real(path, flags, *mode, **more)

    monkeypatch.setattr(atomic, "_WINDOWS", True)
    monkeypatch.setattr(os, "open", recorded)
    save(tmp_path / "x")
    write_json(tmp_path / "y.json", {})
    assert opened and {access for _, access in opened} == {os.O_RDWR} and not any(directory for directory, _ in opened)
