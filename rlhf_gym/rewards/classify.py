"""A sequence classifier as a reward: a sentiment model, a learned reward model, a toxicity filter."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .sequences import READS, batches_by_length, encode_texts, last_token_outputs
from .text import check_choice

if TYPE_CHECKING:
    import torch


RECORDED = "rlhf_gym_reward"
"""Key of a model's ``config.json`` under which `rlhf_gym.reward_models` writes how the reward is to be read."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """See :func:`classifier`."""

    model: Any
    tokenizer: Any
    label: int
    output: str
    reads: str
    truncation: str
    max_tokens: int | None
    join: str = ""
    shift: float = 0.0
    """Subtracted from the logit: the mean over reference samples of a reward model whose head has no bias."""

    __name__ = "classifier"

    def __deepcopy__(self, memo: dict) -> Classifier:
        return self

    def __call__(
        self, prompts: list[str], completions: list[str], continuations: list[str] | None = None
    ) -> np.ndarray:
        from scipy.special import expit, softmax

        logits = self.logits(prompts, completions, continuations)
        if self.output == "logit":
            return logits[:, self.label] - self.shift
        if logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification":
            return expit(logits[:, self.label])
        return softmax(logits, axis=1)[:, self.label]

    def logits(self, prompts: list[str], completions: list[str], continuations: list[str] | None = None) -> np.ndarray:
        """All outputs for each text. Shape (B, num_labels), float64.

        Args:
            prompts: B texts.
            completions: B texts.
            continuations: The completions with the space before them, where it is known; else ``join`` decides on it.
        """
        import torch

        if not len(prompts):
            return np.zeros((0, len(self.model.config.id2label)))
        joined = self.reads == "prompt+response" and continuations is not None
        rows, types = encode_texts(
            self.tokenizer,
            prompts,
            continuations if joined else completions,
            reads=self.reads,
            join="" if joined else self.join,
            max_tokens=self.max_tokens,
            truncation=self.truncation,
        )
        self.model.eval()  # each time: somebody else's .train() would switch dropout on
        found = np.empty((len(rows), len(self.model.config.id2label)))
        with torch.inference_mode():
            for batch in batches_by_length([len(ids) for ids in rows]):
                of_batch = None if types is None else [types[row] for row in batch]
                logits = last_token_outputs(self.model, [rows[row] for row in batch], of_batch)
                if tuple(logits.shape) != (len(batch), found.shape[1]):
                    raise ValueError(
                        f"the classifier returned logits of shape {tuple(logits.shape)} for {len(batch)} texts"
                    )
                found[batch] = logits.double().cpu().numpy()
        return found


def classifier(
    model: Any,
    tokenizer: Any = None,
    *,
    label: str | int | None = None,
    output: str | None = None,
    reads: str | None = None,
    join: str | None = None,
    truncation: str | None = None,
    max_tokens: int | None = None,
    device: torch.device | str = "auto",
) -> Classifier:
    """One output of a Hugging Face sequence classifier. The boundary is text: it may have any tokenizer and vocabulary.

    Runs in eval mode and without gradients; a model loaded here runs in float32. Batching changes no score.

    What is left out here is as the model was trained, where `rlhf_gym.reward_models` has recorded it in its
    ``config.json``; the defaults below are for other models.

    Args:
        model: Directory or hub id of a sequence classifier (safetensors), or a model object, used where and as it is.
        tokenizer: Its tokenizer, or a directory; None takes the one beside the model.
        label: Name or index of the output. None takes the only one, or the one named "positive", or the second of two.
        output: "logit" (the default), or "probability" (softmax; sigmoid for one label and for multi-label models).
        reads: What it is given: "prompt+response" (one text, the default), "response", or "pair" (two segments, as in
            models trained on question and answer).
        join: Put between prompt and response where neither has white space there, and nobody knows how the two go on
            from each other (the environment does, from their tokens): "" (the default) or " ".
        truncation: What gives way in a text longer than ``max_tokens``: "left" (the default) or "right" end, or
            "error".
        max_tokens: Longest input, special tokens included. None takes the model's own limit.
        device: Where a model that is loaded here goes; "auto" is CUDA where there is one.

    Raises:
        ValueError: If there is no such classifier or label, or the tokenizer does not fit.
    """
    for name, value, choices in (
        ("output", output, ("logit", "probability")),
        ("reads", reads, READS),
        ("truncation", truncation, ("left", "right", "error")),
    ):
        if value is not None:
            check_choice(f"classifier: {name}", value, choices)
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise ValueError(f"classifier: max_tokens must be None or an integer >= 1, got {max_tokens!r}")
    if isinstance(model, (str, os.PathLike)):
        source = os.fspath(model)
        model = _load(source, device)
    else:
        source = getattr(model.config, "_name_or_path", "")
        if model.get_output_embeddings() is not None:
            raise ValueError(
                f"classifier: {type(model).__name__} is a language model; use perplexity(model, tokenizer)"
            )
    tokenizer = _load_tokenizer(tokenizer, source)
    size, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        raise ValueError(
            f"classifier: the tokenizer has the token id {largest}, but the model's vocabulary is {size}; use the "
            "model's own tokenizer"
        )
    recorded = getattr(model.config, RECORDED, None) or {}
    read = {"output": "logit", "reads": "prompt+response", "join": "", "truncation": "left"}
    read |= {name: recorded[name] for name in read if name in recorded}
    asked = {"output": output, "reads": reads, "join": join, "truncation": truncation}
    read |= {name: value for name, value in asked.items() if value is not None}
    if read["truncation"] != "error":
        tokenizer.truncation_side = read["truncation"]
    index = _label_index(model.config, recorded.get("label") if label is None else label)
    return Classifier(
        model,
        tokenizer,
        index,
        max_tokens=max_tokens or recorded.get("max_tokens") or _max_tokens(model, tokenizer),
        shift=float(recorded.get("shift", 0.0)),
        **read,
    )


def _load(source: str, device: torch.device | str) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, logging

    from rlhf_gym.lm.load import find_source

    place, arguments = find_source("classifier", source).arguments()
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what it would report of missing weights is an error of ours below
    if Path(place).is_dir():  # only a download takes long enough for one
        logging.disable_progress_bar()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **arguments
        )
    except Exception as error:
        raise ValueError(
            f"classifier: {source!r} cannot be loaded as a sequence classifier from safetensors: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        # transformers would fill them with noise and go on with a warning: a language model's directory would become a
        # random reward.
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"classifier: {source!r} is no trained sequence classifier, it has no weights {missing}; for a language "
            "model use perplexity(...)"
        )
    return model.to(device).requires_grad_(False)


def _load_tokenizer(tokenizer: Any, source: str) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return copy.deepcopy(tokenizer)  # the truncation side is set on it
    place = source if tokenizer is None else os.fspath(tokenizer)
    if not place or not (Path(place).is_dir() or "/" in place):  # Path("") is the working directory
        raise ValueError(
            "classifier: tokenizer must be given with a model object that was not loaded from a directory: "
            "classifier(model, tokenizer)"
        )
    from transformers import AutoTokenizer

    from rlhf_gym.lm.load import find_source

    where, arguments = find_source("tokenizer", place).arguments()
    try:
        loaded = AutoTokenizer.from_pretrained(where, **arguments)
    except Exception as error:
        raise ValueError(f"classifier: no tokenizer can be loaded from {place!r}: {error}") from error
    if not set(loaded.get_vocab()) - set(loaded.all_special_tokens):
        # Without tokenizer files transformers makes up an empty one from config.json, to which every word is unknown.
        raise ValueError(f"classifier: there is no tokenizer in {place!r}; give it: classifier(model, tokenizer)")
    return loaded


def _label_index(config: Any, label: str | int | None) -> int:
    names = {int(index): str(name) for index, name in config.id2label.items()}
    shown = ", ".join(f"{index}: {name!r}" for index, name in sorted(names.items()))
    if label is None:
        positive = [index for index, name in names.items() if name.lower() in ("positive", "pos")]
        if len(names) <= 2 or len(positive) == 1:
            return positive[0] if len(positive) == 1 else len(names) - 1
        raise ValueError(f"classifier: label must be given for a model with more than two labels ({shown})")
    if isinstance(label, str):
        found = [index for index, name in names.items() if name.lower() == label.lower()]
        if found:
            return found[0]
    elif not isinstance(label, bool) and label in names:
        return int(label)
    raise ValueError(f"classifier: label must be one of the model's ({shown}), got {label!r}")


def _max_tokens(model: Any, tokenizer: Any) -> int | None:
    """Longest input that both can take; None when neither says."""
    limits = []
    if tokenizer.model_max_length < 10**9:  # "unlimited" is a very large number there
        limits.append(tokenizer.model_max_length)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions > 0:
        # RoBERTa and its kin count positions from padding_idx + 1, so the table has that many unused rows at its start.
        tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
        reserved = getattr(tables[0], "padding_idx", None) if tables else None
        limits.append(positions if reserved is None else positions - reserved - 1)
    return min(limits, default=None)
