"""``docs/reward_models.md`` works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[1] / "docs/reward_models.md"


def test_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(compile(block, str(PAGE), "exec"), scope)
    scope["envs"].close()
    assert scope["scores"].shape == scope["doubts"].shape == (1,) and np.isfinite(scope["scores"]).all()
    assert (tmp_path / "runs/rm/ensemble.json").is_file() and "| accuracy |" in scope["rm"].report.as_markdown()
