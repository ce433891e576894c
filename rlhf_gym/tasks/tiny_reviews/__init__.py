"""Tiny reviews: short product reviews written by a small grammar, so their true probability and sentiment are known.

``sample`` writes a review, ``log_prob`` and ``sentiment`` are exact, ``load_prompts`` gives openings to continue, and
``gold_sentiment`` is the true reward that a learned or proxy reward can be compared with. ``MODEL_DIR`` holds a
0.8M-parameter language model of the reviews (``train.py`` made it). See docs/tiny_reviews.md.

Nothing here imports torch, except ``train.py``.
"""

from __future__ import annotations

from .reviews import (
    GRAMMAR,
    grammatical,
    log_prob,
    next_token_probs,
    prefix_sentiment,
    sample,
    sentiment,
    true_perplexity,
)
from .task import MODEL_DIR, gold_sentiment, grammaticality, load_prompts

__all__ = [
    "GRAMMAR",
    "MODEL_DIR",
    "gold_sentiment",
    "grammatical",
    "grammaticality",
    "load_prompts",
    "log_prob",
    "next_token_probs",
    "prefix_sentiment",
    "sample",
    "sentiment",
    "true_perplexity",
]
