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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes have made: agents (by name), a run of the command line (run) and what they say (printed)."""
    place = tmp_path_factory.mktemp("parallel")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, parallel_script.__file__, str(place)]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    (place / "printed").write_text(found.stdout)
    return place


def weights(folder: Path) -> dict[str, torch.Tensor]:
    head = folder / "value_head.safetensors"
    others = {f"head.{name}": tensor for name, tensor in load_file(head).items()} if head.is_file() else {}
    return load_file(folder / "model.safetensors") | others


def assert_same_weights(one: Path, two: Path) -> None:
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_two_processes_end_at_the_weights_of_one(folder, tmp_path):
    printed = (folder / "printed").read_text().splitlines()
    both = [[line.split() for line in printed if line.startswith(f"{rank} 2 ")] for rank in "01"]
    assert len(both[0]) == len(both[1]) == len(parallel_script.SETTINGS)
    for first, second in zip(*both, strict=True):
        assert first[2:] == second[2:]  # agent, tokens and weights to the last bit
    for name in parallel_script.SETTINGS:
        agent = parallel_script.train(name)
        assert str(agent.num_timesteps) in [line[3] for line in both[0] if line[2] == name]
        agent.save(tmp_path / name)
        assert_same_weights(tmp_path / name, folder / name)
    # What the comparison can see: another seed ends elsewhere.
    parallel_script.train("RLOO", seed=4).save(tmp_path / "other")
    with pytest.raises(AssertionError, match="not close"):
        assert_same_weights(tmp_path / "other", folder / "RLOO")


def test_a_run_of_two_processes_goes_on_in_one(folder, tmp_path):
    one, two = tmp_path / "one", folder / "run"
    train = [*parallel_script.TRAIN.split(), "--total-timesteps"]
    assert main([*train, "150", "--out", str(one)]) == 0
    for out in (one, two):
        assert main([*train, "300", "--out", str(out), "--resume"]) == 0
    assert_same_weights(one / "model", two / "model")
    lines = [(out / "metrics.csv").read_text().splitlines() for out in (one, two)]
    assert lines[0][0] == lines[1][0] and len(lines[0]) == len(lines[1]) >= 3


def test_rows_that_are_stepped_are_refused(monkeypatch):
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=4))
    RLOO(envs, group_size=2)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match="native environment without wrappers where several processes train together"):
        RLOO(envs, group_size=2)
