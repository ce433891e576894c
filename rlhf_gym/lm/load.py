"""Loading a language model with its tokenizer, and saying plainly what is wrong when that fails."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from . import lstm  # noqa: F401 - registers its model type
from .lora import base_of, merge_lora

PACKAGED_MODELS: dict[str, Path] = {"tiny-reviews": Path(__file__).parents[1] / "tasks" / "tiny_reviews" / "model"}
"""Models that come with the package: name -> directory."""

# Modules that register further model types with transformers, by type; they need this one, so they are imported when used.
_REGISTERED_BY = {
    "rlhf_gym_ngram": "rlhf_gym.exact.ngram",
    "rlhf_gym_residual": "rlhf_gym.exact.residual",
    "rlhf_gym_tabular": "rlhf_gym.exact.policies",
}

_HUB_TIMEOUT_S = 4.0


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen causal language model with its tokenizer, and what has to be known about the two together.

    Copying one, deeply or not, gives the same object: a reference model is shared, never duplicated by accident.
    """

    model: PreTrainedModel
    """In eval mode, its parameters without gradients."""
    tokenizer: Any
    """A tokenizer of transformers, or anything with its ``encode`` and ``decode``."""
    name: str
    """What it was loaded as."""
    vocab_size: int
    """V, the last dimension of the logits (it can exceed the number of the tokenizer's tokens)."""
    eos_token_ids: tuple[int, ...]
    """The tokens that end a response; none where the model's ``eos_token_id`` is an empty list."""
    pad_token_id: int
    """What fills rows up; always below V. It may equal EOS: padding is told by lengths, never by its id."""
    bos_token_id: int | None
    """The token that starts a text, where there is one."""
    max_context: int | None
    """Most tokens the model can read; None when there is no limit (LSTM)."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def __copy__(self) -> LanguageModel:
        return self

    def __deepcopy__(self, memo: dict) -> LanguageModel:
        return self


def load_language_model(
    model: str | os.PathLike | PreTrainedModel | LanguageModel,
    tokenizer: Any = None,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
) -> LanguageModel:
    """Loads a causal language model, frozen and in eval mode. Weights come from safetensors, and no remote code runs.

    Args:
        model: The name of a packaged model ("tiny-reviews"), a directory (also one of a LoRA adapter, which is merged into
            its base model), an id on the Hugging Face hub, a ".gguf" file, a model object (used as it is: moved or cast
            only when ``device`` or ``dtype`` say so; it is put in eval mode and its parameters stop requiring gradients),
            or a `LanguageModel` (returned as it is; the other arguments must not ask for anything else).
        tokenizer: The same choices, or a tokenizer object; None is the one beside the model.
        device: Where to put the model; "auto" is CUDA where there is one, else the CPU.
        dtype: What to compute in, "float32" or "bfloat16" for instance; "auto" is bfloat16 on a CUDA device that has
            it, else float32.

    Returns:
        The model, its tokenizer and their special tokens.

    Raises:
        ValueError: If the model or the tokenizer cannot be found or do not fit each other, or the device cannot be used.
            Says what to do.
    """
    if device != "auto":
        device = torch_device(device)
    if isinstance(model, LanguageModel):
        _check_same(model, tokenizer, device, dtype)
        return model
    if isinstance(model, nn.Module):
        if not hasattr(model, "get_output_embeddings"):
            raise TypeError(f"model must be a causal language model of transformers, got a {type(model).__name__}")
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        source = Source(name, Path(name)) if Path(name).is_dir() else None
        if device != "auto":
            model = model.to(device)
        if dtype != "auto":
            model = model.to(_torch_dtype(dtype, model.device))
    else:
        name = os.fspath(model)
        source = find_source("model", name)
        if device == "auto":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = _load_model(source, _torch_dtype(dtype, device)).to(device)
    if tokenizer is None:
        if source is None:
            raise ValueError(f"tokenizer must be given with a {name} object that was not loaded from a directory")
        tokenizer = _load_tokenizer(source)
    elif isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    model.eval().requires_grad_(False)
    return _describe(model, tokenizer, name)


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer of a packaged model, a directory, an id on the Hugging Face hub or a ".gguf" file. No remote code runs.

    Raises:
        ValueError: If there is none. Says what to do.
    """
    return _load_tokenizer(find_source("tokenizer", os.fspath(name)))


def max_context(config) -> int | None:
    """Most tokens that a model with this configuration can read, None when there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocab_size(model: PreTrainedModel) -> int:
    """The last dimension of a model's logits."""
    head = model.get_output_embeddings()
    return model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of a model to 0, in place, so that train mode and eval mode compute the same.

    The ratio of new to old probabilities must be exactly 1 before the first update; with dropout it is noise.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention layers hold theirs as plain numbers
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def torch_device(device: torch.device | str) -> torch.device:
    """The device of that name, once it is known to work.

    Raises:
        ValueError: If torch knows no such device or cannot use it here.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be 'auto' or one that torch can use here, got {str(device)!r}: {reason}"
        ) from error
    return found


def _check_same(lm: LanguageModel, tokenizer: Any, device: torch.device | str, dtype: torch.dtype | str) -> None:
    """Refuse arguments that a loaded model does not agree with: it is shared, so it is neither moved nor changed."""
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None and tokenizer is not lm.tokenizer and tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise ValueError(
            f"tokenizer must not be given with the LanguageModel {lm.name!r}, which has another one already"
        )
    if isinstance(device, torch.device) and (
        device.type != lm.device.type or device.index not in (None, lm.device.index)
    ):
        raise ValueError(f"device={str(device)!r}, but the LanguageModel {lm.name!r} is on {lm.device}; load it there")
    if dtype != "auto" and _torch_dtype(dtype, lm.device) != lm.dtype:
        raise ValueError(f"dtype={str(dtype)!r}, but the LanguageModel {lm.name!r} is in {lm.dtype}; load it in that")


def _torch_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    found = getattr(torch, dtype, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return found


@dataclass(frozen=True)
class Source:
    """Where files are loaded from: a directory, a .gguf file, or an id on the hub."""

    name: str
    path: Path | None = None
    local_files_only: bool = False  # an id on the hub that is downloaded already, while the hub is out of reach

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """What ``from_pretrained`` takes."""
        safe = {"trust_remote_code": False, "local_files_only": self.local_files_only}
        if self.path is None:
            return self.name, safe
        if self.path.suffix == ".gguf":
            return str(self.path.parent), safe | {"gguf_file": self.path.name}
        return str(self.path), safe


def find_source(argument: str, name: str) -> Source:
    """Finds a model or tokenizer; ``argument`` is what the caller called it. Raises ValueError when it is nowhere."""
    if name in PACKAGED_MODELS:
        return Source(name, PACKAGED_MODELS[name])
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return Source(name, path)
    if path.is_file():
        raise ValueError(f"{argument}={name!r} is a file: give the directory that holds it, or a .gguf file")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        kind = "file" if path.suffix == ".gguf" else "directory"
        raise ValueError(f"{argument}={name!r}: there is no such {kind} (the working directory is {Path.cwd()})")

    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    close = difflib.get_close_matches(name, PACKAGED_MODELS, n=1)
    known = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(map(repr, PACKAGED_MODELS))}"
    nowhere = f"{argument}={name!r} is no packaged model ({known}), no directory here, and"
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json") is not None
    except ValueError as error:
        raise ValueError(f"{nowhere} no id that the Hugging Face hub could have: {error}") from error
    # Without this probe transformers tries for most of a minute before it fails.
    forbidden = huggingface_hub.constants.HF_HUB_OFFLINE
    out_of_reach = forbidden or not is_reachable(endpoint)
    if out_of_reach and not cached:
        why = "HF_HUB_OFFLINE forbids to download it" if forbidden else f"{endpoint} cannot be reached"
        raise ValueError(
            f"{nowhere} as an id on the Hugging Face hub it is not in the local cache, while {why}. Give a directory "
            "that `save_pretrained` wrote, or load it once where there is a network."
        )
    return Source(name, None, out_of_reach)


def is_reachable(url: str) -> bool:
    """Whether a server answers within the timeout, through a proxy where one is set."""
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask():
        try:
            get_session().head(url, timeout=_HUB_TIMEOUT_S)
            answered.set()
        except Exception:  # noqa: BLE001, S110 - whichever way the connection fails
            pass
        finally:
            done.set()

    # In a thread, since looking up a host's name knows no timeout.
    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    done.wait(_HUB_TIMEOUT_S)
    return answered.is_set()


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """The bars that transformers draws for each file would break up our own."""
    enabled = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.logging.enable_progress_bar()


def _load_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    if source.path is not None and (base := base_of(source.path)) is not None:
        return merge_lora(_load_model(find_source("base model", base), dtype), source.path)
    where, arguments = source.arguments()
    is_gguf = "gguf_file" in arguments
    if source.path is not None and not is_gguf and not (source.path / "config.json").is_file():
        raise ValueError(f"model={source.name!r}: {source.path} holds no config.json, so it is no saved model")
    progress_bar = transformers.logging.is_progress_bar_enabled()
    if source.path is not None:  # only a download takes long enough for one
        transformers.logging.disable_progress_bar()
    try:
        if not is_gguf:
            model_type = transformers.PretrainedConfig.get_config_dict(where, **arguments)[0].get("model_type")
            if model_type in _REGISTERED_BY:
                importlib.import_module(_REGISTERED_BY[model_type])
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, **arguments, **({} if is_gguf else {"use_safetensors": True})
        )
    except Exception as error:
        raise ValueError(
            f"model={source.name!r} cannot be loaded as a causal language model with safetensors weights and without "
            f"code of its own: {error}"
        ) from error
    finally:
        if progress_bar:
            transformers.logging.enable_progress_bar()
    if is_gguf and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are dense now, and save_pretrained refuses while it is there
    return model


def _load_tokenizer(source: Source) -> Any:
    where, arguments = source.arguments()
    try:
        return AutoTokenizer.from_pretrained(where, **arguments)
    except Exception as error:
        raise ValueError(f"tokenizer: none can be loaded from {source.name!r}: {error}") from error


def _describe(model: PreTrainedModel, tokenizer: Any, name: str) -> LanguageModel:
    """Gathers the special tokens, ignoring ids that the model does not have, and refuses what does not fit."""
    size = vocab_size(model)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        raise ValueError(
            f"tokenizer does not fit the model {name!r}: it has the id {largest}, but the model's vocabulary is "
            f"{size} (ids 0 to {size - 1}). Use the tokenizer that the model was trained with."
        )

    def first(attribute: str) -> tuple[int, ...]:
        sources = (getattr(model, "generation_config", None), tokenizer, model.config)
        for source in sources:
            value = getattr(source, attribute, None)
            ids = value if isinstance(value, (list, tuple)) else [value]
            ids = tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < size))
            if ids:
                return ids
        return ()

    eos_token_ids = first("eos_token_id")
    # An empty list is a statement: all responses of this model go to the length limit.
    if not eos_token_ids and getattr(model.config, "eos_token_id", None) != []:
        raise ValueError(
            f"model {name!r} has no token that ends a text: set generation_config.eos_token_id of the model or "
            "eos_token of the tokenizer"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    bos = first("bos_token_id")
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        vocab_size=size,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad if pad is not None and 0 <= pad < size else (*eos_token_ids, 0)[0],
        bos_token_id=bos[0] if bos else None,
        max_context=max_context(model.config),
    )
