"""Run directories: what they refuse, and that metrics survive whatever happens to the process."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf_gym.cli import demo
from rlhf_gym.cli.options import Demo
from rlhf_gym.cli.train import train_agent
from rlhf_gym.runs import MetricsWriter, RunDirectory, read_metrics, read_rows

OPTIONS = {"agent": "ppo", "reward": ("m:f",), "total_timesteps": 10, "out": "x"}


def at(num_timesteps):
    """All that a writer wants to know of an agent."""
    return SimpleNamespace(num_timesteps=num_timesteps)


def test_new_run_is_claimed_and_a_second_one_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "x", OPTIONS)
    config = json.loads((run.path / "config.json").read_text())
    assert config["options"] == {**OPTIONS, "reward": ["m:f"]} and config["packages"]["torch"]
    with pytest.raises(ValueError, match="holds a run already.*--resume or --overwrite"):
        RunDirectory(run.path, OPTIONS)


def test_a_foreign_directory_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="not empty and holds no run"):
            RunDirectory(tmp_path, OPTIONS, **how)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # a saved model has a config.json as well
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunDirectory(tmp_path, OPTIONS, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "thesis.txt"]


def test_overwrite_deletes_only_what_a_run_makes(tmp_path):
    run = RunDirectory(tmp_path / "x", OPTIONS)
    run.write_samples("before", [{"prompt": "p"}])
    (run.path / "notes.txt").write_text("mine")
    RunDirectory(run.path, {**OPTIONS, "agent": "trpo"}, overwrite=True)
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "notes.txt", "plots"]


def test_a_demo_does_not_replace_a_training_run(tmp_path):
    run = RunDirectory(tmp_path / "x", OPTIONS)
    run.write_samples("after", [{"prompt": "p"}])
    with pytest.raises(ValueError, match="holds a run of `rlhf-gym train`"):
        demo.run(Demo(out=str(run.path)))
    assert (run.path / "samples_after.jsonl").exists()
    RunDirectory(tmp_path / "y", OPTIONS, verb="demo")
    RunDirectory(tmp_path / "y", OPTIONS, verb="demo", overwrite=True)
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="holds a run of `rlhf-gym demo`"):
            RunDirectory(tmp_path / "y", OPTIONS, **how)


def test_overwrite_leaves_no_agent_of_a_killed_process(tmp_path):
    run = RunDirectory(tmp_path / "x", OPTIONS)
    for name in (".model.previous", ".model.new-abc"):
        (run.path / name).mkdir()
        (run.path / name / "trainer_state.json").write_text("{}")
    (run.path / ".metrics.csv.new").write_text("")
    RunDirectory(run.path, OPTIONS, overwrite=True)
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "plots"]
    assert not RunDirectory(run.path, OPTIONS, resume=True).has_checkpoint


class Breaking:
    """An agent whose weights become NaN in the third update, after which it goes on or fails."""

    def __init__(self, fails):
        self.fails, self.num_timesteps, self.policy_model = fails, 0, torch.nn.Linear(1, 1)

    def learn(self, total_timesteps, callback, progress_bar):
        for update in range(1, 4):
            if update == 3:
                self.policy_model.bias.data.fill_(torch.nan)
                if self.fails:
                    raise ValueError("no token can be drawn")
            self.num_timesteps += 10
            for call in callback:
                call(self, {})

    def save(self, directory):
        directory.mkdir(exist_ok=True)
        (directory / "saved").write_text(str(self.num_timesteps))


@pytest.mark.parametrize(("fails", "every"), [(True, 2), (False, 2), (False, 1)])
def test_a_broken_agent_does_not_replace_the_last_checkpoint(tmp_path, fails, every):
    run = RunDirectory(tmp_path / "x", OPTIONS)
    with pytest.raises(
        ValueError, match="weights that are NaN or infinite and is not saved; .* keeps the last"
    ) as caught:
        train_agent(Breaking(fails), run, 30, every, False)
    assert str(caught.value).count("NaN") == 1 and ("no token" in str(caught.value)) == fails
    assert (run.model / "saved").read_text() == "20"


def test_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "x", OPTIONS)


def test_resume_wants_the_same_options(tmp_path):
    RunDirectory(tmp_path / "x", OPTIONS)
    same = RunDirectory(tmp_path / "x", {**OPTIONS, "total_timesteps": 20}, resume=True)
    assert not same.has_checkpoint  # nothing was saved yet: it starts anew
    with pytest.raises(ValueError, match="cannot resume.*agent was 'ppo' and is now 'trpo'"):
        RunDirectory(tmp_path / "x", {**OPTIONS, "agent": "trpo"}, resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        RunDirectory(tmp_path / "x", OPTIONS, resume=True, overwrite=True)


def test_columns_may_appear_later(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer(at(10), {"a": 1.5})
        writer(at(20), {"a": 2.5, "b": 7.0})
        writer(at(30), {"b": 8.0})
    columns = read_metrics(tmp_path / "metrics.csv")
    assert columns["timesteps"] == [10, 20, 30] and columns["a"][:2] == [1.5, 2.5] and columns["b"][1:] == [7, 8]
    assert columns["a"][2] != columns["a"][2] and columns["b"][0] != columns["b"][0]  # NaN: not reported


def test_resuming_drops_updates_after_the_checkpoint_and_a_torn_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for t in (10, 20, 30):
            writer(at(t), {"a": t / 10})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("40,0.1")  # killed in the middle of a line
    assert len(read_rows(tmp_path / "metrics.csv")) == 3
    with MetricsWriter(tmp_path, resume_at=20) as writer:
        writer(at(30), {"a": 33.0})
    columns = read_metrics(tmp_path / "metrics.csv")
    assert columns["timesteps"] == [10, 20, 30] and columns["a"] == [1, 2, 33]
    assert columns["seconds"] == sorted(columns["seconds"])


def test_kill_9_loses_no_line(tmp_path):
    code = """
import os, signal, sys
from types import SimpleNamespace
from rlhf_gym.runs import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for i in range(1, 6):
    writer(SimpleNamespace(num_timesteps=i), {"a": i, **({"late": 1} if i > 3 else {})})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert read_metrics(tmp_path / "metrics.csv")["a"] == [1, 2, 3, 4, 5]


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        writer(at(10), {"objective/kl": 0.25})
        writer(at(20), {"objective/kl": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("objective/kl")
    assert [(event.step, event.value) for event in events] == [(10, 0.25), (20, 0.5)]


def test_resuming_keeps_the_event_of_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for t in (10, 20, 30):
            writer(at(t), {"a": t})
    with MetricsWriter(tmp_path, resume_at=20) as writer:
        writer(at(30), {"a": 33})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("a")
    assert [(event.step, event.value) for event in events] == [(10, 10), (20, 20), (30, 33)]
