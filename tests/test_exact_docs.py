"""docs/exact.md: its Python blocks print what the page says, and its tables and pictures have a command and a source."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from rlhf_gym.benchmarks import estimators

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "exact.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n```\n(.*?)^```$", PAGE, re.M | re.S)


def unsigned(text: str) -> str:
    """Zeros without a sign: whether a rounding error is above or below 0 is nobody's business."""
    return re.sub(r"-(0\.0+)(?!\d)", r"\1", text)


def test_python_blocks_print_what_the_page_says():
    assert len(BLOCKS) == PAGE.count("```python") >= 10
    scope: dict = {}
    for code, expected in BLOCKS:
        trains = ".learn(" in code  # a short run here; what a long one comes to depends on the machine's arithmetic
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(re.sub(r"learn\([\d_]+\)", "learn(1_000)", code), "docs/exact.md", "exec"), scope)
        if not trains:
            assert unsigned(printed.getvalue()) == unsigned(expected)


def test_every_figure_has_its_command():
    figures = re.findall(r"!\[[^]]+\]\((images/[^)]+)\)", PAGE)
    assert len(figures) == 4
    for figure in figures:
        assert (ROOT / "docs" / figure).is_file()
        assert re.search(rf"^python -m rlhf_gym\.benchmarks\.\w+ .*docs/{figure}$", PAGE, re.M), figure


def test_estimator_table_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "estimators.json").read_text(encoding="utf-8"))
    assert estimators.as_markdown(found["tasks"], found["cells"]) in PAGE
    assert found["command"] in PAGE


@pytest.mark.parametrize("text", ["-0.0000 x", "-0.00"])
def test_unsigned(text):
    assert unsigned(text) == text[1:] and unsigned("-0.001") == "-0.001"
