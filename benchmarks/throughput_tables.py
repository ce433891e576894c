"""Tables of `throughput`: all sides of a case, and the README's with a line for each comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .throughput_cases import CASES, Side


class Line(NamedTuple):
    """A comparison of two sides of a case, by their places in it; ours first."""

    what: str
    case: str
    ours: int
    theirs: int
    unit: str = "s"


_TUNED = "the same, against TRL tuned by hand: bfloat16 weights, tanh GELU, freed memory kept (its updates round away)"
_LINES = [
    Line("PPO with a reward model, 64 rows of 16 + 32, 4 epochs, small shape; against TRL 1.12 as it ships", "ppo-small", 0, 3),
    Line("the same, both float32", "ppo-small", 1, 2),
    Line(_TUNED, "ppo-small", 0, 4),
    Line("the same with GPT-2 small's shape, 16 rows; against TRL 1.12 as it ships", "ppo-gpt2", 0, 3),
    Line("the same, both float32", "ppo-gpt2", 1, 2),
    Line(_TUNED, "ppo-gpt2", 0, 4),
    Line("GRPO, 8 prompts 8 times, 16 + 32, small shape; against TRL 1.16 as it ships", "grpo-small", 0, 2),
    Line("the same, both float32", "grpo-small", 1, 4),
    Line(_TUNED, "grpo-small", 0, 5),
    Line("RLOO, 16 prompts 4 times; against TRL 1.16 as it ships", "rloo-small", 0, 2),
    Line("the same, both float32", "rloo-small", 1, 4),
    Line(_TUNED, "rloo-small", 0, 5),
    Line("rollout (tokens, log-probs, values) against `generate` (tokens), float32", "rollout", 0, 2, "tokens/s"),
    Line("the same, both bfloat16", "rollout", 1, 3, "tokens/s"),
    Line("useful tokens of geometric lengths, mean 16 of 64, against padded `generate`, float32", "ragged", 0, 2, "tokens/s"),
    Line("the same, both bfloat16", "ragged", 1, 3, "tokens/s"),
    Line("`envs.step` with the cached reference against `generate`", "steps", 0, 1, "tokens/s"),
    Line("SB3's PPO rollout, 16 rows of 16 + 48, against transformers' forward of each observation", "sb3-rollout", 0, 2, "tokens/s"),
    Line("the same, with our policy's cache against without", "sb3-rollout", 0, 1, "tokens/s"),
    Line("TRPO's update, 6 layers of width 128, 32 states, against sb3-contrib's own", "trpo", 0, 1),
    Line("peak memory of PPO, 64 rows of 16 + 48, small shape with V 50,257, float32; against TRL 1.12", "memory-small", 0, 3, "MiB"),
    Line("the same, ours in micro-batches of 16", "memory-small", 1, 3, "MiB"),
    Line("the same with GPT-2 small's shape", "memory-gpt2", 0, 3, "MiB"),
    Line("the same, ours in micro-batches of 16", "memory-gpt2", 1, 3, "MiB"),
    Line("on a GPU: PPO of GPT-2 small's shape, 512 rows of 32 + 64; against TRL 1.12 as it ships", "ppo-gpu", 0, 3),
    Line("rollout of the same, bfloat16, against `generate`", "rollout-gpu", 0, 1, "tokens/s"),
    Line("PPO's update, from 16 to 256 rows of 16 + 32", "rows", 0, 2, "growth"),
    Line("PPO's update, 32 rows, from 16 + 16 to 16 + 256", "tokens", 0, 2, "growth"),
]  # fmt: skip


def table(sides: list[Side], found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows of a case; the ratio is that of tokens per second to the first side's."""
    first = found[sides[0].name]["tokens_per_second"]
    lines = _heading("", "seconds", "tokens/s", "ours is faster by", "peak memory, MiB", "phases, s", "hardware")
    for side in sides:
        each = found[side.name]
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in each["phases"].items())
        ratio = f"{first / each['tokens_per_second']:.2f}x" if side is not sides[0] else ""
        lines.append(
            f"| {side.name} | {each['seconds']:.3g} | {each['tokens_per_second']:,.0f} | {ratio} | "
            f"{each['memory_mib']:,.0f} | {phases} | {_hardware(each)} |"
        )
    return lines


def readme_table(results: dict[str, Any]) -> list[str]:
    """Markdown rows of all comparisons that have been measured.

    Args:
        results: What `throughput` has written, by case.
    """
    rows = _heading("what", "ours", "theirs", "ratio", "ours against the hardware", "float32, bfloat16 GFLOP/s; GB/s")
    for line in _LINES:
        sides = [CASES[line.case][place] for place in (line.ours, line.theirs)]
        measured = results.get(line.case, {}).get("sides", {})
        if any(side.name not in measured for side in sides):
            continue
        ours, theirs = (measured[side.name] for side in sides)
        rates = results[line.case]["rates"]
        if line.unit == "growth":
            ratio, texts = _growth(sides, ours, theirs)
        elif line.unit == "MiB":
            ratio = theirs["memory_mib"] / ours["memory_mib"]
            texts = [f"{each['memory_mib']:,.0f} MiB" for each in (ours, theirs)]
        else:
            ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            texts = [
                f"{each['seconds']:.3g} s" if line.unit == "s" else f"{each['tokens_per_second']:,.0f} tokens/s"
                for each in (ours, theirs)
            ]
        hardware = "" if line.unit in ("MiB", "growth") else _hardware(ours)
        machine = f"{rates['float32 GFLOP/s']:.0f}, {rates['bfloat16 GFLOP/s']:.0f}; {rates['copy GB/s']:.0f}"
        rows.append(f"| {line.what} | {texts[0]} | {texts[1]} | {ratio:.1f} | {hardware} | {machine} |")
    return rows


def _heading(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _hardware(found: dict[str, Any]) -> str:
    """What `against_hardware` found, in words."""
    words = []
    if "update_utilisation" in found:
        words.append(f"update {100 * found['update_utilisation']:.0f} % of a matrix product's FLOP/s")
    if "decode_over_floor" in found:
        floors = f"FLOP {found['decode_floor_flops']:.3g} s, bytes {found['decode_floor_bytes']:.3g} s"
        words.append(f"decode {found['decode_over_floor']:.1f} times its floor ({floors})")
    return "; ".join(words)


def _growth(sides: Sequence[Side], small: dict[str, Any], large: dict[str, Any]) -> tuple[float, list[str]]:
    """How many times the tokens of prompts and responses, over how many times the seconds: 1 is linear."""
    times = large["phases"]["update"] / small["phases"]["update"]
    first, last = (side.case["rows"] * (side.case["prompt_tokens"] + side.case["response_tokens"]) for side in sides)
    return last / first / times, [f"{times:.1f} times the seconds", f"{last / first:.1f} times the tokens"]
