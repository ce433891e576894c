"""Splits of a file by its prompts: all rows of a prompt go to one part, whatever else the file holds."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from .records import Record, texts_of

_ANTHROPIC_TURN = re.compile(r"\n\s*Assistant:")


def prompt_key(record: Record, *, implicit: bool = False) -> str:
    """The prompt as it decides on the split: without regard to case, white space, and punctuation at the end.

    Args:
        record: Where its prompt is empty, its other texts count.
        implicit: The prompt was taken from what two responses begin with. It may then hold the beginning of an answer,
            which is cut off where a turn "Assistant:" shows that it has begun.
    """
    text = record.prompt
    if implicit and (turns := list(_ANTHROPIC_TURN.finditer(text))):
        text = text[: turns[-1].end()]
    text = text or "".join(sorted(texts_of(record)))
    text = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(".,;:!?…。，！？") or text


def split_of(key: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The part that a prompt belongs to. It depends on nothing but the prompt, the fractions and the seed.

    So rows that are appended later leave the others where they are, and one prompt is never in two parts.

    Args:
        key: What `prompt_key` gives.
        fractions: Name and share of each part; the shares add up to 1.
        seed: Another seed gives another split.

    Raises:
        ValueError: If a share is not above 0, or they do not add up to 1.
    """
    shares = list(fractions.values())
    if not shares or not all(share > 0 for share in shares) or abs(math.fsum(shares) - 1) > 1e-9:
        raise ValueError(f"fractions must be above 0 and add up to 1, got {dict(fractions)}")
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return _part(int.from_bytes(digest, "big") / 2**64, list(fractions), shares)


def _part(place: float, names: Sequence[str], shares: Sequence[float]) -> str:
    """The part in which a number in [0, 1) lies when they are laid side by side."""
    for i, name in enumerate(names):
        if place < math.fsum(shares[: i + 1]):
            return name
    return names[-1]
