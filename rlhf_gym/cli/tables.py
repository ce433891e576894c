"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_gym.evaluation import Evaluation
from rlhf_gym.report import table


def print_comparison(evaluations: Mapping[str, Evaluation]) -> None:
    """Evaluations side by side, with their 95 % intervals."""
    from rich.console import Console
    from rich.table import Table

    header, rows = table(evaluations)
    shown = Table(title="means with 95 % intervals over prompts", title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console().print(shown)
