"""``rlhf-gym demo``: the whole story on the packaged reviews, in minutes on two cores, with a report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.cli.options import Demo, as_dict
from rlhf_gym.cli.setup import agent_class, quiet_transformers
from rlhf_gym.cli.tables import print_comparison
from rlhf_gym.cli.train import report_stop, train_agent
from rlhf_gym.envs.render import visible
from rlhf_gym.evaluation import Evaluation, evaluate
from rlhf_gym.plots import curves, histogram, plot_run
from rlhf_gym.report import Section, html_report, note, table
from rlhf_gym.runs import RunDirectory, machine, read_metrics
from rlhf_gym.tasks.tiny_reviews import grammaticality

KL_COEF = 0.03
HELD_OUT = {"prompts": "tiny-reviews/test", "num_episodes": 256, "others": {"grammatical": grammaticality}}
NUM_SAMPLES = 8


@dataclass(frozen=True)
class Contestant:
    """An agent of the demo: its name on the command line, its label, how it trains and what is not its default."""

    name: str
    label: str
    num_envs: int
    total_timesteps: int
    config: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = (
    # PPO wants large batches here: with 64 rows its steps are noisy enough to teach it ungrammatical reviews.
    Contestant("ppo", "PPO", 256, 100_000, {"learning_rate": 2e-4}),
    # TRPO pays more for each token, so it sees fewer; short rollouts give it more updates for them.
    Contestant("trpo", "TRPO", 64, 40_000, {"n_steps": 24}),
)


def run(options: Demo) -> int:
    """Tell the story; returns the exit code."""
    from rich.console import Console

    quiet_transformers()
    console, started = Console(highlight=False), time.monotonic()
    out = RunDirectory(options.out, as_dict(options), verb="demo", overwrite=_is_run(options.out))
    envs = make_demo_envs(1)
    total = 2 + len(CONTESTANTS)
    console.rule(f"1/{total} The base model writes product reviews", align="left")
    evaluations = {"base": evaluate(None, envs, seed=options.seed, **HELD_OUT)}
    _show_samples(console, evaluations["base"])
    console.print(
        f"Over {HELD_OUT['num_episodes']} reviews of held-out prompts the writer is positive with probability "
        f"{evaluations['base'].score}.\n"
    )
    runs = {}
    for i, contestant in enumerate(CONTESTANTS):
        console.rule(
            f"{i + 2}/{total} {contestant.label} makes the reviews positive and stays near the base model", align="left"
        )
        path = out.path / contestant.name
        folder = RunDirectory(path, as_dict(options), verb="demo", overwrite=_is_run(path))
        agent = agent_class(contestant.name)(
            make_demo_envs(contestant.num_envs), seed=options.seed, **contestant.config
        )
        stop = train_agent(
            agent, folder, contestant.total_timesteps, checkpoint_every=10, progress_bar=options.progress_bar
        )
        if stop.signal is not None:
            return report_stop(stop, agent, folder)
        runs[contestant.label] = read_metrics(folder.path / "metrics.csv")
        found = evaluations[contestant.label] = evaluate(agent, envs, seed=options.seed, **HELD_OUT)
        folder.write_samples("after", found.samples)
        _show_samples(console, found)
    out.write_samples("before", evaluations["base"].samples)

    plot_run(runs, out.plots / "curves.png")
    page = out.path / "report.html"
    seconds = time.monotonic() - started
    page.write_text(_page(evaluations, runs, seconds), encoding="utf-8")
    console.rule(f"{total}/{total} All of them on held-out prompts", align="left")
    print_comparison(evaluations)
    console.print(f"{seconds:.0f} seconds. The report: {page}", soft_wrap=True)
    return 0


def make_demo_envs(num_envs: int) -> gym.vector.VectorEnv:
    """The task: continue the opening of a review; the score is the exact probability that its writer is pleased."""
    return gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=num_envs, kl_coef=KL_COEF)


def _is_run(path: str | Path) -> bool:
    return (Path(path).expanduser() / "config.json").is_file()


def _show_samples(console: Any, evaluation: Evaluation, count: int = 3) -> None:
    from rich.text import Text

    for sample in evaluation.samples[:count]:
        console.print(
            Text.assemble(
                (f"  {sample['score']:.2f}  ", "bold"),
                (visible(sample["prompt"]), "dim"),
                " ",
                visible(sample["response"]),
            )
        )


def _page(evaluations: dict[str, Evaluation], runs: dict[str, Any], seconds: float) -> str:
    header, rows = table(evaluations)
    trained = [label for label in evaluations if label != "base"]
    base = evaluations["base"]
    found = "; ".join(
        f"{label} {evaluations[label].score} at {evaluations[label].estimate(evaluations[label].kl).mean:.1f} nats from it"
        for label in trained
    )
    samples = [
        [
            base.samples[i]["prompt"],
            *(f"{e.samples[i]['response']}\n({e.samples[i]['score']:.2f})" for e in evaluations.values()),
        ]
        for i in range(NUM_SAMPLES)
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine()["packages"].items() if version)
    return html_report(
        "A language model learns to write pleased reviews",
        f"Probability that the writer is pleased, on prompts not seen in training: base model {base.score}; {found}.",
        [
            Section(
                "The task",
                "A small language model continues the openings of product reviews. A grammar wrote the texts that it was trained on, so for every "
                "review the probability that its writer is pleased is known exactly: that is the score, between 0 and 1 (0 also for what is no "
                f"complete review). The reward is the score minus {KL_COEF:g} for every nat by which the response departs from the base model, so a "
                "policy that keeps its language is worth more than one that repeats a happy word.",
            ),
            Section(
                "While they learn",
                "",
                curves(runs),
                "Left: mean score of the responses in training. Right: how far the policy is from the base model."
                " Where there are many batches they stand faint behind their running mean.",
            ),
            Section(
                "On held-out prompts",
                f"{len(base.scores)} responses of each model to {base.summary()['num_prompts']} prompts, sampled; {note(evaluations)}. "
                "`grammatical` is the share of complete reviews that the grammar can produce.",
                histogram({label: e.scores for label, e in evaluations.items()}, "score"),
                "How the scores are spread: responses by score, for each model.",
                header,
                rows,
            ),
            Section(
                "Before and after",
                "The same prompts and the same random numbers; scores in brackets.",
                header=["prompt", *evaluations],
                rows=samples,
            ),
        ],
        f"Made by `rlhf-gym demo` in {seconds:.0f} seconds with {versions}.",
    )
