"""Supervised fine-tuning of language models on texts and on responses to prompts; see ``docs/sft.md``.

`train` does all of it; `Trainer` is the loop alone, over examples that `make_examples` has made.
"""

from .examples import Example, Texts, hold_out, make_examples, read_texts
from .ngram import Ngram
from .packing import can_pack, lay_out, micro_batches, token_losses
from .run import make_trainer, train
from .trainer import SFTConfig, Trainer

__all__ = [
    "Example",
    "Ngram",
    "SFTConfig",
    "Texts",
    "Trainer",
    "can_pack",
    "hold_out",
    "lay_out",
    "make_examples",
    "make_trainer",
    "micro_batches",
    "read_texts",
    "token_losses",
    "train",
]
