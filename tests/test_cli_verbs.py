"""The command line from outside: what it does, what it refuses in one line, and that interrupted work goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from worlds import PROMPTS, model, tokenizer

from rlhf_gym.cli import main
from rlhf_gym.runs import read_metrics

REWARDS = """
import os, signal

def goodness(completions):
    return [float(text.split().count("good")) for text in completions]

calls = 0

def interrupted(completions):
    global calls
    calls += 1
    if calls == 3:  # the first call is the evaluation before training
        os.kill(os.getpid(), signal.SIGINT)
    return goodness(completions)

def breaks(completions):
    global calls
    calls += 1
    return goodness(completions) if calls < 4 else [float("nan")] * len(completions)
"""


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    """A working directory with a model, prompts and a module of rewards of this test's own name."""
    monkeypatch.chdir(tmp_path)
    model().save_pretrained("base")
    tokenizer().save_pretrained("base")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    name = f"my_rewards_{abs(hash(request.node.name))}"
    Path(f"{name}.py").write_text(REWARDS)
    return name


def train(reward, *more, out="runs/x", tokens=150):
    """Exit code of a small training run: 8 rows of up to 6 tokens, so 3 to 10 updates."""
    fixed = "--model base --prompts prompts.jsonl --max-response-tokens 6 --num-envs 8 --eval-episodes 8 --learning-rate 1e-3"
    return main(["train", "--reward", reward, *fixed.split(), "--total-timesteps", str(tokens), "--out", out, *more])


def one_line(capsys):
    """The only line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rlhf-gym: "), lines
    return lines[0]


def test_train_evaluate_generate(place, capsys):
    assert train(f"{place}:goodness", "--kl-coef", "0.01", "--config", "num_epochs=2") == 0
    run = Path("runs/x")
    printed = capsys.readouterr().out
    assert "before" in printed and "after (ppo)" in printed and str(run) in printed
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["kl_coef"] == 0.01 and config["options"]["config"] == ["num_epochs=2"]
    columns = read_metrics(run / "metrics.csv")
    assert (
        columns["timesteps"][-1] >= 150
        and {"objective/kl", "objective/scores", "rollout/ep_rew_mean"} <= columns.keys()
    )
    samples = [json.loads(line) for line in (run / "samples_after.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and all(s["score"] == s["response"].split().count("good") for s in samples)
    assert (run / "plots" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").iterdir()) and "0.01" in (run / "README.md").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert abs(evaluation["before"]["kl"]["mean"]) < 1e-5 and evaluation["after"]["kl"]["mean"] > 0
    AutoModelForCausalLM.from_pretrained(run / "model")

    same = "--prompts prompts.jsonl --max-response-tokens 6 --num-episodes 8 --out samples.jsonl"
    assert main(["evaluate", "--model", "runs/x", "--reward", f"{place}:goodness", *same.split()]) == 0
    again = [json.loads(line) for line in Path("samples.jsonl").read_text().splitlines()]
    assert [s["response"] for s in again] == [s["response"] for s in samples]  # the same seed, model and prompts
    assert [s["kl"] for s in again] == pytest.approx([s["kl"] for s in samples], abs=1e-4)  # it knows its own reference

    capsys.readouterr()
    assert (
        main(
            [
                "generate",
                "--model",
                "runs/x",
                "--prompt",
                "the cat",
                "a dog",
                "--num-samples",
                "2",
                "--max-response-tokens",
                "5",
            ]
        )
        == 0
    )
    texts = capsys.readouterr().out.strip().split("\n\n")
    assert [text.split()[:2] for text in texts] == [["the", "cat"]] * 2 + [["a", "dog"]] * 2


def test_a_run_that_has_not_begun_leaves_its_name_free(place, capsys):
    Path("mine.py").write_text("def reward(text):\n    return text.no_such\n")
    for _ in range(2):
        assert train("mine.py:reward") == 2 and "no_such" in one_line(capsys)
        assert not Path("runs/x").exists()
    assert train(f"{place}:goodness", tokens=1) == 0
    before = Path("runs/x/metrics.csv").read_bytes()
    capsys.readouterr()
    assert train("mine.py:reward") == 2 and "holds a run already" in one_line(capsys)
    assert Path("runs/x/metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("agent", "config"), [("best-of-n", "num_candidates=4"), ("nlpo", "mask_top_k=1"), ("maskable-ppo", "top_k=1")]
)
def test_an_agent_that_is_not_its_language_model_alone_is_measured_as_it_acts(place, capsys, agent, config):
    assert train(f"{place}:goodness", "--agent", agent, "--config", config) == 0
    trained = [json.loads(line) for line in Path("runs/x/samples_after.jsonl").read_text().splitlines()]
    assert "The model alone is" in Path("runs/x/README.md").read_text()
    command = ["evaluate", "--reward", f"{place}:goodness", *"--prompts prompts.jsonl --max-response-tokens 6".split()]
    more = "--num-episodes 8 --out samples.jsonl --overwrite".split()
    capsys.readouterr()
    assert main([*command, *more, "--model", "runs/x"]) == 0
    assert ("each the best of 4 by --reward" in capsys.readouterr().out) == (agent == "best-of-n")
    again = [json.loads(line) for line in Path("samples.jsonl").read_text().splitlines()]
    assert [s["response"] for s in again] == [s["response"] for s in trained]
    assert [s["kl"] for s in again] == pytest.approx([s["kl"] for s in trained], abs=1e-4)
    assert sum(s["kl"] for s in again) / 8 > 0.5
    # Without its reference the model has to stand in for it, and is another policy than the agent.
    assert main([*command, "--model", "runs/x/model"]) == 2 and "the directory of its run" in one_line(capsys)

    generate = "generate --prompt the --num-samples 8 --max-response-tokens 6".split()
    assert main([*generate, "--model", "base"]) == 0
    assert len(set(capsys.readouterr().out.strip().split("\n\n"))) > 1
    if agent == "best-of-n":
        assert main([*generate, "--model", "runs/x"]) == 2
        assert "chooses by a reward; rlhf-gym evaluate" in one_line(capsys)
    else:  # one token is allowed in each state, so there is one response
        assert main([*generate, "--model", "runs/x"]) == 0
        assert len(set(capsys.readouterr().out.strip().split("\n\n"))) == 1
        assert main([*generate, "--model", "runs/x", "--top-k", "3"]) == 2 and "a mask of its own" in one_line(capsys)


def test_several_rewards_with_weights(place, capsys):
    assert train(f"{place}:goodness", "--reward", f"{place}:goodness=2", "length=-0.5", tokens=20) == 0
    (sample, *_) = [json.loads(line) for line in Path("runs/x/samples_before.jsonl").read_text().splitlines()]
    assert sample["score"] == pytest.approx(sample["score/goodness"] + sample["score/length"])
    assert sample["score/goodness"] == 2 * sample["response"].split().count("good") and sample["score/length"] < 0


@pytest.mark.parametrize("agent", ["ppo", "trpo"])
def test_interrupted_work_is_saved_and_resuming_ends_where_the_unbroken_run_does(place, capsys, agent):
    common = ("--agent", agent, "--config", *(["n_steps=12"] if agent == "trpo" else ["num_epochs=2"]))
    assert train(f"{place}:interrupted", *common) == 130
    line = one_line(capsys)
    assert "interrupted at" in line and "--resume" in line
    reached = read_metrics("runs/x/metrics.csv")["timesteps"][-1]
    assert 0 < reached < 150 and not Path("runs/x/samples_after.jsonl").exists()
    assert train(f"{place}:interrupted", *common, "--resume") == 0  # the third call has been
    assert f"going on from {int(reached)} tokens" in capsys.readouterr().out
    columns = read_metrics("runs/x/metrics.csv")
    assert columns["timesteps"] == sorted(set(columns["timesteps"])) and columns["timesteps"][-1] >= 150
    if agent == "ppo":  # SB3's agents begin new episodes where they are saved
        assert train(f"{place}:goodness", *common, out="runs/unbroken") == 0
        unbroken = read_metrics("runs/unbroken/metrics.csv")
        assert (
            columns["objective/scores"] == unbroken["objective/scores"]
            and columns["objective/kl"] == unbroken["objective/kl"]
        )


def test_a_reward_that_breaks_costs_nothing(place, capsys):
    assert train(f"{place}:breaks") == 2
    line = one_line(capsys)
    assert "breaks" in line and "NaN" in line.replace("nan", "NaN") and "is saved in" in line
    AutoModelForCausalLM.from_pretrained("runs/x/model")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        ([], "a command is missing"),
        (["--model", "x", "train"], "the command comes first"),
        (["train", "--promts", "x"], "no flag '--promts'; did you mean '--prompts'?"),
        (["train", "--zzz"], "no flag '--zzz'; see rlhf-gym train --help"),
        (["train", "--out", "x"], "needs --reward; see"),
        (["train", "--out", "x", "--reward", "f", "--kl-coef", "much"], "--kl-coef"),
        (
            ["train", "--out", "x", "--reward", "f", "--total-timesteps", "0"],
            "--total-timesteps must be at least 1, got 0",
        ),
        (["doctor", "extra"], "extra"),
        (["train", "--out", "x", "--reward"], "--reward needs at least one"),
        (["generate", "--model", "tiny-revews"], "did you mean 'tiny-reviews'?"),
        (["generate", "--model", "./nowhere"], "no such directory"),
        (["generate", "--top-k", "0"], "top_k must be"),
    ],
)
def test_wrong_arguments(capsys, arguments, says):
    assert main(arguments) == 2
    assert says in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--agent", "pppo"], "did you mean 'ppo'?"),
        (
            ["--agent", "dr-grpo"],
            "dr-grpo is --agent grpo --config divide_by_std=false loss_mode=constant kl_placement=reward",
        ),
        (["--seed", "-3"], "--seed must be at least 0, got -3"),
        (["--prompts", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["--prompts", "broken.jsonl"], "line 2"),
        (["--model", "no/such/model"], "no such directory"),
        (["--config", "clip_rnge=0.1"], "did you mean 'clip_range'?"),
        (["--config", "clip_range"], "name=value"),
        (["--kl-coef", "-1"], "kl_coef"),
        (["--reward", "no_such_module_x:f"], "no_such_module_x"),
        (["--reward", "length=heavy"], "must be a number"),
        (["--max-prompt-tokens", "2"], "max_prompt_tokens=2"),
        (["--max-response-tokens", "99"], "context of 32"),
        (["--eval-prompts", "long.jsonl"], "held-out prompts[0] has 5 tokens, more than max_prompt_tokens=4"),
        (["--out", "."], "not empty"),
    ],
)
def test_wrong_training(place, capsys, arguments, says):
    Path("broken.jsonl").write_text('{"prompt": "the"}\n{"prompt": oops}\n')
    Path("long.jsonl").write_text('{"prompt": "the cat and the dog"}\n')
    assert train("length", *arguments) == 2
    assert says in one_line(capsys)
    assert not Path("runs").exists()  # nothing is left behind by a run that never began


def test_help_is_light():
    code = "import sys; from rlhf_gym.cli import main; sys.argv = ['rlhf-gym', '--help']\ntry: main()\nexcept SystemExit as e: code = e.code\n"
    code += "print(code, *sorted({'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "0" and all(
        verb in done.stdout for verb in ("demo", "train", "evaluate", "generate", "doctor")
    )


@pytest.mark.parametrize("arguments", [("train", "--help"), ("--version",)])
def test_a_reader_that_goes_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has seen enough
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_gym", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_before_training(place, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("rlhf_gym.cli.train.evaluate", interrupt)
    # A process that was started in the background ignores Ctrl-C from birth, and Python leaves it at that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert train("length") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert one_line(capsys) == "rlhf-gym: interrupted"


def test_doctor_finds_a_damaged_model(tmp_path, monkeypatch, capsys):
    import rlhf_gym.lm

    assert main(["doctor"]) == 0, capsys.readouterr().out
    assert "nothing is wrong" in capsys.readouterr().out
    for folder, said in ((tmp_path, "missing"), (_damaged_copy(tmp_path / "copy"), "is not the file that was shipped")):
        monkeypatch.setattr(rlhf_gym.lm, "PACKAGED_MODELS", {"tiny-reviews": folder})
        assert main(["doctor"]) == 1
        assert said in " ".join(capsys.readouterr().out.split())


def _damaged_copy(target):
    import shutil

    from rlhf_gym.lm import PACKAGED_MODELS

    shutil.copytree(PACKAGED_MODELS["tiny-reviews"], target)
    with (target / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    return target


def test_a_device_that_is_not_there(place, capsys):
    for device in ("foo", "cuda:99"):
        assert main(["generate", "--model", "base", "--device", device]) == 2
        assert f"device must be 'auto' or one that torch can use here, got '{device}'" in one_line(capsys)


def test_generated_text_drives_no_terminal(place, capsys, monkeypatch):
    words = tokenizer()
    monkeypatch.setattr(
        type(words), "decode", lambda self, ids, **how: "a\x1b[2J\nb\u202e"[: None if len(ids) > 1 else 0]
    )
    assert main(["generate", "--model", "base", "--prompt", "the", "--max-response-tokens", "2"]) == 0
    assert capsys.readouterr().out == "thea\\x1b[2J\nb\\u202e\n"


def test_a_terminal_that_knows_no_unicode_costs_no_samples(place):
    command = "evaluate --model base --reward length --prompts prompts.jsonl --num-episodes 4 --max-response-tokens 6 --out samples.jsonl"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_gym", *command.split()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(Path("samples.jsonl").read_text().splitlines()) == 4 and "samples: samples.jsonl" in done.stdout
    assert "no KL: --reference takes" in done.stdout


def test_evaluate_replaces_no_file_unless_told_to(place, capsys):
    Path("mine.jsonl").write_text("mine\n")
    task = (
        "evaluate --model base --reward length --prompts prompts.jsonl --num-episodes 4 --max-response-tokens 6".split()
    )
    for flag in ("--out", "--review-queue"):
        assert main([*task, flag, "mine.jsonl"]) == 2
        assert f"{flag} mine.jsonl exists; choose another name" in capsys.readouterr().err
        assert main([*task, flag, "nowhere/mine.jsonl"]) == 2 and "there is no directory" in capsys.readouterr().err
    assert Path("mine.jsonl").read_text() == "mine\n"
    assert main([*task, "--out", "mine.jsonl", "--overwrite"]) == 0
    assert len(Path("mine.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_of_transformers_trainer_is_a_model_like_any(place, capsys):
    """Its trainer_state.json has nothing of ours."""
    Path("base/trainer_state.json").write_text('{"global_step": 10, "log_history": []}')
    assert main("generate --model base --prompt the --max-response-tokens 6".split()) == 0
    assert capsys.readouterr().out.startswith("the ")
