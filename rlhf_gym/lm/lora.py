"""LoRA: small matrices beside the layers of a frozen model are trained in place of the layers, by the library peft.

The adapter is put *into* the model, which stays the ``PreTrainedModel`` that it was: with the adapter on it is the new
model, with the adapter off the old one. peft takes seconds to import, so nothing here does before it is needed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's own name of the first adapter


def add_lora(model: PreTrainedModel, rank: int, *, base: str, seed: int = 0) -> PreTrainedModel:
    """Freezes a model and puts a new adapter into all of its linear layers but the LM head, in place.

    At the start it changes nothing: one of the two matrices is 0. What it adds is scaled by 2 (``alpha`` is twice the rank),
    and there is no dropout.

    Args:
        model: A causal language model.
        rank: Of the matrices, at least 1.
        base: What the model was loaded as, a name or a directory; written beside the adapter.
        seed: Of the other matrix.

    Returns:
        The same model; only the adapter's parameters require a gradient.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the rank is below 1, there is an adapter already, or no layer that can have one (an LSTM).

    Source:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """
    if rank < 1:
        raise ValueError(f"lora must be a rank of at least 1, got {rank}")
    if has_lora(model):
        raise ValueError("lora: the model has an adapter already; merge it first, or train that one")
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # what the two libraries owe each other, and how GPT-2's layers hold their weights
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, _NAME)
        except ValueError as error:
            raise ValueError(
                f"lora: {type(model).__name__} has no linear layers that an adapter can be put into ({error}); train the "
                "whole model"
            ) from error
    directory = Path(base).expanduser()
    config = model.peft_config[_NAME]
    config.base_model_name_or_path = str(directory.resolve()) if directory.is_dir() else base
    config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    return model


def adapted_copy(model: PreTrainedModel, rank: int, *, base: str, seed: int = 0) -> PreTrainedModel:
    """A model with a new adapter that shares all of its weights with ``model``, which stays as it is.

    The two together are one set of weights and one adapter: a policy, and the reference that it is without its adapter.

    Args:
        model: A causal language model.
        rank, base, seed: As in `add_lora`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return add_lora(copy.deepcopy(model, shared), rank, base=base, seed=seed)


def has_lora(model: PreTrainedModel) -> bool:
    """Whether there is an adapter in a model."""
    return getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def lora_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is what it was before `add_lora`."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def save_lora(model: PreTrainedModel, directory: Path) -> None:
    """Write the adapter alone, as peft does it (whose own way asks the hub about the base model)."""
    model.peft_config[_NAME].save_pretrained(directory)
    weights = {name: parameter.detach().contiguous() for name, parameter in _weights(model).items()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_lora(model: PreTrainedModel, directory: Path) -> None:
    """Replaces the weights of a model's adapter by saved ones, to the bit.

    Raises:
        ValueError: If they are those of another adapter.
    """
    own, saved = _weights(model), load_file(directory / WEIGHTS)
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise ValueError(f"{directory} holds an adapter of another model or rank")
    for name, parameter in own.items():
        parameter.copy_(saved[name])


def _weights(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under the names that they have in files."""
    return {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if f".{_NAME}." in name
    }


def base_fingerprint(model: PreTrainedModel) -> str:
    """Tells a base model from others, by some of each weight's numbers: an adapter means nothing on another one."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        if f".{_NAME}." not in name:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def base_of(directory: Path) -> str | None:
    """What the model of an adapter's directory is called; None where the directory is none of an adapter."""
    if (directory / "config.json").is_file() or not (directory / CONFIG).is_file():
        return None
    return json.loads((directory / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


def merge_lora(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The plain model that a base model and a saved adapter make: ``W + 2 B A`` in each layer. The base is changed in place.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If there are no safetensors weights.
    """
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"{directory} holds no {WEIGHTS}; only safetensors weights are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _peft().PeftModel.from_pretrained(base, directory, use_safetensors=True).merge_and_unload()


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs the package peft: pip install "rlhf-gym[lora]"') from error
    return peft
