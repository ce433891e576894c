"""A policy that is divided among processes ends at the weights of one that is not, and goes on as such."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharding_script as script
import torch
import worlds
from safetensors.torch import load_file

from rlhf_gym.agents import NLPO, PPO, parallel
from rlhf_gym.cli import main
from rlhf_gym.runs import read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
FLOAT32 = [family for family, settings in script.MODELS.items() if "dtype" not in settings]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All that an agent saves: weights, value head, moments, masters and generators."""
    files = [folder / f"{name}.safetensors" for name in ("model", "value_head", "trainer_state")]
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    expected, found = state(one), state(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def change(before: Path, after: Path) -> float:
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    return sum(float((second[name] - first[name]).square().sum()) for name in first) ** 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one process has saved half-way (one) and at the end (end), and two that hold half of a policy each:
    half-way (two), what they make of one process's half (again) and where they go on to from there (on)."""
    place = tmp_path_factory.mktemp("sharding")
    for family in script.MODELS:
        agent = script.agent_of(family).learn(script.HALF)
        agent.save(place / "one" / family)
        agent.learn(script.WHOLE).save(place / "end" / family)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, script.__file__, str(place)]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    (place / "printed").write_text(found.stdout + found.stderr)
    return place


@pytest.mark.parametrize("family", FLOAT32)
def test_two_processes_end_at_the_weights_of_one(folder, family):
    assert_same(folder / "one" / family, folder / "two" / family)
    assert_same(folder / "end" / family, folder / "on" / family)


def test_another_seed_ends_elsewhere(folder, tmp_path):
    script.agent_of("gpt2", seed=4).learn(script.HALF).save(tmp_path)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(tmp_path, folder / "two" / "gpt2")


@pytest.mark.parametrize("family", script.MODELS)
def test_what_one_process_has_saved_is_read_and_written_to_the_bit(folder, family):
    assert_same(folder / "one" / family, folder / "again" / family, tolerance=0)


def test_in_bfloat16_the_masters_move_alike(folder):
    one, end, on = (folder / name / "qwen3" for name in ("one", "end", "on"))
    assert any(name.startswith("trainer_state.master.") for name in state(on))
    assert change(end, on) < 0.02 * change(one, end)


def test_each_process_holds_its_part_of_the_training_state(folder):
    shares = [float(line.split()[1]) for line in (folder / "printed").read_text().splitlines() if line[:4] == "held"]
    assert len(shares) == 2 * len(script.MODELS)
    assert shares == pytest.approx([0.5] * len(shares), abs=0.02)


def test_two_processes_are_interrupted_and_one_goes_on(folder, tmp_path):
    assert "interrupted at" in (folder / "printed").read_text()
    command = [*script.TRAIN.split(), "--reward", f"{script.__file__}:interrupting", "--out"]
    assert main([*command, str(folder / "run"), "--resume"]) == 0
    assert main([*command, str(tmp_path / "one")]) == 0
    assert_same(tmp_path / "one" / "model", folder / "run" / "model")
    one, two = (read_metrics(place / "metrics.csv") for place in (tmp_path / "one", folder / "run"))
    # Adam does not mind gradients that are all too large, nor does clipping.
    for name in ("timesteps", "train/grad_norm", "train/value_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4) and len(one[name]) >= 3


def test_what_cannot_be_divided_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="fsdp divides .* a single one; start them with `torchrun"):
        PPO(worlds.make_envs(), fsdp=True)
    with pytest.raises(ValueError, match="fsdp must be False for NLPO"):
        NLPO(worlds.make_envs(kl_coef=0.05), fsdp=True)
    with pytest.raises(ValueError, match="fsdp must be"):
        PPO(worlds.make_envs(), fsdp="yes")
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match='fsdp must be False with critic="separate"'):
        PPO(worlds.make_envs(), fsdp=True, critic="separate")
    with pytest.raises(ValueError, match="fsdp needs a model of transformer blocks.* LSTMForCausalLM"):
        PPO(worlds.make_envs(kind="lstm"), fsdp=True)
    from rlhf_gym.agents.sharding import check_can_divide

    with pytest.raises(ValueError, match="fsdp must be False with lora_rank=4"):
        check_can_divide(worlds.model(), SimpleNamespace(lora_rank=4))
