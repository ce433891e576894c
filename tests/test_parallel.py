"""Several processes train as one: the same weights as in one process, up to the order of sums."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import parallel_script
import pytest
import torch
from safetensors.torch import load_file

from rlhf_gym.agents import RLOO, parallel
from rlhf_gym.cli import main

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str, folder: Path) -> str:
    found = subprocess.run([*TORCHRUN, *arguments], cwd=folder, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    head = folder / "value_head.safetensors"
    others = {f"head.{name}": tensor for name, tensor in load_file(head).items()} if head.is_file() else {}
    return load_file(folder / "model.safetensors") | others


def assert_same_weights(one: Path, two: Path) -> None:
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_two_processes_end_at_the_weights_of_one(tmp_path):
    printed = torchrun(parallel_script.__file__, "two", folder=tmp_path).splitlines()
    both = [[line.split() for line in printed if line.startswith(f"{rank} 2 ")] for rank in "01"]
    assert len(both[0]) == len(both[1]) == len(parallel_script.SETTINGS)
    for first, second in zip(*both, strict=True):
        assert first[2:] == second[2:]  # agent, tokens and weights to the last bit
    for name in parallel_script.SETTINGS:
        agent = parallel_script.train(name)
        assert str(agent.num_timesteps) in [line[3] for line in both[0] if line[2] == name]
        agent.save(tmp_path / "one" / name)
        assert_same_weights(tmp_path / "one" / name, tmp_path / "two" / name)
    # What the comparison can see: another seed ends elsewhere.
    parallel_script.train("RLOO", seed=4).save(tmp_path / "other")
    with pytest.raises(AssertionError, match="not close"):
        assert_same_weights(tmp_path / "other", tmp_path / "two" / "RLOO")


def test_a_run_of_two_processes_goes_on_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "train --model tiny-reviews --prompts tiny-reviews --reward sentiment --num-envs 8 --kl-coef 0.05"
    command += " --eval-episodes 8 --max-prompt-tokens 24 --max-response-tokens 24 --no-progress-bar"
    torchrun("-m", "rlhf_gym", *command.split(), "--total-timesteps", "150", "--out", "two", folder=tmp_path)
    assert main([*command.split(), "--total-timesteps", "150", "--out", "one"]) == 0
    for out in ("one", "two"):
        assert main([*command.split(), "--total-timesteps", "300", "--out", out, "--resume"]) == 0
    assert_same_weights(tmp_path / "one" / "model", tmp_path / "two" / "model")
    one, two = ((tmp_path / out / "metrics.csv").read_text().splitlines() for out in ("one", "two"))
    assert one[0] == two[0] and len(one) == len(two) >= 3


def test_rows_that_are_stepped_are_refused(monkeypatch):
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=4))
    RLOO(envs, group_size=2)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match="native environment without wrappers where several processes train together"):
        RLOO(envs, group_size=2)
