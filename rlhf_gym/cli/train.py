"""``rlhf-gym train``: a model, prompts and a reward in; a run directory out."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_gym.atomic import write_json
from rlhf_gym.cli.options import Train, as_dict
from rlhf_gym.cli.setup import agent_class, make_envs, mixed_prompts, model_source, parse_config, quiet_transformers
from rlhf_gym.cli.signals import StopRequest, stop_on_signal
from rlhf_gym.cli.tables import print_comparison
from rlhf_gym.evaluation import evaluate, evaluation_process
from rlhf_gym.memory import give_back_freed_memory
from rlhf_gym.plots import plot_run
from rlhf_gym.report import model_card
from rlhf_gym.runs import MetricsWriter, RunDirectory, checkpoint, read_metrics, save_agent


def run(options: Train) -> int:
    """Train and evaluate; returns the exit code."""
    from rlhf_gym.agents import parallel

    quiet_transformers()
    parallel.start()
    # All that can be wrong with the arguments is found before the run directory is made and before any training.
    make_agent = agent_class(options.agent)
    config = parse_config(options.config)
    if options.learning_rate is not None:
        config["learning_rate"] = options.learning_rate
    if options.lora is not None:
        config["lora_rank"] = options.lora
    if options.fsdp:
        config["fsdp"] = True
    if config.get("fsdp"):
        give_back_freed_memory()  # what has been gathered and freed would be held all the same
    mixed = mixed_prompts(options, options.mix)
    envs = make_envs(options, num_envs=options.num_envs, prompts=mixed, kl_coef=options.kl_coef)
    eval_prompts = options.eval_prompts if mixed is None else options.eval_prompts or options.prompts
    evaluation_process(envs, eval_prompts)
    agent = make_agent(envs, seed=options.seed, **config)
    if parallel.size() > 1 and not hasattr(agent, "collector"):
        raise ValueError(f"--agent {options.agent} runs in one process; leave torchrun out, or take ppo")
    # How a run is divided is no part of its checkpoint.
    load = partial(make_agent.load, env=envs, **({"fsdp": True} if config.get("fsdp") else {}))
    if parallel.rank() > 0:
        return help_training(agent, load, options)
    run_directory = RunDirectory(options.out, as_dict(options), overwrite=options.overwrite, resume=options.resume)
    if options.resume and not run_directory.has_checkpoint:
        print(f"there is no checkpoint in {run_directory.path} to go on from; starting from the beginning", flush=True)
    if parallel.any_of(run_directory.has_checkpoint):
        agent = load(run_directory.model)
        print(f"going on from {agent.num_timesteps} tokens", flush=True)

    # The same episodes and random numbers before and after, so that their difference is less noisy.
    held_out = {"prompts": eval_prompts, "num_episodes": options.eval_episodes, "seed": options.seed}
    with run_directory.nothing_done_yet():
        before = evaluate(None, envs, **held_out)
    run_directory.write_samples("before", before.samples)
    stop = train_agent(agent, run_directory, options.total_timesteps, options.checkpoint_every, options.progress_bar)
    if stop.signal is not None:
        return report_stop(stop, agent, run_directory, "; the same command with --resume goes on")

    after = evaluate(agent, envs, **held_out)
    run_directory.write_samples("after", after.samples)
    write_json(run_directory.path / "evaluation.json", {"before": before.summary(), "after": after.summary()})
    plot_run({options.agent: read_metrics(run_directory.path / "metrics.csv")}, run_directory.plots / "curves.png")
    card = model_card(options=as_dict(options), base_model=model_source(options.model), before=before, after=after)
    (run_directory.path / "README.md").write_text(card, encoding="utf-8")
    print_comparison({"before": before, f"after ({options.agent})": after})
    print(f"run directory: {run_directory.path}")
    return 0


def help_training(agent: Any, load: Callable[[Path], Any], options: Train) -> int:
    """What every process but the first does: it trains with the others and leaves the rest to the first."""
    from rlhf_gym.agents import parallel

    model = Path(options.out).expanduser() / "model"
    if parallel.any_of(False):  # the first has found a checkpoint
        agent = load(model)
    with stop_on_signal() as stop:
        # The first saves alone what it holds alone.
        agent.learn(
            options.total_timesteps,
            callback=[checkpoint(model, options.checkpoint_every), stop] if agent.is_divided else stop,
        )
        if agent.is_divided:
            save_agent(agent, model)
    return 0 if stop.signal is None else 128 + stop.signal


def train_agent(
    agent: Any,
    run_directory: RunDirectory,
    duration: int,
    checkpoint_every: int,
    progress_bar: bool,
    print_metrics: Callable[[Any, Mapping[str, float]], None] | None = None,
) -> StopRequest:
    """Train, write metrics and checkpoints, and leave the agent in ``model/`` whatever ends the training.

    Args:
        agent: An agent, or whatever learns, saves and counts its tokens as one.
        run_directory: Where to write.
        duration: What ``agent.learn`` takes: tokens or epochs.
        checkpoint_every: Updates between two checkpoints.
        progress_bar: Show a bar, or where none can be drawn a line for each update.
        print_metrics: Prints that line; None is `print_update`.
    """
    resume_at = agent.num_timesteps if run_directory.has_checkpoint else None
    with MetricsWriter(run_directory.path, resume_at=resume_at) as writer, stop_on_signal() as stop:
        try:
            callbacks = [writer, run_directory.checkpoint(checkpoint_every), stop]
            drawn = progress_bar and sys.stderr.isatty()  # a bar in a log file is thousands of lines in one
            callbacks += [print_metrics or print_update] if progress_bar and not drawn else []
            agent.learn(duration, callback=callbacks, progress_bar=drawn)
        except Exception as error:
            # A reward that fails after an hour must not cost the hour.
            if agent.num_timesteps == 0:
                raise
            if getattr(agent, "is_divided", False):  # parts are out of reach: who holds them may be waiting elsewhere
                print("rlhf-gym: with --fsdp the last checkpoint is what is left", file=sys.stderr)
                raise
            try:
                run_directory.save(agent)
                saved = f"the model at {agent.num_timesteps} tokens is saved in {run_directory.model}"
            except ValueError as refusal:
                if str(refusal) == str(error):
                    raise
                saved = str(refusal)
            if isinstance(error, ValueError):
                raise ValueError(f"{error} ({saved})") from error
            print(f"rlhf-gym: {saved}", file=sys.stderr)
            raise
        run_directory.save(agent)
    return stop


def report_stop(stop: StopRequest, agent: Any, run_directory: RunDirectory, advice: str = "") -> int:
    """Say in one line what a signal has stopped and where the work is; returns the exit code."""
    name = "interrupted" if stop.signal == signal.SIGINT else "terminated"
    where = f"the model is saved in {run_directory.model}"
    print(f"rlhf-gym: {name} at {agent.num_timesteps} tokens; {where}{advice}", file=sys.stderr)
    return 128 + (stop.signal or 0)


def print_update(agent: Any, metrics: Mapping[str, float]) -> None:
    """A line for each update, where no progress bar can be drawn; a callback."""
    score, kl = metrics.get("objective/scores", math.nan), metrics.get("objective/kl", math.nan)
    print(
        f"{agent.num_timesteps} tokens, score {score:.3f}, kl {kl:.2f}, {metrics.get('time/fps', math.nan):.0f} tokens/s",
        flush=True,
    )
