"""Files that the user names, run as modules."""

from __future__ import annotations

import sys

import pytest

from rlhf_gym.import_file import import_file


def test_it_finds_its_neighbours_and_runs_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_it.py").write_text("runs = []\n")
    file = tmp_path / "it.py"
    file.write_text("from dataclasses import dataclass\nfrom neighbour_of_it import runs\nruns.append(__name__)\n"
                    "@dataclass\nclass Settings:\n    rate: 'float' = 0.5\n")  # fmt: skip
    first = import_file(file, "a_file_that_is_named")
    assert import_file(file, "a_file_that_is_named") is first
    assert first.runs == ["a_file_that_is_named"] and first.Settings().rate == 0.5
    assert sys.path[-1] == str(tmp_path)  # hides nothing
    for name in ("a_file_that_is_named", "neighbour_of_it"):
        del sys.modules[name]


@pytest.mark.parametrize("error", ["ValueError", "KeyboardInterrupt"])
def test_a_file_that_raises_leaves_nothing_behind(tmp_path, error):
    path = list(sys.path)
    file = tmp_path / "it.py"
    file.write_text(f"raise {error}('no')\n")
    with pytest.raises((ValueError, KeyboardInterrupt)):
        import_file(file, "a_file_that_raises")
    assert sys.path == path and "a_file_that_raises" not in sys.modules
