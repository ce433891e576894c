"""A sequence classifier as a reward: a sentiment model, a learned reward model, a toxicity filter."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .text import check_choice

if TYPE_CHECKING:
    import torch


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

    __name__ = "classifier"

    def __deepcopy__(self, memo: dict) -> Classifier:
        return self

    def __call__(self, prompts: list[str], completions: list[str]) -> np.ndarray:
        import torch

        rows, types = self._encode(prompts, completions)
        self.model.eval()  # each time: somebody else's .train() would switch dropout on
        with torch.inference_mode():
            logits = self._logits(rows, types).float()
        if self.output == "logit":
            scores = logits[:, self.label]
        elif logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification":
            scores = logits[:, self.label].sigmoid()
        else:
            scores = logits.softmax(dim=-1)[:, self.label]
        return scores.double().cpu().numpy()

    def _encode(self, prompts: list[str], completions: list[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of each row, unpadded, and token types where the model reads pairs and tells them apart."""
        options: dict[str, Any] = {"truncation": False}
        if self.max_tokens is not None and self.truncation != "error":
            options = {"truncation": True, "max_length": self.max_tokens}
        if self.reads == "pair":
            encoded = self.tokenizer(list(prompts), list(completions), return_token_type_ids=True, **options)
        else:
            texts = (
                completions if self.reads == "response" else [p + c for p, c in zip(prompts, completions, strict=True)]
            )
            encoded = self.tokenizer(list(texts), **options)
        rows = [list(ids) or [self._filler()] for ids in encoded["input_ids"]]
        longest = max(range(len(rows)), key=lambda row: len(rows[row]))
        if self.max_tokens is not None and len(rows[longest]) > self.max_tokens:
            raise ValueError(
                f"the text of row {longest} has {len(rows[longest])} tokens, more than the {self.max_tokens} that the "
                'classifier reads; truncation="left" or "right" would cut it'
            )
        # Token types only where they mean something: GPT-2 takes them too, and would add the embedding of token 0 to
        # every position.
        wanted = self.reads == "pair" and getattr(self.model.config, "type_vocab_size", 0) > 1
        return rows, encoded.get("token_type_ids") if wanted else None

    def _filler(self) -> int:
        """A token for a text without any: the model must read something."""
        candidates = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0)
        return next(token for token in candidates if token is not None)

    def _logits(self, rows: list[list[int]], types: list[list[int]] | None) -> torch.Tensor:
        """One forward over the batch, padded on the right. Shape (B, num_labels)."""
        import torch

        # Decoders read their answer at the last token that is not config.pad_token_id, whatever the tokenizer pads
        # with. So pad with exactly that; without one they refuse batches, and any token that no row ends with then
        # serves for the length of this call.
        config = self.model.config.get_text_config()
        known = config.pad_token_id
        last = {ids[-1] for ids in rows}
        pad = known if known is not None else next(token for token in range(len(last) + 1) if token not in last)
        device = next(self.model.parameters()).device
        length = max(map(len, rows))

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in values], device=device)

        inputs = {"input_ids": padded(rows, pad), "attention_mask": padded([[1] * len(ids) for ids in rows], 0)}
        if types is not None:
            inputs["token_type_ids"] = padded(types, 0)
        config.pad_token_id = pad
        try:
            logits = self.model(**inputs).logits
        finally:
            config.pad_token_id = known
        if tuple(logits.shape) != (len(rows), len(self.model.config.id2label)):
            raise ValueError(f"the classifier returned logits of shape {tuple(logits.shape)} for {len(rows)} texts")
        return logits


def classifier(
    model: Any,
    tokenizer: Any = None,
    *,
    label: str | int | None = None,
    output: str = "logit",
    reads: str = "prompt+response",
    truncation: str = "left",
    max_tokens: int | None = None,
    device: torch.device | str = "auto",
) -> Classifier:
    """One output of a Hugging Face sequence classifier. The boundary is text: it may have any tokenizer and vocabulary.

    Runs in eval mode and without gradients, one forward for all responses; a model loaded here runs in float32.
    Batching changes no score.

    Args:
        model: Directory or hub id of a sequence classifier (safetensors), or a model object, used where and as it is.
        tokenizer: Its tokenizer, or a directory; None takes the one beside the model.
        label: Name or index of the output. None takes the only one, or the one named "positive", or the second of two.
        output: "logit", or "probability" (softmax; sigmoid for one label and for multi-label models).
        reads: What it is given: "prompt+response" (one text), "response", or "pair" (two segments, as in models
            trained on question and answer).
        truncation: What gives way in a text longer than ``max_tokens``: "left" or "right" end, or "error".
        max_tokens: Longest input, special tokens included. None takes the model's own limit.
        device: Where a model that is loaded here goes; "auto" is CUDA where there is one.

    Raises:
        ValueError: If there is no such classifier or label, or the tokenizer does not fit.
    """
    check_choice("classifier: output", output, ("logit", "probability"))
    check_choice("classifier: reads", reads, ("prompt+response", "response", "pair"))
    check_choice("classifier: truncation", truncation, ("left", "right", "error"))
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
    if truncation != "error":
        tokenizer.truncation_side = truncation
    return Classifier(
        model,
        tokenizer,
        _label_index(model.config, label),
        output,
        reads,
        truncation,
        max_tokens or _max_tokens(model, tokenizer),
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
