"""From records to token ids: what a model reads, and from which token on it learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_gym.data import Demonstration, Labelled, Preference, as_demonstrations, read_dataset
from rlhf_gym.data.formats import IMPLICIT_PREFERENCE
from rlhf_gym.data.split import prompt_key
from rlhf_gym.envs.prompts import PromptEncoder
from rlhf_gym.lm import LanguageModel


@dataclass(frozen=True)
class Example:
    """A sequence of tokens and what is learnt of it: all from ``num_context`` on."""

    ids: tuple[int, ...]
    """Prompt and response, or a piece of a text; at least 2 tokens."""
    num_context: int
    """Leading tokens that are read only; at least 1, since nothing predicts the first."""
    num_bytes: float
    """UTF-8 bytes of the text that the learnt tokens stand for."""

    @property
    def num_tokens(self) -> int:
        """Learnt tokens, EOS included."""
        return len(self.ids) - self.num_context


@dataclass(frozen=True)
class Texts:
    """Demonstrations, and how they were written."""

    records: list[Demonstration]
    templated: bool = False
    """A chat template has put the special tokens into the texts already."""
    implicit: bool = False
    """The prompts are what two responses begin with."""


def read_texts(source: Any, tokenizer: Any) -> Texts:
    """The responses to learn from.

    Args:
        source: A ``.txt`` file (one text); a JSONL file or rows of demonstrations, conversations, texts, preferences (the
            chosen response is learnt) or responses labelled true or false (the true ones are); or records of those.
        tokenizer: Its chat template turns conversations into texts.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a row has a problem or is no such thing.
        ValueError: If nothing is left to learn, a text file is not UTF-8, or the tokenizer has no chat template for
            conversations.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix == ".txt":
        return Texts([Demonstration("", _read_text(Path(source).expanduser()))])
    if not isinstance(source, (str, Path, Mapping)) and isinstance(source, Iterable):
        source = list(source)
        if source and all(isinstance(record, (Demonstration, Preference, Labelled)) for record in source):
            return Texts(_not_empty(as_demonstrations(source)))
    data = read_dataset(source, tokenizer)
    data.problems.raise_if_any()
    try:
        records = as_demonstrations(data.records)
    except TypeError:
        raise ValueError(
            f"{data.problems.file} is {data.format}, which does not say what to write; demonstrations, texts, preferences "
            "or true/false labels are needed"
        ) from None
    if data.format.conversational and tokenizer is None:
        raise ValueError(f"{data.problems.file} holds conversations: give a tokenizer with a chat template")
    return Texts(_not_empty(records), data.format.conversational, data.format.name == IMPLICIT_PREFERENCE)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; a text to learn from is needed")
    return text


def _not_empty(records: list[Demonstration]) -> list[Demonstration]:
    if not records:
        raise ValueError("data holds no response to learn from: all are ties or labelled false")
    return records


def hold_out(texts: Texts, share: float, seed: int) -> tuple[Texts, Texts]:
    """Divides the prompts into those to learn from and those to measure with: no prompt is in both.

    Of a single text the end is held out.

    Args:
        texts: What there is.
        share: Of the prompts, in (0, 1); at least one is held out and one is kept.
        seed: Another seed holds out others.

    Raises:
        ValueError: If there is a single prompt and it is not empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"eval_share must be in (0, 1), or 0 for nothing held out, got {share!r}")
    keys = [prompt_key(record, implicit=texts.implicit) for record in texts.records]
    prompts = sorted(set(keys))
    if len(prompts) > 1:
        number = min(len(prompts) - 1, max(1, round(share * len(prompts))))
        held = {prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:number]}
        parts = (
            [r for r, key in zip(texts.records, keys, strict=True) if (key in held) == is_held] for is_held in (0, 1)
        )
    else:
        record = texts.records[0]
        cut = round((1 - share) * len(record.completion))
        if record.prompt or len(texts.records) > 1 or not 0 < cut < len(record.completion):
            raise ValueError(
                "eval_share: all data have one prompt, of which nothing can be held out; give eval_data, or 0"
            )
        parts = ([Demonstration("", part)] for part in (record.completion[:cut], record.completion[cut:]))
    kept, held_out = (Texts(part, texts.templated, texts.implicit) for part in parts)
    return kept, held_out


def make_examples(
    texts: Texts, lm: LanguageModel, *, max_tokens: int, truncate: str | None = None
) -> tuple[list[Example], int]:
    """Token ids of demonstrations.

    A text without a prompt that is too long becomes several pieces. Each but the first begins with the last token of the
    one before, so that every token is learnt once.

    Args:
        texts: The demonstrations.
        lm: The model and its tokenizer.
        max_tokens: Most tokens that the model reads of an example (the last one is predicted and not read).
        truncate: What happens to longer responses to a prompt: "right" cuts them, and drops those of which nothing would be
            learnt; None refuses them.

    Returns:
        The examples, and how many demonstrations were cut or dropped.

    Raises:
        ValueError: If an example is too long and not to be cut, or nothing is left.
    """
    if truncate not in (None, "right"):
        raise ValueError(f'truncate must be None or "right", got {truncate!r}')
    encoder = PromptEncoder(lm.tokenizer, lm.vocab_size, lm.eos_token_ids, lm.bos_token_id, truncate=None)
    examples: list[Example] = []
    num_cut = 0
    for i, record in enumerate(texts.records):
        ids, num_context = _encode(record, lm, encoder, texts.templated)
        num_bytes = len(record.completion.encode())
        if len(ids) - 1 <= max_tokens:
            examples += _example(ids, num_context, num_bytes)
        elif not record.prompt:
            starts = [*range(0, len(ids) - 1, max_tokens), len(ids) - 1]
            for begin, end in pairwise(starts):
                context = num_context if begin == 0 else 1
                share = (end + 1 - begin - context) / (len(ids) - num_context)
                examples += _example(ids[begin : end + 1], context, num_bytes * share)
        elif truncate is None:
            raise ValueError(
                f"data: example {i + 1} has {len(ids)} tokens with its prompt, more than max_tokens={max_tokens}: "
                f'{record.prompt[:60]!r}; raise the limit (the model\'s context permitting) or set truncate="right"'
            )
        else:
            num_cut += 1
            share = max(0, max_tokens + 1 - num_context) / (len(ids) - num_context)
            examples += _example(ids[: max_tokens + 1], num_context, num_bytes * share)
    if not examples:
        raise ValueError(f"data: nothing is left to learn within max_tokens={max_tokens}; raise the limit")
    return examples, num_cut


def _example(ids: Sequence[int], num_context: int, num_bytes: float) -> list[Example]:
    return [Example(tuple(ids), num_context, num_bytes)] if len(ids) > num_context else []


def _encode(record: Demonstration, lm: LanguageModel, encoder: PromptEncoder, templated: bool) -> tuple[list[int], int]:
    """Ids of prompt and response, and how many of them are the prompt's: those with which a policy would be asked."""
    tokenizer = lm.tokenizer
    special = not templated
    if templated:
        prompt = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
    elif record.prompt or lm.bos_token_id is not None:
        prompt = encoder.encode({"prompt": record.prompt}, None, "data").ids.tolist()
    else:
        prompt = []
    whole = tokenizer(record.prompt + record.completion, add_special_tokens=special)["input_ids"]
    # Usually the whole text begins with the prompt's tokens. Where the two merge at the seam ("sun" + "ny"), the prompt is
    # as it will be when it is asked, and the response is encoded by itself.
    fits = whole[: len(prompt)] == prompt
    response = _with_eos(whole[len(prompt) :] if fits else _continuation(tokenizer, record.completion), lm)
    ids = [*prompt, *response]
    if max(ids, default=0) >= lm.vocab_size:
        raise ValueError(
            f"data: token id {max(ids)} is outside the model's vocabulary of {lm.vocab_size}; use the model's own tokenizer"
        )
    return ids, max(1, len(prompt))


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on with another: many tokenizers put a space before what they take for a beginning."""
    before, joined = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("\n", "\n" + text))
    if joined[: len(before)] == before:
        return joined[len(before) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_eos(response: list[int], lm: LanguageModel) -> list[int]:
    """The response up to the EOS that it ends with, or with one put after it; a template's line break after it goes."""
    if not lm.eos_token_ids:
        return response
    last = max((i for i, token in enumerate(response) if token in lm.eos_token_ids), default=None)
    if last is not None and not lm.tokenizer.decode(response[last + 1 :], skip_special_tokens=True).strip():
        return response[: last + 1]
    return [*response, lm.eos_token_ids[0]]
