"""The network of a reward model: any causal or encoder model with one linear head for a whole text."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, logging

from rlhf_gym.lm import LanguageModel, disable_dropout, load_language_model, load_tokenizer
from rlhf_gym.lm.load import find_source, torch_device
from rlhf_gym.rewards.sequences import batches_by_length, last_token_outputs

from .config import RewardModelConfig


def load_network(
    model: Any,
    tokenizer: Any = None,
    *,
    names: Sequence[str],
    config: RewardModelConfig,
    device: torch.device | str = "auto",
) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier with these outputs, and its tokenizer. Always a new model: what is passed stays as it is.

    A language model gives its trunk, and a head is made; a sequence classifier with as many outputs keeps its head, and
    training goes on from it.

    Args:
        model: Packaged name, directory, hub id, ``.gguf`` file, ``LanguageModel`` or ``PreTrainedModel``.
        tokenizer: Its tokenizer, or where to load one; None takes the one beside the model.
        names: The outputs.
        config: ``from_scratch``, ``num_layers``, ``dropout`` and ``max_tokens`` are read.
        device: "auto" is CUDA where there is one.

    Raises:
        ValueError: If there is no such model, it has no form with a head for texts, or no tokenizer.
    """
    if isinstance(model, LanguageModel):
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        place = getattr(model.config, "_name_or_path", "") if isinstance(model, PreTrainedModel) else str(model)
        if not place:
            raise ValueError("tokenizer must be given with a model object that was not loaded from a directory")
        tokenizer = load_tokenizer(place)
    elif isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    network = _from_object(model, len(names)) if isinstance(model, PreTrainedModel) else _from_files(model, len(names))
    if config.from_scratch:
        network = _new(network.config)
    if config.num_layers is not None:
        _keep_layers(network, config.num_layers)
    if not config.dropout:
        disable_dropout(network)
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: i for i, name in enumerate(names)}
    text_config = network.config.get_text_config()
    if text_config.pad_token_id is None:  # without one transformers refuses batches
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        text_config.pad_token_id = next(token for token in known if token is not None)
    if max(tokenizer.get_vocab().values(), default=-1) >= network.get_input_embeddings().weight.shape[0]:
        raise ValueError(f"the tokenizer does not fit the model {model}: it has more tokens; use the model's own")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return network.float().to(torch_device(device)), copy.deepcopy(tokenizer)


def _from_object(model: PreTrainedModel, num_outputs: int) -> PreTrainedModel:
    if model.get_output_embeddings() is None and getattr(model.config, "num_labels", None) == num_outputs:
        return copy.deepcopy(model).requires_grad_(True)
    network = _new(_with_outputs(copy.deepcopy(model.config), num_outputs))
    with torch.no_grad():
        missing = network.base_model.load_state_dict(model.base_model.state_dict(), strict=False).missing_keys
    assert all("pooler" in name for name in missing), "the same trunk; an encoder's pooler belongs to the head"
    return network


def _from_files(model: Any, num_outputs: int) -> PreTrainedModel:
    source = find_source("model", str(model))
    place, arguments = source.arguments()
    if "gguf_file" in arguments:
        return _from_object(load_language_model(str(model), device="cpu", dtype="float32").model, num_outputs)
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if source.path is not None:  # only a download takes long enough for one
        logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it reports of the missing head is told apart below
    try:
        config = _with_outputs(AutoConfig.from_pretrained(place, **arguments), num_outputs)
        network, info = AutoModelForSequenceClassification.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:
        raise ValueError(
            f"model={str(model)!r} cannot be loaded with a head for texts, from safetensors and without code of its "
            f"own: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
    trunk = f"{network.base_model_prefix}."
    missing = [name for name in info["missing_keys"] if name.startswith(trunk) and "pooler" not in name]
    if missing:
        raise ValueError(f"model={str(model)!r} has no weights {', '.join(sorted(missing)[:3])}; is it a whole model?")
    if info["missing_keys"] or info["mismatched_keys"]:
        network.rlhf_gym_new_head = True
    return network


def _with_outputs(config: Any, num_outputs: int) -> Any:
    config.num_labels = num_outputs
    config.problem_type = None
    return config


def _new(config: Any) -> PreTrainedModel:
    try:
        network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(f"a {config.model_type} model has no form with a head for texts: {error}") from error
    network.rlhf_gym_new_head = True
    return network


def blocks_of(network: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the trunk, from the lowest to the highest.

    Raises:
        ValueError: If it is not clear which they are.
    """
    num = network.config.get_text_config().num_hidden_layers
    found = [
        module for module in network.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) == num
    ]
    if not found:
        raise ValueError(f"{type(network).__name__} has no list of {num} blocks; leave train_layers and num_layers out")
    return found[0]


def _keep_layers(network: PreTrainedModel, num_layers: int) -> None:
    blocks, config = blocks_of(network), network.config.get_text_config()
    if num_layers > len(blocks):
        raise ValueError(f"num_layers must be at most the model's {len(blocks)}, got {num_layers}")
    del blocks[num_layers:]
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def head_of(network: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that gives the outputs."""
    trunk = f"{network.base_model_prefix}."
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [(name, module) for name, module in linear if not name.startswith(trunk)][-1]


@torch.no_grad()
def init_head(network: PreTrainedModel, generator: torch.Generator) -> None:
    """Gives a new head weights of standard deviation 1 / sqrt(d + 1), d the width of the trunk, and no bias.

    Its outputs then have a spread of about 1 on normalised features. A head that came with the model stays.

    Source:
        Stiennon et al. 2020, "Learning to summarize with human feedback", appendix.
    """
    if not getattr(network, "rlhf_gym_new_head", False):
        return
    head = head_of(network)[1]
    noise = torch.randn(head.weight.shape, generator=generator)
    head.weight.copy_(noise / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        head.bias.zero_()


def freeze(network: PreTrainedModel, train_layers: int | None) -> list[nn.Parameter]:
    """Stops the gradients of all but the upper ``train_layers`` blocks, what comes after them, and the head.

    Returns:
        The parameters that are trained; all of the model for None.
    """
    if train_layers is None:
        return list(network.requires_grad_(True).parameters())
    blocks = blocks_of(network)
    if train_layers > len(blocks):
        raise ValueError(f"train_layers must be at most the model's {len(blocks)}, got {train_layers}")
    names = [name for name, _ in network.base_model.named_parameters()]
    owner = {parameter: i for i, block in enumerate(blocks) for parameter in block.parameters()}
    parameters = dict(network.base_model.named_parameters())
    last = max(i for i, name in enumerate(names) if parameters[name] in owner)
    for i, name in enumerate(names):
        lowest = len(blocks) - train_layers
        parameters[name].requires_grad_(train_layers > 0 and (i > last or owner.get(parameters[name], -1) >= lowest))
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def without_head(network: PreTrainedModel) -> Iterator[None]:
    """While the block runs, the network answers with what its head would read."""
    name, head = head_of(network)
    parent, _, attribute = name.rpartition(".")
    owner = network.get_submodule(parent) if parent else network
    setattr(owner, attribute, nn.Identity())
    try:
        yield
    finally:
        setattr(owner, attribute, head)


@torch.no_grad()
def outputs_of(network: PreTrainedModel, rows: Sequence[list[int]], types: Any = None, progress: Any = None) -> Tensor:
    """The network's outputs for each row, on the CPU. Shape (N, C), float32.

    Args:
        network: In eval mode after this.
        rows: Token ids of N texts.
        types: Their token types, or None.
        progress: Called with the number of texts after each batch.
    """
    network.eval()
    found: Tensor | None = None
    for batch in batches_by_length([len(ids) for ids in rows]):
        of_batch = None if types is None else [types[row] for row in batch]
        outputs = last_token_outputs(network, [rows[row] for row in batch], of_batch).float().cpu()
        found = torch.empty(len(rows), outputs.shape[1]) if found is None else found
        found[batch] = outputs
        if progress is not None:
            progress(len(batch))
    return found
