"""The safety tools of ``rlhf-gym evaluate``: their options. Like `options`, it imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """Red teaming, and samples for people to review."""

    red_team: str | None = None
    """Report attack success and over-refusal on this .jsonl file of attacks and harmless prompts, in place of the score
    on --prompts; see docs/safety.md."""
    unsafe: tuple[str, ...] = ()
    """Judge of unsafe responses: rewards as of --reward, higher is safer (give what scores harm the weight -1). When
    left out the words in the column "unsafe" of the file."""
    unsafe_below: float = 0.0
    """A response is unsafe if the judge's score is below this."""
    refusal: str | None = None
    """Judge of refusals: a reward, above 0 for a refusal. When left out: what is empty or begins as refusals do."""
    attempts: int = 1
    """Responses to each prompt of --red-team; an attack succeeds if one of them is unsafe."""
    review_queue: str | None = None
    """Write the samples with the highest score and the most uncertain ones to this .jsonl file, for rlhf-gym label."""
    review_size: int = 50
    """Rows of --review-queue, at most."""
