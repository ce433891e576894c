"""From data and the name of a model to a trained model, in one call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf_gym.lm import load_language_model
from rlhf_gym.lm.load import LanguageModel
from rlhf_gym.lm.lora import add_lora
from rlhf_gym.rules import make_config

from .examples import Example, hold_out, make_examples, read_texts
from .trainer import Callback, SFTConfig, Trainer

_DEFAULT_MAX_TOKENS = 512


def train(
    data: Any,
    *,
    num_epochs: int = 1,
    callback: Callback | Sequence[Callback] | None = None,
    progress_bar: bool = False,
    **arguments: Any,
) -> Trainer:
    """Fine-tune a language model.

    Args:
        data: What to learn, see `read_texts`.
        num_epochs: Passes over the data.
        callback: See `Trainer.learn`.
        progress_bar: Show a bar.
        **arguments: Those of `make_trainer`: the model, what is held out, and the settings.

    Returns:
        The trainer: its ``model`` and ``tokenizer``, ``history`` with what was measured after each epoch, and ``save``.

    Example:
        >>> trainer = train([{"prompt": "the lid is", "completion": "great ."}], model="tiny-reviews", num_epochs=3)
        >>> trainer.save("my-model")  # doctest: +SKIP
    """
    return make_trainer(data, **arguments).learn(num_epochs, callback, progress_bar)


def make_trainer(
    data: Any,
    *,
    model: Any,
    tokenizer: Any = None,
    eval_data: Any = None,
    eval_share: float = 0.0,
    max_tokens: int | None = None,
    truncate: str | None = None,
    lora_rank: int | None = None,
    seed: int = 0,
    device: Any = "auto",
    **config: Any,
) -> Trainer:
    """A trainer that has learnt nothing yet.

    Args:
        data: What to learn, see `read_texts`.
        model: What `load_language_model` takes. A model object is trained in place; of a `LanguageModel`, which may be
            somebody's reference, a copy is trained. `rlhf_gym.lm.scratch.new_model` makes a new one.
        tokenizer: That of the model where it does not bring one.
        eval_data: What to measure with after each epoch; like ``data``.
        eval_share: Share of the prompts of ``data`` to hold out for it, see `hold_out`; 0 holds out nothing.
        max_tokens: Most tokens of an example; None is the model's context, at most 512.
        truncate: "right" cuts longer ones, see `make_examples`; None refuses them. (Texts without a prompt become pieces.)
        lora_rank: Rank of a LoRA adapter to train in place of the model; None trains the model.
        seed: Of what is held out, of the adapter and of the order of the examples.
        device: Where to train.
        **config: Fields of `SFTConfig`.

    Raises:
        ValueError: If the model, the data or a setting cannot be used. Says what to do.
    """
    settings = make_config(SFTConfig, config)
    lm = load_language_model(
        model, tokenizer, device=device, dtype="auto" if isinstance(model, LanguageModel) else "float32"
    )
    if isinstance(model, LanguageModel):
        lm = dataclasses.replace(lm, model=copy.deepcopy(lm.model))
    if max_tokens is None:
        max_tokens = min(_DEFAULT_MAX_TOKENS, lm.max_context or _DEFAULT_MAX_TOKENS)
    elif not 1 <= max_tokens <= (lm.max_context or max_tokens):
        raise ValueError(f"max_tokens must be in 1 to the model's context of {lm.max_context}, got {max_tokens}")
    texts, held_out = read_texts(data, lm.tokenizer), None
    if eval_data is not None:
        if eval_share:
            raise ValueError("eval_share and eval_data exclude each other: leave one of them out")
        held_out = read_texts(eval_data, lm.tokenizer)
    elif eval_share:
        texts, held_out = hold_out(texts, eval_share, seed)
    examples, num_cut = make_examples(texts, lm, max_tokens=max_tokens, truncate=truncate)
    eval_examples: list[Example] = []
    if held_out is not None:
        eval_examples, num_eval_cut = make_examples(held_out, lm, max_tokens=max_tokens, truncate=truncate)
        num_cut += num_eval_cut
    if lora_rank is not None:
        add_lora(lm.model, lora_rank, base=lm.name, seed=seed)
    trainer = Trainer(lm, examples, eval_examples, settings, seed)
    trainer.num_cut = num_cut
    return trainer
