"""The examples in docs/rewards.md and in the docstrings run as they are written."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_page_without_models():
    scope: dict = {}
    assert len(BLOCKS) == 10
    for block in BLOCKS[1:]:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["short"].names == ("keyword", "clip", "length_penalty")


def test_page_with_the_environment():
    scope: dict = {}
    exec(compile(BLOCKS[0], str(PAGE), "exec"), scope)
    envs = scope["envs"]
    envs.reset(seed=0)
    assert envs.unwrapped.reward.names == ("sentiment", "repetition")
    envs.close()


@pytest.mark.parametrize(
    "module", ["text", "lexicon", "references", "numeric", "content_filter", "judge", "unit_tests"]
)
def test_docstrings(module):
    if module == "references":
        pytest.importorskip("sacrebleu")
    result = doctest.testmod(importlib.import_module(f"rlhf_gym.rewards.{module}"))
    assert result.attempted > 0 and result.failed == 0
