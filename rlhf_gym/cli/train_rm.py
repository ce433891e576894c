"""``rlhf-gym train-rm``: judgements in; a directory out that ``reward=`` takes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_gym.atomic import CHECKSUMS, write_json
from rlhf_gym.cli.options import TrainRM, as_dict
from rlhf_gym.cli.setup import model_source, quiet_transformers
from rlhf_gym.data import Demonstration, load_records
from rlhf_gym.envs.render import visible
from rlhf_gym.lm import load_tokenizer
from rlhf_gym.reward_models import RewardModel, RewardModelConfig, load_judgements, train_reward_model

FREE_ON_RESUME = frozenset({"overwrite", "resume", "progress_bar"})


def run(options: TrainRM) -> int:
    """Train, report and save; returns the exit code."""
    quiet_transformers()
    out = _target(options)
    model = model_source(options.model)
    tokenizer = load_tokenizer(model)
    read = functools.partial(load_judgements, tokenizer=_chat(tokenizer), criterion=options.criterion)
    data = read(options.file)
    evaluation = None if options.eval is None else read(options.eval)
    told = (data if evaluation is None else evaluation).gold
    names = {field.name for field in dataclasses.fields(RewardModelConfig)}
    settings: dict[str, Any] = {name: value for name, value in as_dict(options).items() if name in names}
    config = RewardModelConfig(**settings)
    state = _claim_state(out, options)
    try:
        trained = train_reward_model(
            data.records,
            model=model,
            tokenizer=tokenizer,
            config=config,
            num_members=options.members,
            rule=options.rule,
            std_coef=options.std_coef,
            eval_records=None if evaluation is None else evaluation.records,
            held_out=options.held_out,
            reference=_reference(options.reference, tokenizer),
            gold=options.gold if options.gold is not None else told if any(told) else None,
            baselines=options.baselines,
            seed=options.seed,
            device=options.device,
            checkpoint=state,
            implicit=data.implicit,
            progress_bar=options.progress_bar,
        )
    except BaseException as error:
        if not _begun(state):
            shutil.rmtree(state, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                "interrupted; the same command with --resume goes on from the last checkpoint"
            ) from None
        raise
    source = Path(options.file).expanduser()
    details = {
        **trained.details,
        "model": options.model,
        "file": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    dataclasses.replace(trained, details=details).save(out)
    shutil.rmtree(state, ignore_errors=True)
    _print(trained)
    print(f"reward model: {out}; use it with rlhf-gym train --reward {out}")
    return 0


def _chat(tokenizer: Any) -> Any:
    """The tokenizer if it can read conversations: without a template `load_judgements` says what is missing."""
    return tokenizer if getattr(tokenizer, "chat_template", None) else None


def _target(options: TrainRM) -> Path:
    """The directory to write, once it is clear that it may be written.

    Raises:
        ValueError: If there is something that must not be overwritten.
    """
    out = Path(options.out).expanduser()
    if options.overwrite and options.resume:
        raise ValueError("--overwrite and --resume exclude each other: start anew, or go on")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / CHECKSUMS).is_file()):
        raise ValueError(f"{out} is not empty and holds no reward model; choose another --out or empty it yourself")
    goes_on = options.resume and _begun(_state(out))  # what --overwrite began, for instance
    if (out / CHECKSUMS).is_file() and not (options.overwrite or goes_on):
        raise ValueError(f"{out} holds a finished reward model; choose another --out, or add --overwrite")
    return out


def _claim_state(out: Path, options: TrainRM) -> Path:
    """The directory for the state of the unfinished training, beside ``out``.

    Raises:
        ValueError: If one is there and is not to be gone on with, or was begun with other options.
    """
    state = _state(out)
    asked = {name: value for name, value in as_dict(options).items() if name not in FREE_ON_RESUME}
    asked = json.loads(json.dumps(asked))
    file = state / "options.json"
    if options.overwrite:
        shutil.rmtree(state, ignore_errors=True)
    if _begun(state):
        if not options.resume:
            raise ValueError(
                f"the training of {out} was interrupted; add --resume to go on, or --overwrite to start anew"
            )
        begun = json.loads(file.read_text(encoding="utf-8"))
        for name in sorted(asked):
            if begun.get(name) != asked[name]:
                raise ValueError(
                    f"cannot resume {out}: {name} was {begun.get(name)!r} and is now {asked[name]!r}; give the same "
                    "options, or add --overwrite to start anew"
                )
    state.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)
    return state


def _state(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.training")


def _begun(state: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return (state / "options.json").is_file() and any(state.glob("member_*"))


def _reference(file: str | None, tokenizer: Any) -> list[tuple[str, str]] | None:
    if file is None:
        return None
    records = load_records(file, Demonstration, tokenizer=_chat(tokenizer))
    return [(record.prompt, record.completion) for record in records]


def _print(trained: RewardModel) -> None:
    """What the training came to, and the report."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for i, member in enumerate(trained.details["members"]):
        if member.get("epochs"):
            losses = ", ".join(f"{epoch['loss']:.3f}" for epoch in member["epochs"])
            print(f"member {i}: {member['num_trained']:,} parameters trained, loss of each epoch {losses}")
        else:
            print(f"member {i}: a head of {member['num_trained']:,} parameters solved, penalty {member['penalty']:g}")
    if trained.report is None:
        return
    said, _, _ = trained.report.as_markdown().partition("\n\n")
    header, rows = trained.report.table()
    shown = Table(title=escape(said), title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(escape(visible(cell)) for cell in row))
    Console().print(shown)
