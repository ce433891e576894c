"""Rounds of judging and training: what is kept, that an interrupted loop ends like another, and people in the place of numbers."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from rlhf_gym.agents.loop import CURVE, EVALUATION, STORE, Loop, LoopConfig, people, simulated
from rlhf_gym.cli import main
from rlhf_gym.cli.loop import print_rounds
from rlhf_gym.feedback import Comparison, FeedbackStore, Item, Judgement, SimulatedAnnotator, Skip
from rlhf_gym.plots import over_optimisation

SMALL = LoopConfig(
    num_rounds=2, num_pairs=16, num_members=2, tokens_per_round=200, num_envs=8, num_eval_episodes=8, kl_coef=0.05
)
ANN = SimulatedAnnotator("ann", 0.1)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, Loop(folder, SMALL, simulated([ANN]), seed=1, say=silent).run()


def test_everything_is_kept(whole):
    folder, found = whole
    assert len(found) == 3 and "proxy" not in found[0] and abs(found[0]["kl"]["mean"]) < 1e-5
    for number in (1, 2):
        place = folder / f"round_{number}"
        judged = [json.loads(line) for line in (place / "judged.jsonl").read_text().splitlines()]
        assert 0 < len(judged) <= 16 and all(len(set(row["responses"])) == 2 for row in judged)
        assert {row["checkpoint"] for row in judged} == {"base" if number == 1 else "round_1"}
        assert {row["sampling"]["seed"] for row in judged} == {1000 + number}
        assert (place / "policy" / "model.safetensors").is_file() and (
            place / "reward_model" / "ensemble.json"
        ).is_file()
        points = [json.loads(line) for line in (place / CURVE).read_text().splitlines()]
        assert points[-1]["tokens"] >= 200 and set(points[0]) == {"tokens", "proxy", "kl", "gold"}
    with FeedbackStore(folder / STORE) as store:
        number_judged = sum(len((folder / f"round_{n}" / "judged.jsonl").read_text().splitlines()) for n in (1, 2))
        assert len(store.standing()) == number_judged


def test_an_interrupted_loop_ends_as_if_it_had_not_been(whole, tmp_path):
    calls = []

    def stops(store, items, gold, number):
        calls.append(number)
        if number == 2 and calls.count(2) == 1:
            simulated([ANN])(store, items[:3], gold[:3], number)  # some of the judgements are there already
            raise KeyboardInterrupt
        simulated([ANN])(store, items, gold, number)

    with pytest.raises(KeyboardInterrupt):
        Loop(tmp_path, SMALL, stops, seed=1, say=silent).run()
    assert not (tmp_path / "round_2" / EVALUATION).exists()
    Loop(tmp_path, SMALL, stops, seed=1, say=silent).run()
    assert calls == [1, 2, 2]  # the finished round is not made again
    for name in (EVALUATION, f"round_1/{EVALUATION}", f"round_2/{EVALUATION}", f"round_2/{CURVE}"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name


def test_people_are_waited_for(tmp_path):
    items = [Item("a", ("b", "c")), Item("d", ("e", "f"))]
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        store.add_items(items)

        def person() -> None:
            with FeedbackStore(tmp_path / "f.sqlite") as own:
                for i, item in enumerate(items):
                    time.sleep(0.05)
                    own.record(Judgement(f"k{i}", "ann", item.id, Comparison("tie"), shown=(0, 1)))

        thread = threading.Thread(target=person)
        thread.start()
        said = []
        people(said.append, poll_s=0.01)(store, items, None, 1)
        thread.join()
        assert (
            len(store.standing()) == 2
            and "rlhf-gym label --db" in said[0]
            and said[-1].endswith("2 of 2 pairs are compared")
        )
        with pytest.raises(TimeoutError, match="0 of 1 pairs were compared within 0 s; the judgements are kept"):
            people(silent, timeout_s=0, poll_s=0.01)(store, [Item("x", ("y", "z"))], None, 1)


def test_a_later_policy_may_say_what_an_earlier_one_has_said(tmp_path):
    """The same pair in two rounds, from two checkpoints: two items, each with its judgement."""
    row = {"prompt": "p", "responses": ["a", "b"], "gold": [1.0, 0.0], "sampling": {"seed": 0}}
    loop = Loop(tmp_path, SMALL, simulated([ANN]), say=silent)
    with FeedbackStore(tmp_path / STORE) as store:
        for number, checkpoint in ((1, "base"), (2, "round_1")):
            folder = tmp_path / f"round_{number}"
            folder.mkdir()
            (folder / "judged.jsonl").write_text(json.dumps(row | {"checkpoint": checkpoint}) + "\n")
            items, gold = loop._pairs(number, folder)
            store.add_items(items)
            simulated([ANN])(store, items, gold, number)
        assert [item.checkpoint for item in store.items()] == ["base", "round_1"] and len(store.standing()) == 2


def test_who_judges_alone_may_skip(tmp_path):
    items = [Item("a", ("b", "c")), Item("d", ("e", "f"))]
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        store.add_items(items)
        store.record(Judgement("k0", "ann", items[0].id, Comparison(1), shown=(0, 1)))
        store.record(Judgement("k1", "ann", items[1].id, Skip(), shown=(0, 1)))
        said = []
        people(said.append, timeout_s=5, poll_s=0.01)(store, items, None, 1)
        assert said[-1] == "round 1: 1 of 2 pairs are compared, 1 skipped"


def test_a_single_held_out_prompt_has_no_interval(capsys):
    found = [{"gold": {"mean": 0.25, "low": None, "high": None}}, {"gold": {"mean": 0.5, "low": 0.25, "high": 0.75}}]
    print_rounds(found)
    printed = capsys.readouterr().out
    assert "0.250 " in printed and "0.500 ± 0.250" in printed
    points = [{"kl": 0.0, "proxy": 0.0, "gold": 0.25}, {"kl": 1.0, "proxy": 1.0, "gold": 0.5}]
    assert len(over_optimisation({"round 1": points}, found).axes) == 3


def test_simulated_annotators_need_gold():
    with pytest.raises(ValueError, match="need a gold reward"):
        simulated([ANN])(None, [], None, 1)


def test_simulated_annotators_take_turns_and_repeat_themselves(tmp_path):
    items = [Item(f"p{i}", ("good", "bad")) for i in range(4)]
    gold = np.array([[1.0, 0.0]] * 4)
    crew = [SimulatedAnnotator("ann", 1e-3), SimulatedAnnotator("bob", 1e-3)]
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        store.add_items(items)
        for _ in range(2):
            simulated(crew, seed=5)(store, items, gold, 1)
        events = store.standing()
        assert [event.judgement.annotator for event in events] == ["ann", "bob", "ann", "bob"]
        assert all(event.judgement.verdict.choice == 0 for event in events)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_pairs must be >= 1, got 0"):
        LoopConfig(num_pairs=0)
    with pytest.raises(ValueError, match="rule must be .*'mean', 'min'"):
        LoopConfig(rule="least")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--label-noise", "0.7"], "--label-noise must be from 0 to .5, got 0.7"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--prompts", "mine.jsonl"], "--annotators simulated needs --gold"),
        (["--prompts", "mine.jsonl", "--annotators", "people"], "there is no file 'mine.jsonl'"),
        (["--eval-prompts", "mine.jsonl"], "there is no file 'mine.jsonl'"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, says):
    assert main(["loop", "--out", str(tmp_path / "loop"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "loop").exists()


def test_the_command_goes_on_and_refuses_others_options(tmp_path, capsys):
    command = ["loop", "--out", str(tmp_path / "loop"), "--pairs", "8", "--members", "1", "--total-timesteps", "150"]
    command += ["--num-envs", "8", "--no-progress-bar"]
    assert main([*command, "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "base model" in printed and "round 1" in printed and (tmp_path / "loop" / "rounds.png").stat().st_size > 10_000
    )
    assert main([*command, "--rounds", "1", "--kl-coef", "0.5"]) == 2
    assert "holds a loop with kl_coef 0.4, and now it is 0.5" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert main(["loop", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; a loop needs a directory" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    assert main(["loop", "--out", str(tmp_path / "other")]) == 2
    assert "is not empty and holds no loop" in capsys.readouterr().err
