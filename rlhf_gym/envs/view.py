"""What a row looks like at this moment, for the renderers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_gym.envs.render import EpisodeView

if TYPE_CHECKING:
    from rlhf_gym.envs.core import TextGenerationProcess


def episode_view(process: TextGenerationProcess, row: int) -> EpisodeView:
    """The row's prompt, the text that each token added, its rewards and, once it has ended, its ledger."""
    prompt, ids = process.row_prompts[row], process.response_ids(row)
    # A token alone may decode differently than in its place (leading spaces, bytes of one character), so take what it
    # added.
    texts = [process.tokenizer.decode(ids[:t], skip_special_tokens=False) for t in range(len(ids) + 1)]
    tokens = [
        after[len(before) :] if after.startswith(before) else after
        for before, after in zip(texts, texts[1:], strict=False)
    ]
    stop_reason = None
    if prompt is not None and bool(process.ended[row]):
        stop_reason = "eos" if ids and ids[-1] in process.eos_token_ids else "length"
    ledger = dict(process.row_results[row])
    if stop_reason and bool(process.kl_sums[row].isfinite()) and process.language_model is not None:
        ledger["kl"] = float(process.kl_sums[row])
    return EpisodeView(
        prompt=prompt.text if prompt else "",
        tokens=tokens,
        rewards=process.step_rewards[row, : len(ids)].tolist(),
        ledger=ledger,
        num_tokens=len(ids),
        max_tokens=process.max_response_tokens,
        stop_reason=stop_reason,
    )
