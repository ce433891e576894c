"""What turns the reviews into a task: openings to continue, and rewards that know the truth about a continuation."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from .reviews import GRAMMAR, PRODUCTS, grammatical, sentiment

MODEL_DIR = Path(__file__).parent / "model"
"""The language model trained on the reviews, with its tokenizer: a directory for ``from_pretrained``."""

NUM_PROMPTS = {"train": 512, "test": 64}


def load_prompts(split: str = "train") -> list[dict[str, str]]:
    """Openings of reviews, cut before the first word that gives away what the writer thinks.

    Each one leaves the sentiment exactly undecided, so reviews that continue it have a mean sentiment of 1/2. The two
    splits have no prompt in common.

    Args:
        split: "train" or "test" (held out).

    Returns:
        512 or 64 rows with the columns "prompt" and "product", for instance
        ``{"prompt": "review of the kettle : the lid", "product": "kettle"}``; a fresh list at each call.
    """
    if split not in NUM_PROMPTS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    # Every other one of the first is held out, so that more training prompts can be had without touching the test.
    held_out = _openings()[1 : 2 * NUM_PROMPTS["test"] : 2]
    openings = held_out if split == "test" else [opening for opening in _openings() if opening not in held_out]
    return [{"prompt": prompt, "product": product} for prompt, product in openings]


def gold_sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward: the exact probability that the writer of prompt + completion is positive, in [0, 1].

    0.0 where the two together are no complete review of the grammar. How the texts are spaced does not matter.
    """
    return [sentiment(_join(prompt, completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def grammaticality(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward: 1.0 where prompt + completion is a complete review that the grammar can produce, else 0.0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(grammatical(_join(prompt, completion))) for prompt, completion in pairs]


def _join(prompt: str, completion: str) -> str:
    return " ".join(f"{prompt} {completion}".split())


@lru_cache(maxsize=1)
def _openings() -> list[tuple[str, str]]:
    """Distinct prompts with their products, as the grammar itself draws them."""
    # random.Random promises the same stream in every Python, so the prompts need no file.
    rng = random.Random(0)
    parts = {part for product in PRODUCTS.values() for part in product}
    undecided = {"the", "although", "despite", "they", "call", "it"} | parts
    found: dict[str, str] = {}
    while len(found) < sum(NUM_PROMPTS.values()):
        words = GRAMMAR.sample(rng).split()
        # All openings end in the first ":" or "."; what follows is kept as long as it says nothing of the product.
        cut = min(words.index(mark) for mark in (":", ".") if mark in words) + 1
        product = next(word for word in words[:cut] if word in PRODUCTS)
        while words[cut] in undecided:
            cut += 1
        found.setdefault(" ".join(words[:cut]), product)
    return list(found.items())
