"""What a saved agent acts by, where that is more than the language model that it has saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_gym.cli.options import Evaluate, Generate
from rlhf_gym.cli.setup import model_source
from rlhf_gym.lm import LanguageModel, TokenFilter, load_language_model


@dataclass(frozen=True)
class BestOf:
    """Best-of-N, as `rlhf_gym.evaluation.evaluate` takes it: where candidates come from, and how many to choose from."""

    policy_model: Any
    num_candidates: int


def acting_policy(options: Evaluate | Generate, lm: LanguageModel) -> Any:
    """The policy of ``--model``: the language model itself, or what a saved agent makes of it.

    Three agents act otherwise than their ``from_pretrained`` directory: best-of-N chooses among the model's responses, and
    a mask of NLPO, or of MaskablePPO with ``top_k``, forbids some of its tokens. Loaded as a language model alone they
    would be measured as another policy, without a word.

    Args:
        options: Whose ``model``, ``temperature``, ``top_k``, ``top_p``, ``device`` and ``dtype`` count.
        lm: The language model of ``options.model``.

    Raises:
        ValueError: If the agent has a mask and there is a top-k or top-p besides, or its mask cannot be found.
    """
    folder = Path(model_source(options.model)).expanduser()
    if not (folder / "trainer_state.json").is_file():
        return lm.model
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    agent, config = state.get("agent"), state.get("config", {})  # transformers' Trainer has a file of this name too
    source: str | None
    if agent == "BestOfN":
        return BestOf(lm.model, config["num_candidates"])
    if agent == "NLPO":
        source, top_k, top_p = str(folder / "mask"), config["mask_top_k"], config["mask_top_p"]
    elif agent == "MaskablePPO" and config.get("top_k") is not None:
        source, top_k, top_p = own_reference(options.model), config["top_k"], None
    else:
        return lm.model
    if options.top_k is not None or options.top_p is not None:
        raise ValueError(
            f"--model {options.model} holds an agent with a mask of its own; leave --top-k and --top-p out"
        )
    if source is None:
        raise ValueError(
            f"--model {options.model} holds an agent whose mask is taken on its reference; give the directory of its run"
        )
    from rlhf_gym.agents.nlpo import MaskedLM

    mask = load_language_model(model_source(source), lm.tokenizer, device=options.device, dtype=options.dtype)
    return MaskedLM(lm.model, mask.model, TokenFilter(options.temperature, top_k=top_k, top_p=top_p))


def own_reference(model: str) -> str | None:
    """What a run directory's model was trained from, None when it is no run."""
    config = Path(model).expanduser() / "config.json"
    if model_source(model) == model or not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8")).get("options", {}).get("model")
