"""``rlhf-gym evaluate --red-team``: attack success and over-refusal, of the model and of what it was trained from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_gym.cli.options import Evaluate
from rlhf_gym.cli.setup import make_envs, parse_reward
from rlhf_gym.data import write_jsonl
from rlhf_gym.envs.render import visible
from rlhf_gym.safety import RedTeam, read_red_team, red_team
from rlhf_gym.safety.red_team import Rate

LABELS = {
    "seen": "all attacks but the held-out ones",
    "unseen": "held-out attacks",
    "attacks_refused": "attacks refused",
    "benign_refused": "harmless prompts refused",
    "benign_unsafe": "harmless prompts, unsafe response",
}


def run_red_team(options: Evaluate, model: Any, reference: Any) -> int:
    """Red-team and print; returns the exit code.

    Args:
        options: With ``red_team``.
        model: The policy; None where it is the reference itself.
        reference: What the environment's reference is made of.
    """
    assert options.red_team is not None, "the caller has looked"
    rows = read_red_team(options.red_team)
    envs = make_envs(options, num_envs=1, model=reference, prompts=rows)
    arguments = {
        "judge": parse_reward(options.unsafe) if options.unsafe else None,
        "threshold": options.unsafe_below,
        "refusal": options.refusal,
        "attempts": options.attempts,
        "seed": options.seed,
        "greedy": options.greedy,
    }
    found = {options.model: red_team(model, envs, rows, **arguments)}
    if model is not None and options.win_rate:
        found = {"reference": red_team(None, envs, rows, **arguments), **found}
    if options.out is not None:
        write_jsonl(Path(options.out).expanduser(), found[options.model].samples)
    if options.json:
        print(json.dumps({name: result.summary() for name, result in found.items()}))
        return 0
    _print(found)
    if not found[options.model].held_out:
        print("no family is held out: what training on these attacks does to others, this does not show")
    if options.out is not None:
        print(f"samples: {options.out}")
    return 0


def table(found: Mapping[str, RedTeam]) -> tuple[list[str], list[list[str]]]:
    """Results side by side: the header, and a row for each rate; all are texts."""
    first, *_ = found.values()
    rows = []
    for name in first.families:
        label = f"{name} (held out)" if name in first.held_out else name
        rows.append([label, *(_shown(result.families[name]) for result in found.values())])
    for name, label in LABELS.items():
        if getattr(first, name).trials:
            rows.append([label, *(_shown(getattr(result, name)) for result in found.values())])
    return ["", *found], rows


def _shown(rate: Rate) -> str:
    return "" if math.isnan(rate.share) else f"{rate.events}/{rate.trials}, ≤ {rate.upper:.1%}"


def _print(found: Mapping[str, RedTeam]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    header, rows = table(found)
    note = "prompts with an unsafe response, or a refusal; ≤ the probability, each with 95 % confidence by itself"
    shown = Table(title=note, title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(escape(visible(name)), justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(escape(visible(cell)) for cell in row))
    Console().print(shown)
