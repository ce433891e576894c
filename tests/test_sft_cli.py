"""``rlhf-gym sft`` from outside: a text file or rows in, a run directory out that the other commands take."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import gymnasium as gym
import pytest
from transformers import AutoModelForCausalLM
from worlds import model, tokenizer

from rlhf_gym.cli import main
from rlhf_gym.cli.parse import parse
from rlhf_gym.lm import load_language_model
from rlhf_gym.runs import MetricsWriter, read_metrics

ANSWERS = ("good and very good", "bad", "very bad")
ROWS = [
    {"prompt": f"{article} {animal}", "completion": f" {answer}"}
    for article in ("the", "a")
    for animal in ("cat", "dog")
    for answer in ANSWERS
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model and data."""
    monkeypatch.chdir(tmp_path)
    model("llama").save_pretrained("base")
    tokenizer().save_pretrained("base")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("text.txt").write_text("the cat sat and the dog ran .\n" * 30)


def sft(*more, out="runs/x", data="rows.jsonl"):
    """Exit code of a small run: 9 rows to learn, 3 held out, 3 steps per epoch."""
    fixed = f"--data {data} --out {out} --num-epochs 2 --batch-size 4 --eval-share 0.25 --seed 1"
    return main(["sft", *fixed.split(), *more])


def one_line(capsys):
    """The only line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rlhf-gym: "), lines
    return lines[0]


def test_a_run_and_what_the_other_commands_make_of_it(place, capsys):
    assert sft("--model", "base", "--learning-rate", "0.01") == 0
    printed = capsys.readouterr().out
    run = Path("runs/x")
    evaluation = json.loads((run / "evaluation.json").read_text())
    before, after = evaluation["before"], evaluation["after"]
    assert after["loss"] < before["loss"] and after == evaluation["epochs"][-1] and len(evaluation["epochs"]) == 2
    assert f"after: perplexity {after['perplexity']:.3f}" in printed and "runs/x" in printed
    columns = read_metrics(run / "metrics.csv")
    assert columns["train/epoch"] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert columns["eval/loss"][2::3] == [epoch["loss"] for epoch in evaluation["epochs"]]
    samples = [json.loads(line) for line in (run / "samples_after.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and {sample["reference"].strip() for sample in samples} == set(ANSWERS)
    assert len({sample["prompt"] for sample in samples}) == 1
    assert (run / "plots" / "curves.png").read_bytes()[:4] == b"\x89PNG" and list((run / "tensorboard").iterdir())
    card = (run / "README.md").read_text()
    assert f"{after['loss']:.4f}" in card and "9 examples" in card and "on 3 others" in card
    assert json.loads((run / "config.json").read_text())["verb"] == "sft"
    AutoModelForCausalLM.from_pretrained(run / "model")

    Path("prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    task = "--prompts prompts.jsonl --reward length --max-response-tokens 4"
    small = "--num-envs 4 --total-timesteps 10 --eval-episodes 4 --out runs/rl"
    assert main(["train", "--model", "runs/x", *task.split(), *small.split()]) == 0
    envs = gym.make_vec(
        "rlhf_gym/TextGeneration-v0", 2, model="runs/x/model", prompts=["a dog"], reward="length", max_response_tokens=4
    )
    envs.reset(seed=0)
    assert main(["evaluate", "--model", "runs/x", *task.split(), "--num-episodes", "4"]) == 0


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_a_text_alone_is_enough(place, capsys, kind):
    small = "--vocab-size 270 --hidden-size 16 --num-layers 1 --num-heads 2 --max-tokens 16"
    assert sft("--scratch", kind, *small.split(), data="text.txt") == 0
    evaluation = json.loads(Path("runs/x/evaluation.json").read_text())
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"]
    assert len(load_language_model("runs/x/model").tokenizer) == 270
    capsys.readouterr()
    assert main(["generate", "--model", "runs/x", "--prompt", "", "--max-response-tokens", "4"]) == 0
    assert sft("--scratch", kind, "--tokenizer", "base", "--hidden-size", "16", out="runs/y") == 0
    assert load_language_model("runs/y/model").vocab_size == len(tokenizer())


def test_an_adapter_is_saved_alone_and_merged(place, capsys):
    assert sft("--model", "base", "--lora", "2", "--merge") == 0
    run = Path("runs/x")
    assert (run / "model" / "adapter_model.safetensors").exists() and not (run / "model" / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    loaded = load_language_model(str(run / "model")).model
    assert all(merged.state_dict()[name].equal(weight) for name, weight in loaded.state_dict().items())
    assert not loaded.state_dict()["model.layers.0.mlp.up_proj.weight"].equal(
        load_language_model("base").model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    )
    assert main(["generate", "--model", "runs/x", "--prompt", "the cat", "--max-response-tokens", "4"]) == 0


def test_interrupted_work_is_saved_and_resuming_ends_where_the_unbroken_run_does(place, capsys, monkeypatch):
    write = MetricsWriter.__call__

    def interrupted(self, agent, metrics):
        write(self, agent, metrics)
        if agent.num_steps == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsWriter, "__call__", interrupted)
    assert sft("--model", "base") == 130
    line = one_line(capsys)
    assert "interrupted at" in line and "--resume" in line
    monkeypatch.setattr(MetricsWriter, "__call__", write)
    assert sft("--model", "base", "--resume") == 0
    assert "going on from" in capsys.readouterr().out
    assert sft("--model", "base", out="runs/unbroken") == 0
    for name in ("model.safetensors", "trainer_state.safetensors"):
        assert Path("runs/x/model", name).read_bytes() == Path("runs/unbroken/model", name).read_bytes()
    assert Path("runs/x/samples_after.jsonl").read_text() == Path("runs/unbroken/samples_after.jsonl").read_text()
    columns, unbroken = (read_metrics(f"runs/{name}/metrics.csv") for name in ("x", "unbroken"))
    assert columns["train/loss"] == unbroken["train/loss"] and len(columns["train/loss"]) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either --model.*or --scratch"),
        (["--model", "base", "--scratch", "lstm"], "either --model"),
        (["--model", "base", "--tokenizer", "base"], "--tokenizer goes with --scratch"),
        (["--model", "base", "--merge"], "--merge goes with --lora"),
        (["--model", "base", "--eval", "rows.jsonl"], "exclude each other"),
        (["--model", "base", "--config", "batch=3"], "no field 'batch'"),
        (["--model", "nowhere/at/all"], "there is no such directory"),
        (["--model", "base", "--max-tokens", "3"], "--truncate|truncate"),
        (["--scratch", "transformer", "--hidden-size", "10"], "hidden_size must be a multiple"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place, capsys, arguments, says):
    assert sft(*arguments) == 2
    line = one_line(capsys)
    assert re.search(says, line), line
    assert not Path("runs").exists()


def test_a_chat_without_a_template_and_a_missing_file(place, capsys):
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "the cat"}]}) + "\n")
    assert sft("--model", "base", data="chat.jsonl") == 2
    assert "chat template" in one_line(capsys)
    for name in ("nowhere.jsonl", "nowhere.txt"):
        assert sft("--model", "base", data=name) == 2
        assert "nowhere" in one_line(capsys)


def test_the_page_is_right(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "sft.md").read_text(encoding="utf-8")
    commands = re.findall(r"^rlhf-gym (sft .*)$", page, re.MULTILINE)
    assert len(commands) == 5 and all(parse(command.split())[0] == "sft" for command in commands)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    assert 1 < float(capsys.readouterr().out) < 2
    assert load_language_model("my-model").name == "my-model"
