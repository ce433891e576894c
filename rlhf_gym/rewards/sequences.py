"""What a sequence classifier is given, and how it answers: shared by the reward that reads one and by its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

READS = ("prompt+response", "response", "pair")
MAX_BATCH_TOKENS = 16_384  # padding included: what a batch needs of memory does not grow with the number of texts


def join_texts(prompt: str, response: str, join: str) -> str:
    """Prompt and response as one text, with ``join`` between them where neither side has white space there.

    Example:
        >>> join_texts("the lever", "is strong", " "), join_texts("the lever", " is strong", " ")
        ('the lever is strong', 'the lever is strong')
    """
    seam = prompt and response and not (prompt[-1].isspace() or response[0].isspace())
    return prompt + (join if seam else "") + response


def encode_texts(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    reads: str,
    join: str = "",
    max_tokens: int | None = None,
    truncation: str = "left",
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of each row, unpadded and at least one, and the token types of pairs.

    Args:
        tokenizer: The classifier's, with its truncation side set.
        prompts: B texts.
        responses: B texts.
        reads: One of `READS`.
        join: What goes between prompt and response, see `join_texts`.
        max_tokens: Longest row, special tokens included; None has no limit.
        truncation: "left", "right", or "error".

    Raises:
        ValueError: If a row is longer than ``max_tokens`` and nothing may be cut.
    """
    options: dict[str, Any] = {"truncation": False}
    if max_tokens is not None and truncation != "error":
        options = {"truncation": True, "max_length": max_tokens}
    if reads == "pair":
        encoded = tokenizer(list(prompts), list(responses), return_token_type_ids=True, **options)
    else:
        pairs = zip(prompts, responses, strict=True)
        texts = list(responses) if reads == "response" else [join_texts(p, r, join) for p, r in pairs]
        bos = tokenizer.bos_token
        if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            texts = [
                text.removeprefix(bos) for text in texts
            ]  # a chat template writes it, and the tokenizer would again
        encoded = tokenizer(texts, **options)
    rows = [list(ids) or [_filler(tokenizer)] for ids in encoded["input_ids"]]
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    if max_tokens is not None and len(rows[longest]) > max_tokens:
        raise ValueError(
            f"the text of row {longest} has {len(rows[longest])} tokens, more than the {max_tokens} that the "
            'classifier reads; truncation="left" or "right" would cut it'
        )
    return rows, encoded["token_type_ids"] if reads == "pair" else None


def _filler(tokenizer: Any) -> int:
    """A token for a text without any: the model must read something."""
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(token for token in candidates if token is not None)


def last_token_outputs(model: Any, rows: Sequence[list[int]], types: Sequence[list[int]] | None = None) -> torch.Tensor:
    """What the model's head says of each row, in one forward of a batch padded on the right. Shape (B, outputs).

    Args:
        model: A sequence classifier of transformers; decoders answer at the last real token.
        rows: Token ids of B texts.
        types: Their token types; used where the model tells them apart. GPT-2 takes them too, and would add the
            embedding of token 0 to every position.
    """
    import torch

    # Decoders read their answer at the last token that is not config.pad_token_id, whatever the tokenizer pads with. So
    # pad with exactly that; without one they refuse batches, and any token that no row ends with then serves for the
    # length of this call.
    config = model.config.get_text_config()
    known = config.pad_token_id
    last = {ids[-1] for ids in rows}
    pad = known if known is not None else next(token for token in range(len(last) + 1) if token not in last)
    device = next(model.parameters()).device
    length = max(map(len, rows))

    def padded(values: Iterable[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (length - len(row))] for row in values], device=device)

    inputs = {"input_ids": padded(rows, pad), "attention_mask": padded([[1] * len(ids) for ids in rows], 0)}
    if types is not None and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = padded(types, 0)
    config.pad_token_id = pad
    try:
        return model(**inputs).logits
    finally:
        config.pad_token_id = known


def batches_by_length(lengths: Sequence[int], max_tokens: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Rows in batches of similar lengths: at most ``max_tokens`` tokens each with the padding, at least one row."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
