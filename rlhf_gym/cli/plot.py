"""``rlhf-gym plot``: what the results of a benchmark say, as tables, pictures and a page."""

from __future__ import annotations

from rlhf_gym.cli.options import Plot


def run(options: Plot) -> int:
    """Draw and print where it is; returns the exit code."""
    from rlhf_gym.benchmarks.report import write_report

    for path in write_report(options.directory, options.out):
        print(path)
    return 0
