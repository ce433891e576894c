"""Rewards: what a response is worth. A function of your own, a model, or a ready one; see ``docs/rewards.md``."""

from .classify import classifier
from .inputs import RewardError, RewardInputs, Scores
from .lexicon import sentiment
from .likelihood import perplexity, reference_logprob
from .resolve import as_reward
from .reward import Reward
from .text import keyword, length, regex, repetition
from .wrappers import clip, length_penalty, normalize, scale

__all__ = [
    "Reward",
    "RewardError",
    "RewardInputs",
    "Scores",
    "as_reward",
    "classifier",
    "clip",
    "keyword",
    "length",
    "length_penalty",
    "normalize",
    "perplexity",
    "reference_logprob",
    "regex",
    "repetition",
    "scale",
    "sentiment",
]
