"""The examples in docs/sb3.md run as they are written, for a shorter time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "sb3.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch")
def test_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    assert len(BLOCKS) == 7
    for block in BLOCKS:
        shorter = re.sub(r"n_steps=\d+", "n_steps=8", re.sub(r"learn\(\d+", "learn(64", block))
        exec(compile(shorter, str(PAGE), "exec"), scope)
    assert (tmp_path / "runs" / "reviews" / "model.safetensors").is_file()
    assert type(scope["agent"]).__name__ == "MlpAgent.of(ARS)"
