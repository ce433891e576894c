"""Rewards: what a response is worth. A function of your own, a model, or a ready one; see ``docs/rewards.md``."""

from .classify import classifier
from .content_filter import content_filter
from .ensemble import disagreement, ensemble
from .human import human
from .inputs import RewardError, RewardInputs, Scores
from .judge import judge
from .lexicon import sentiment
from .likelihood import perplexity, reference_logprob
from .numeric import numeric_answer
from .references import bleu, chrf, exact_match, rouge_l, token_f1
from .resolve import as_reward
from .reward import Reward
from .text import keyword, length, regex, repetition
from .unit_tests import unit_tests
from .wrappers import clip, length_penalty, normalize, scale

__all__ = [
    "Reward",
    "RewardError",
    "RewardInputs",
    "Scores",
    "as_reward",
    "bleu",
    "chrf",
    "classifier",
    "clip",
    "content_filter",
    "disagreement",
    "ensemble",
    "exact_match",
    "human",
    "judge",
    "keyword",
    "length",
    "length_penalty",
    "normalize",
    "numeric_answer",
    "perplexity",
    "reference_logprob",
    "regex",
    "repetition",
    "rouge_l",
    "scale",
    "sentiment",
    "token_f1",
    "unit_tests",
]
