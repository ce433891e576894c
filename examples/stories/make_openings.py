"""Write the 64 story openings of ``openings.jsonl`` (and 32 others for evaluation, ``held_out.jsonl``)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

HEROES = (
    "a little girl named Lily", "a boy named Tim", "a small dog", "an old cat", "a big bear", "a red bird", "a girl named Mia", "a boy named Ben",
    "a little frog", "a brown fox", "a kind queen", "a shy mouse", "a baby duck", "a green turtle", "a girl named Sue", "a boy named Max",
)  # fmt: skip
OPENINGS = (
    "Once upon a time, there was {}.",
    "One day, {} went to the park.",
    "It was raining. There was {} in the house.",
    "In the forest lived {}.",
)
HELD_OUT_HEROES = (
    "a white rabbit",
    "a boy named Sam",
    "a tall tree",
    "a girl named Anna",
    "a silly monkey",
    "a grey horse",
    "a little boat",
    "a boy named Leo",
)


def main() -> None:
    """Write both files beside this one."""
    for name, heroes in (("openings.jsonl", HEROES), ("held_out.jsonl", HELD_OUT_HEROES)):
        rows = [{"prompt": opening.format(hero)} for hero, opening in itertools.product(heroes, OPENINGS)]
        Path(__file__).with_name(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
