"""What ``reset(options=...)`` may hold, checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf_gym.envs.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from rlhf_gym.envs.core import TextGenerationProcess

OPTION_NAMES = ("prompts", "prompt_index", "reset_mask")


@dataclass(frozen=True)
class ResetOptions:
    """Which rows start anew, and with what.

    Attributes:
        rows: True for each row that is reset. N entries.
        prompts: N prompts (those of rows that are not reset are ignored), or None for the rows' own order.
    """

    rows: Sequence[bool]
    prompts: Sequence[Prompt] | None = None


def parse_options(process: TextGenerationProcess, options: Mapping[str, Any] | None) -> ResetOptions:
    """Check and resolve reset options; neither the options nor the process are changed.

    Raises:
        ValueError: For an unknown option, a wrong length, an index out of range, a prompt that breaks a rule, or a mask
            without a True.
    """
    options, n = options or {}, process.num_rows
    unknown = set(options) - set(OPTION_NAMES)
    if unknown:
        raise ValueError(
            f"reset options must be among {', '.join(map(repr, OPTION_NAMES))}, got {sorted(unknown)[0]!r}"
        )
    if options.get("prompts") is not None and options.get("prompt_index") is not None:
        raise ValueError("reset options: give prompts or prompt_index, not both")
    rows = _rows(options.get("reset_mask"), n)
    if options.get("prompt_index") is not None:
        return ResetOptions(rows, _by_index(process, options["prompt_index"], n))
    if options.get("prompts") is not None:
        given = options["prompts"]
        given = [given] * n if isinstance(given, (str, Mapping)) else list(given)
        if len(given) != n:
            raise ValueError(f"options['prompts'] must have one prompt per row: {n}, got {len(given)}")
        prompts = [
            process.encoder.encode(row, process.max_prompt_tokens, f"options['prompts'][{i}]")
            for i, row in enumerate(read_prompts(given))
        ]
        process.scorer.check_columns(prompts, "options['prompts']")
        return ResetOptions(rows, prompts)
    return ResetOptions(rows)


def _rows(mask: Any, n: int) -> list[bool]:
    if mask is None:
        return [True] * n
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or tuple(mask.shape) != (n,):
        raise ValueError(
            f"options['reset_mask'] must be a bool array of shape ({n},), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if not bool(mask.any()):
        raise ValueError("options['reset_mask'] must have at least one True")
    return mask.tolist()


def _by_index(process: TextGenerationProcess, index: Any, n: int) -> list[Prompt]:
    indices = torch.as_tensor(index)
    if indices.is_floating_point() or indices.dtype == torch.bool or tuple(indices.shape) not in {(), (n,)}:
        raise ValueError(f"options['prompt_index'] must be an integer or {n} integers, got {index!r}")
    indices = indices.expand(n).tolist()
    for i in indices:
        if not 0 <= i < len(process.prompts):
            raise ValueError(f"options['prompt_index'] must be in [0, {len(process.prompts)}), got {i}")
    return [process.prompts[i] for i in indices]
