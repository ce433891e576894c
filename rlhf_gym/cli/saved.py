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

    Two agents act otherwise than their ``from_pretrained`` directory: best-of-N chooses among the model's responses, and
    NLPO's mask forbids some of its tokens. Loaded as a language model alone they would be measured as another policy,
    without a word.

    Args:
        options: Whose ``model``, ``temperature``, ``top_k``, ``top_p``, ``device`` and ``dtype`` count.
        lm: The language model of ``options.model``.

    Raises:
        ValueError: If there is an NLPO agent, and a top-k or top-p that it was not trained with.
    """
    folder = Path(model_source(options.model)).expanduser()
    if not (folder / "trainer_state.json").is_file():
        return lm.model
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if state["agent"] == "BestOfN":
        return BestOf(lm.model, state["config"]["num_candidates"])
    if state["agent"] != "NLPO":
        return lm.model
    if options.top_k is not None or options.top_p is not None:
        raise ValueError(
            f"--top-k and --top-p are taken on the reference, and {options.model} holds an NLPO agent, which has a mask "
            "of its own; leave them out"
        )
    from rlhf_gym.agents.nlpo import MaskedLM

    mask = load_language_model(str(folder / "mask"), lm.tokenizer, device=options.device, dtype=options.dtype)
    config = state["config"]
    token_filter = TokenFilter(options.temperature, top_k=config["mask_top_k"], top_p=config["mask_top_p"])
    return MaskedLM(lm.model, mask.model, token_filter)
