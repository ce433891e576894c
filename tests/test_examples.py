"""The examples run, on tiny budgets, and are what they say they are."""

from __future__ import annotations

import ast
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """name -> the module; what examples write goes to a temporary directory."""
    monkeypatch.chdir(tmp_path)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def imported(name):
    """Top-level names of the packages that an example imports."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_custom_reward(example, tmp_path):
    agent = example("custom_reward").main(total_timesteps=1)
    assert agent.num_timesteps >= 64  # one token at least from each row
    assert any((tmp_path / "runs" / "five_stars").rglob("*.safetensors"))


def test_custom_reward_takes_fifteen_lines_of_code():
    source = (EXAMPLES / "custom_reward.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstring = range(1, tree.body[0].end_lineno + 1)
    lines = [n for n, line in enumerate(source.splitlines(), 1) if line.strip() and n not in docstring]
    assert len(lines) <= 15


@pytest.mark.parametrize("name", ["cleanrl_style_reinforce", "custom_agent", "sb3_style_agent"])
def test_strangers_import_nothing_of_ours(name):
    assert not {"rlhf_gym", "agents"} & set(imported(name))


def test_cleanrl_style_reinforce(example):
    scores = example("cleanrl_style_reinforce").main(num_iterations=2, num_envs=3, num_steps=40)
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)


def test_custom_agent(example, capsys):
    """On a language model; in the benchmark it is tests/test_benchmark.py's."""
    agent = example("custom_agent").main(total_timesteps=1)
    assert agent.num_timesteps >= 32 and capsys.readouterr().out.startswith(f"{agent.num_timesteps} ")


def test_sb3_style_agent(example, capsys):
    first, last = example("sb3_style_agent").main(total_timesteps=20, episodes_per_update=2)
    assert 0 <= first <= 1 and 0 <= last <= 1
    assert "..." in capsys.readouterr().out


def test_sb3_trpo(example):
    agent = example("sb3_trpo").main(total_timesteps=64, num_envs=2)
    assert agent.num_timesteps >= 64


def test_sb3_trpo_with_a_stock_algorithm(example):
    model = example("sb3_trpo").main("stock", total_timesteps=64, num_envs=2)
    assert math.isfinite(model.logger.name_to_value.get("train/loss", 0.0)) and model.num_timesteps >= 64


def test_an_example_runs_as_a_script(tmp_path):
    script = [sys.executable, str(EXAMPLES / "sb3_style_agent.py"), "1"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("score: ")
