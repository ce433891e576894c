"""``rlhf-gym train-rm`` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from worlds import model, tokenizer

from rlhf_gym.cli import main
from rlhf_gym.reward_models import fit as fit_module
from rlhf_gym.rewards import RewardInputs, as_reward

OPENINGS = ("the cat", "a dog", "the dog", "a very", "the", "and the cat", "a cat and", "the very")
FIXED = (
    "--model base --out rm --num-epochs 3 --batch-size 4 --learning-rate 3e-3 --no-progress-bar --no-baselines".split()
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model and preferences of two people."""
    monkeypatch.chdir(tmp_path)
    model(std=0.2).save_pretrained("base")
    tokenizer().save_pretrained("base")
    rows = [
        {"prompt": p, "chosen": f"{w} good", "rejected": f"{w} bad", "annotator": "ab"[i % 2], "gold": "chosen"}
        for i, p in enumerate(OPENINGS)
        for w in ("sat", "ran")
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(*more, file="pairs.jsonl"):
    return main(["train-rm", file, *FIXED, *more])


def one_line(capsys):
    """The only line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rlhf-gym: "), lines
    return lines[0]


def score(spec, texts):
    return (
        as_reward(spec)
        .score(RewardInputs(["the cat"] * len(texts), texts, [[0]] * len(texts), [[1]] * len(texts)))
        .total
    )


def test_train_and_use(place, capsys):
    assert train() == 0
    printed = capsys.readouterr().out
    assert "parameters trained" in printed and "agreement with gold" in printed and "accuracy, a" in printed
    assert score("rm", ["sat good"]) > score("rm", ["sat bad"])
    report = json.loads(Path("rm/report.json").read_text())
    assert report["models"]["reward model"]["gold"]["agreement"]["mean"] == 1.0 and report["num_judgements"] >= 2
    details = json.loads(Path("rm/training.json").read_text())
    assert details["file"] == "pairs.jsonl" and details["config"]["num_epochs"] == 3 and len(details["sha256"]) == 64
    assert not list(place.glob(".rm*"))  # the state of the training is gone
    Path("prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    task = "--model base --reward rm --prompts prompts.jsonl --max-response-tokens 4"
    assert main(["evaluate", *task.split(), "--num-episodes", "4"]) == 0


def test_ensembles_and_baselines(place, capsys):
    assert train("--members", "2", "--rule", "mean-std", "--std-coef", "0.5", "--baselines", "--train-layers", "0") == 0
    printed = capsys.readouterr().out
    assert "linear" in printed and "n-gram" in printed and "a head of 16 parameters" in printed
    members = np.stack([score(f"rm/member_{i}", ["sat good", "ran"]) for i in range(2)])
    expected = members.mean(0) - 0.5 * members.std(0, ddof=1)
    np.testing.assert_allclose(score("rm", ["sat good", "ran"]), expected, atol=1e-5)


def test_held_out_file_and_reference(place, capsys):
    Path("held_out.jsonl").write_text('{"prompt": "a", "chosen": "good", "rejected": "bad"}\n' * 3)
    Path("reference.jsonl").write_text(
        "".join(json.dumps({"prompt": "the cat", "completion": c}) + "\n" for c in ("sat good", "sat", "sat bad"))
    )
    assert train("--eval", "held_out.jsonl", "--reference", "reference.jsonl") == 0
    assert json.loads(Path("rm/report.json").read_text())["num_judgements"] == 3
    found = score("rm", ["sat good", "sat", "sat bad"])
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-5)


def test_an_interrupted_training_goes_on(place, capsys, monkeypatch):
    assert train("--held-out", "0") == 0
    whole = load_file("rm/model.safetensors")
    save = fit_module.Fit._save

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module.Fit, "_save", interrupted)
    assert train("--held-out", "0", "--overwrite") == 130
    assert "--resume goes on" in one_line(capsys)
    monkeypatch.setattr(fit_module.Fit, "_save", save)
    assert train("--held-out", "0") == 2
    assert "holds a finished reward model" in one_line(capsys)  # the one from before, which is still whole
    assert train("--held-out", "0", "--resume", "--seed", "1") == 2
    assert "seed was 0 and is now 1" in one_line(capsys)
    assert train("--held-out", "0", "--resume") == 0
    resumed = load_file("rm/model.safetensors")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--members", "0"], "--members must be at least 1"),
        (["--held-out", "1"], "--held-out must be at least 0 and below 1"),
        (["--label-smoothing", "0.7"], "label_smoothing must be in [0, 0.5)"),
        (["--out", "base"], "holds no reward model"),
        (["--kind", "ordinal"], "kind must be 'preference'"),
        (["--model", "nowhere"], "nowhere"),
        (["--overwrite", "--resume"], "exclude each other"),
        (["--eval", "nothing.jsonl"], "nothing.jsonl"),
        (["--reference", "pairs.jsonl"], "prompt-completion"),
    ],
)
def test_refusals(place, capsys, arguments, says):
    assert train(*arguments) == 2
    assert says in one_line(capsys)
    assert not list(place.glob("*rm*"))


def test_out_is_needed(place, capsys):
    assert main(["train-rm", "pairs.jsonl"]) == 2
    assert "needs --out" in one_line(capsys)
