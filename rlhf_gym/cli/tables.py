"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_gym.envs.render import visible
from rlhf_gym.evaluation import Evaluation
from rlhf_gym.report import note, table


def print_comparison(evaluations: Mapping[str, Evaluation]) -> None:
    """Evaluations side by side."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    header, rows = table(evaluations)
    shown = Table(title=escape(note(evaluations)), title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(escape(visible(name)), justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(escape(visible(cell)) for cell in row))
    Console().print(shown)
