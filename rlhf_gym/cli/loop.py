"""``rlhf-gym loop``: from judgements to a policy to new judgements, round by round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.atomic import write_json
from rlhf_gym.cli.loop_options import LoopOptions
from rlhf_gym.cli.options import as_dict
from rlhf_gym.cli.setup import model_source, quiet_transformers
from rlhf_gym.evaluation import evaluation_process
from rlhf_gym.plots import over_optimisation
from rlhf_gym.runs import machine

PACKAGED = "tiny-reviews"
FREE = {"out", "rounds", "progress_bar"}  # may differ when a loop goes on


def run(options: LoopOptions) -> int:
    """Make the rounds that are missing, draw and print them; returns the exit code."""
    from rlhf_gym.agents.loop import CURVE, Loop, LoopConfig, people, simulated
    from rlhf_gym.feedback import SimulatedAnnotator

    quiet_transformers()
    packaged = options.prompts == PACKAGED
    gold = options.gold or (PACKAGED if packaged else None)
    if options.annotators == "simulated" and gold is None:
        raise ValueError("--annotators simulated needs --gold, the reward that they judge by; or ask people")
    config = LoopConfig(
        env_id="rlhf_gym/TextGeneration-v0",
        env={
            "model": model_source(options.model),
            "prompts": options.prompts,
            "max_prompt_tokens": options.max_prompt_tokens,
            "max_response_tokens": options.max_response_tokens,
        },
        gold=gold,
        eval_prompts=options.eval_prompts or (f"{PACKAGED}/test" if packaged else None),
        num_rounds=options.rounds,
        num_pairs=options.pairs,
        num_members=options.members,
        rule=options.rule,
        std_coef=options.std_coef,
        tokens_per_round=options.total_timesteps,
        num_envs=options.num_envs,
        kl_coef=options.kl_coef,
        agent={"learning_rate": options.learning_rate},
    )
    # What is wrong with the task is told before anything is written.
    metrics = {"metrics": {"gold": gold}} if gold else {}
    evaluation_process(gym.make_vec(config.env_id, 1, reward="length", **config.env, **metrics), config.eval_prompts)
    out = Path(options.out).expanduser()
    claim(out, as_dict(options))
    say = lambda line: print(line, flush=True)  # noqa: E731
    # A coin is wrong half of the time.
    noise = 2 * options.label_noise
    crew = [SimulatedAnnotator(f"simulated-{i}", 1 / options.skill, random_rate=noise) for i in (1, 2, 3)]
    judge = people(say) if options.annotators == "people" else simulated(crew, options.seed)
    drawn = options.progress_bar and sys.stderr.isatty()
    try:
        found = Loop(out, config, judge, seed=options.seed, say=say, progress_bar=drawn).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what is done is in {out}, and the same command goes on") from None
    curves = {
        f"round {n}": [json.loads(line) for line in (out / f"round_{n}" / CURVE).read_text().splitlines()]
        for n in range(1, options.rounds + 1)
    }
    over_optimisation(curves, found).savefig(out / "rounds.png", dpi=150)
    print_rounds(found)
    print(f"everything is in {out}; the picture: {out / 'rounds.png'}")
    return 0


def claim(out: Path, options: dict[str, Any]) -> None:
    """Make the directory this loop's, or find that it is.

    Raises:
        ValueError: If it holds something else, or a loop with other options.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a loop needs a directory, choose another --out")
    path = out / "config.json"
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier.get("verb") != "loop":
            raise ValueError(f"{out} holds something else than a loop; choose another --out")
        now = json.loads(json.dumps(options))
        for name in sorted(now.keys() - FREE):
            if now[name] != earlier["options"].get(name):
                raise ValueError(
                    f"{out} holds a loop with {name} {earlier['options'].get(name)!r}, and now it is {now[name]!r}; give the "
                    "same options, or choose another --out"
                )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no loop; choose another --out or empty it yourself")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"verb": "loop", "options": options, **machine()})


def print_rounds(found: list[dict[str, Any]]) -> None:
    """A table of the base model and each round's policy."""
    from rich.console import Console
    from rich.table import Table

    names = [name for name in ("gold", "proxy", "kl", "length") if any(name in each for each in found)]
    table = Table("", *names, title="held-out prompts, mean ± half of the 95 % interval")
    for number, each in enumerate(found):
        cells = []
        for name in names:
            estimate = each.get(name)
            # Of a single response there is no interval.
            known = estimate is not None and estimate["high"] is not None
            half = f" ± {(estimate['high'] - estimate['low']) / 2:.3f}" if known else ""
            # No "-0.000" of a policy that is the reference.
            cells.append("" if estimate is None else f"{round(estimate['mean'], 3) + 0.0:.3f}{half}")
        table.add_row("base model" if number == 0 else f"round {number}", *cells)
    Console(highlight=False).print(table)
