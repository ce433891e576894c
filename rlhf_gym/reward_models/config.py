"""How a reward model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["auto", "preference", "regression", "ordinal", "binary", "multi-class"]


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """How a reward model is trained; nothing in it depends on the data."""

    kind: Kind = "auto"
    """What the judgements are: auto takes preference for pairs and rankings, regression for ratings, binary for two
    classes and multi-class for more; ordinal takes ratings as steps of unknown size."""
    positive_label: str | None = None
    """The class whose probability is the reward; True, 1, or the last by name of two classes when left out."""
    learning_rate: float | None = None
    """Largest one; when left out 3e-4 for up to 20 million trained parameters, 2e-5 for more."""
    num_epochs: int = 3
    """Times that each judgement is learnt from."""
    batch_size: int = 16
    """Judgements per step of the optimiser; in long texts they are split up, which changes nothing."""
    warmup_share: float = 0.1
    """Share of the steps over which the learning rate rises from 0; it then falls to 0 linearly."""
    weight_decay: float = 0.01
    """AdamW's, on matrices."""
    max_grad_norm: float = 1.0
    """Longest gradient."""
    train_layers: int | None = None
    """Upper blocks that are trained with the head; all of the model when left out. 0 trains the head alone: a convex
    problem, which is solved with the weight decay that cross-validation chooses, whatever the options above say."""
    num_layers: int | None = None
    """Keep the lower blocks only: the middle of a model often knows more of a text than its end; all when left out."""
    from_scratch: bool = False
    """Start from random weights: of the model nothing but its shape and tokenizer is used."""
    dropout: bool = False
    """Keep the model's own dropout in training."""
    label_smoothing: float = 0.0
    """Probability with which a judgement is taken to be the wrong way round, in [0, 0.5); of multi-class that any class
    is right."""
    margins: bool = True
    """Ask of a pair with a margin that its rewards differ by more than that."""
    center_coef: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps prompts on one level: preferences do not say it."""
    early_stopping: bool = False
    """Set a tenth of the training prompts aside, and take the epoch at which the loss on them was smallest."""
    reads: Literal["prompt+response", "response", "pair"] = "prompt+response"
    """What the model is given: one text, the response alone, or two segments."""
    join: str | None = None
    """What goes between prompt and response where neither has white space there; when left out a space if the data
    never has any there and words would run together, else nothing."""
    max_tokens: int | None = None
    """Longest text; longer ones lose their beginning. The model's own limit when left out."""

    def __post_init__(self) -> None:
        for name, low in (("num_epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name, low in (("train_layers", 0), ("num_layers", 1), ("max_tokens", 1)):
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, or left out, got {getattr(self, name)}")
        for name in ("weight_decay", "center_coef"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share must be in [0, 1], got {self.warmup_share}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.join not in (None, "", " "):
            raise ValueError(f"join must be '' or ' ', or left out, got {self.join!r}")
        if self.from_scratch and self.train_layers is not None:
            raise ValueError("from_scratch trains the whole model; leave train_layers out")
        if self.train_layers == 0 and (self.early_stopping or self.dropout):
            raise ValueError("train_layers=0 solves the head, without epochs; leave early_stopping and dropout out")
