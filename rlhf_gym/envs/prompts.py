"""Prompts: where they come from, their tokens and columns, and the order in which a row visits them."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGED_PROMPTS = {"tiny-reviews": "train", "tiny-reviews/train": "train", "tiny-reviews/test": "test"}


@dataclass(frozen=True)
class Prompt:
    """One prompt as the environment uses it.

    Attributes:
        text: The prompt as the user wrote it; this is what reaches the reward.
        ids: Its tokens. Shape (p,), int64, on the CPU, 1 <= p <= max_prompt_tokens.
        columns: Extra columns of its row, passed by name to rewards that ask for them.
        index: Position in the prompt set, -1 for a prompt given to ``reset``.
    """

    text: str
    ids: torch.Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)
    index: int = -1


def read_prompts(source: Any) -> list[dict[str, Any]]:
    """Rows ``{"prompt": str, **columns}`` from any accepted source, in order.

    Args:
        source: None (one empty prompt), a list of strings or of dicts with a "prompt" key, the path of a ``.jsonl``
            file of such dicts, a ``datasets.Dataset`` with a "prompt" column, or a packaged name such as
            ``"tiny-reviews"``.

    Raises:
        ValueError: If the source is empty, a row has no "prompt" string, or a JSONL line is broken (the error says
            which).
        FileNotFoundError: If it looks like a path and there is no such file.
    """
    if source is None:
        return [{"prompt": ""}]
    if isinstance(source, (str, Path)):
        rows = _read_named(source)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        rows = list(source)
    else:
        raise TypeError(
            "prompts must be a list of strings or dicts, a .jsonl path, a datasets.Dataset or a packaged name, "
            f"got {type(source).__name__}"
        )
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    return [_as_row(row, f"prompts[{i}]") for i, row in enumerate(rows)]


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        shown = {k: type(v).__name__ for k, v in row.items()} if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f'{where} must be a string or a dict with a string "prompt", got {shown}')
    return dict(row)


def _read_named(source: str | Path) -> list[dict[str, Any]]:
    if str(source) in PACKAGED_PROMPTS:
        from rlhf_gym.tasks.tiny_reviews import load_prompts

        return load_prompts(PACKAGED_PROMPTS[str(source)])
    path = Path(source).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(str(source), PACKAGED_PROMPTS, n=1)
        hint = (
            f"; did you mean the packaged {near[0]!r}?" if near else f"; packaged names: {', '.join(PACKAGED_PROMPTS)}"
        )
        raise FileNotFoundError(f"prompts: there is no file {str(source)!r}{hint}")
    rows = []
    # utf-8-sig drops the byte-order mark that Windows editors write; without it line 1 would not be JSON.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = text.split("\n")  # not splitlines(): JSON strings may hold U+2028 and its kin as they are
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {path}, line {number}, column {error.colno}: not JSON ({error.msg})") from None
        rows.append(_as_row(row, f"prompts: {path}, line {number}"))
    return rows


class PromptEncoder:
    """Turns prompt texts into token ids under the environment's rules.

    Args:
        tokenizer: A Hugging Face tokenizer.
        vocab_size: V of the model; ids must be below it.
        eos_token_ids: An EOS that the tokenizer appends by itself is dropped: the response has not ended before it
            begins.
        bos_token_id: Stands for the empty prompt. One that the tokenizer puts before a text which begins with it, as a
            chat template's does, is dropped: no model was trained on two.
        truncate: None (a long prompt is an error) or "left" (keep BOS and the last tokens).
    """

    def __init__(
        self, tokenizer, vocab_size: int, eos_token_ids: Sequence[int], bos_token_id: int | None, truncate: str | None
    ):
        if truncate not in (None, "left"):
            raise ValueError(f'truncate_prompts must be None or "left", got {truncate!r}')
        self.tokenizer, self.vocab_size, self.truncate = tokenizer, vocab_size, truncate
        self.eos_token_ids, self.bos_token_id = tuple(eos_token_ids), bos_token_id

    def encode(self, row: Mapping[str, Any], max_tokens: int | None, where: str, index: int = -1) -> Prompt:
        """The prompt of one row.

        Raises:
            ValueError: If it is longer than ``max_tokens`` (and not truncated), or empty and there is no BOS.
        """
        text = row["prompt"]
        ids = list(self.tokenizer(text)["input_ids"])
        if ids and ids[-1] in self.eos_token_ids and ids[-1] != self.bos_token_id:
            plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not plain or plain[-1] != ids[-1]:
                ids.pop()
        if len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id:
            plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids[1 : len(plain) + 1] == plain:
                del ids[0]
        if not ids:
            if self.bos_token_id is None:
                raise ValueError(
                    f"{where} is empty and the tokenizer has no BOS token to begin from; give it at least one token "
                    "of text"
                )
            ids = [self.bos_token_id]
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"{where}: token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}; use the "
                "model's own tokenizer"
            )
        if max_tokens is not None and len(ids) > max_tokens:
            if self.truncate is None:
                raise ValueError(
                    f"{where} has {len(ids)} tokens, more than max_prompt_tokens={max_tokens}: {text[:60]!r}; raise "
                    'the limit or set truncate_prompts="left"'
                )
            has_bos = max_tokens > 1 and ids[0] == self.bos_token_id
            ids = [ids[0], *ids[len(ids) - max_tokens + 1 :]] if has_bos else ids[-max_tokens:]
        columns = {key: value for key, value in row.items() if key != "prompt"}
        return Prompt(text, torch.tensor(ids, dtype=torch.long), columns, index)


class PromptOrder:
    """The order in which one row visits the prompts: a fresh shuffle of all of them, again and again.

    It depends on the row's seed alone, so every algorithm sees the same prompts (and a batch the same as N scalar
    environments).

    Args:
        num_prompts: Size of the prompt set.
        np_random: The row's generator.
    """

    def __init__(self, num_prompts: int, np_random: np.random.Generator):
        self.num_prompts, self.np_random = num_prompts, np_random
        self._shuffle()

    def _shuffle(self) -> None:
        self._before = self.np_random.bit_generator.state  # enough to draw this shuffle again: see state_dict
        self._order, self._cursor = self.np_random.permutation(self.num_prompts), 0

    def next(self) -> int:
        """Index of the next prompt."""
        if self._cursor == self.num_prompts:
            self._shuffle()
        self._cursor += 1
        return int(self._order[self._cursor - 1])

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; small, since the shuffle is redrawn and not stored."""
        return {"np_random": self._before, "cursor": self._cursor, "num_prompts": self.num_prompts}

    def __deepcopy__(self, memo: dict) -> PromptOrder:
        """A copy that goes its own way; the shuffle itself is never changed in place and is shared."""
        other = copy.copy(self)
        other.np_random = copy.deepcopy(self.np_random, memo)
        return other

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken.

        Raises:
            ValueError: If it was taken with another number of prompts.
        """
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"the saved order is one of {state['num_prompts']} prompts, this environment has {self.num_prompts}"
            )
        self.np_random.bit_generator.state = state["np_random"]
        self._shuffle()
        self._cursor = int(state["cursor"])
