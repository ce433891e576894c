"""Conversations: lists of messages with a role and a content, and how they become texts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from .locate import Path

RESPONSES = ("completion", "chosen", "rejected")


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages; like TRL's ``is_conversational`` it looks at the first one only."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def message_problems(messages: list[Any], path: Path) -> list[tuple[Path, str]]:
    """What is wrong with a conversation, and where.

    Args:
        messages: A list for which `is_conversation` is true.
        path: Where it stands in the row.
    """
    found: list[tuple[Path, str]] = []
    for i, message in enumerate(messages):
        where = (*path, i)
        if not isinstance(message, Mapping):
            found.append((where, 'a message must be an object with a "role" and a "content"'))
        elif not isinstance(message.get("role"), str) or not message["role"]:
            found.append(((*where, "role"), 'the "role" of a message must be a text such as "user" or "assistant"'))
        elif isinstance(message.get("content"), list):
            found.append(((*where, "content"), "a content in parts (images) is not read; make it one text"))
        elif not isinstance(message.get("content"), str):
            # A message that calls a tool has no content.
            if message.get("content") is not None or not message.get("tool_calls"):
                found.append(((*where, "content"), 'the "content" of a message must be a text'))
    return found


def plain(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of conversations as texts without any template: a line for each message, ``role: content``.

    For counting words and for comparing texts. A model would not know where its turn begins: use `templated` for it.
    """
    return {
        "text" if name == "messages" else name: "\n".join(
            f"{message['role']}: {message.get('content') or json.dumps(message.get('tool_calls', ''))}"
            for message in row[name]
        )
        for name in ("prompt", *RESPONSES, "messages")
        if name in row
    }


def templated(row: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """A row of conversations as the texts that the tokenizer's model was trained on.

    The prompt ends where the model's turn begins, or goes on with the assistant's message when that is its last. A text
    holds the special tokens already, BOS included: tokenize it with ``add_special_tokens=False``.

    Args:
        row: "messages", or "prompt" with any responses; "tools" and "chat_template_kwargs" are passed on.
        tokenizer: One with a chat template.

    Raises:
        ValueError: If the tokenizer has no chat template, or the template refuses the conversation.

    Source:
        TRL 1.16, ``apply_chat_template``: where a template writes the prompt alone otherwise than within the
        conversation, the prompt is what they have in common.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "tokenizer must have a chat template to read conversations, and this one has none; take that of a chat model"
        )
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    options = {"tools": tools or None, "tokenize": False, **(row.get("chat_template_kwargs") or {})}

    def apply(messages: list[Any], **more: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, **options, **more)
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    if "messages" in row:
        return {"text": apply(row["messages"])}
    last_role = row["prompt"][-1]["role"]
    goes_on = last_role == "assistant"
    prompt = apply(row["prompt"], add_generation_prompt=not goes_on, continue_final_message=goes_on)
    whole = {name: apply(row["prompt"] + row[name]) for name in RESPONSES if name in row}
    shared = os.path.commonprefix([prompt, *whole.values()])
    return {"prompt": shared, **{name: text[len(shared) :] for name, text in whole.items()}}


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two responses begin with, and what is left of each.

    Args:
        chosen: A text or a list of messages, not empty.
        rejected: The same.

    Returns:
        Prompt, chosen, rejected: of texts the longest common beginning, without a space at its end; of conversations the
        messages in common. Where one begins with the whole of the other, the last character or message of the shorter
        one stays a response.

    Source:
        TRL's ``extract_prompt``. Differs where the first characters differ: TRL then looks at the *last* character of
        the chosen text, and takes all before it for the prompt when that is a space.

    Example:
        >>> extract_prompt("The sky is blue.", "The sky is green.")
        ('The sky is', ' blue.', ' green.')
    """
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if 0 < end and chosen[end] != rejected[end] and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]
