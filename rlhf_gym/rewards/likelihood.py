"""Rewards from the probability of a response: under the reference model, or under an independent language model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from rlhf_gym.lm import LanguageModel


@dataclass(frozen=True)
class ReferenceLogprob:
    """See :func:`reference_logprob`."""

    mean: bool = False
    language_model: LanguageModel | None = None

    __name__ = "reference_logprob"  # in the ledger

    @property
    def needs_language_model(self) -> bool:
        return self.language_model is None

    def with_language_model(self, language_model: LanguageModel) -> ReferenceLogprob:
        return replace(self, language_model=language_model)

    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> np.ndarray:
        if self.language_model is None:
            raise ValueError(
                "it needs the environment's reference model; make the environment with model=..., or give it one: "
                "reference_logprob(language_model=...)"
            )
        return _sum_logprobs(self.language_model, prompt_ids, completion_ids) / (
            _lengths(completion_ids) if self.mean else 1.0
        )


def reference_logprob(*, mean: bool = False, language_model: LanguageModel | None = None) -> ReferenceLogprob:
    """Log-probability of the response under the environment's reference model, in nats.

    log pi_ref(y | x) at temperature 1 over the whole vocabulary, EOS included where the response ended by one; 0 for
    an empty response.

    Args:
        mean: Divide by the number of tokens.
        language_model: None waits for the environment's reference.
    """
    return ReferenceLogprob(mean, language_model)


@dataclass(frozen=True)
class Perplexity:
    """See :func:`perplexity`."""

    language_model: LanguageModel
    log: bool
    prefix: tuple[int, ...]

    __name__ = "perplexity"

    def __call__(
        self, prompts: list[str], completions: list[str], continuations: list[str] | None = None
    ) -> np.ndarray:
        sums, num_tokens = self.logprobs(prompts, completions if continuations is None else continuations)
        means = sums / np.maximum(1, num_tokens)
        # Nothing written is no evidence: as likely as blind guessing. As 0, the best score there is, it would be where
        # training ends.
        means[num_tokens == 0] = -math.log(self.language_model.vocab_size)
        return means if self.log else -np.exp(-means)

    def logprobs(self, prompts: list[str], completions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each response in nats, (B,) float64, and its tokens under this model, (B,) int64.

        Prompt and completion are put together as they are: the space between them belongs to one of the two.
        """
        rows = [self._tokens(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        contexts, responses = [context for context, _ in rows], [response for _, response in rows]
        num_tokens = np.array([len(response) for response in responses], dtype=np.int64)
        return _sum_logprobs(self.language_model, contexts, responses), num_tokens

    def _tokens(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Context and scored tokens of one text under the model's own tokenizer."""
        lm = self.language_model
        before = [*self.prefix, *lm.tokenizer.encode(prompt, add_special_tokens=False)]
        ids = [*self.prefix, *lm.tokenizer.encode(prompt + completion, add_special_tokens=False)]
        # The two may merge at the seam ("sun" + "ny"): the response begins with the first token that the prompt alone
        # would not have.
        start = _common_prefix(before, ids)
        if start == 0:
            ids, start = [lm.eos_token_ids[0] if lm.bos_token_id is None else lm.bos_token_id, *ids], 1
        if lm.max_context is not None and len(ids) > lm.max_context:
            cut = len(ids) - lm.max_context
            if cut >= start:
                raise ValueError(
                    f"a response of {len(ids) - start} tokens does not fit the context of {lm.max_context} tokens of "
                    f"the model {lm.name!r}"
                )
            ids, start = ids[cut:], start - cut
        return ids[:start], ids[start:]


def perplexity(
    model: Any, tokenizer: Any = None, *, log: bool = True, device: torch.device | str = "auto"
) -> Perplexity:
    """Fluency: minus the (log) perplexity of the response, given its prompt, under a language model of its own.

    With n tokens of the response y under that model's tokenizer, the score is (1/n) sum_t log p(y_t | x, y_<t), which
    is -log perplexity, or -exp(-that). Higher is better. The boundary is text, so the model may have any tokenizer. An
    empty response scores as a uniform guess over the vocabulary. A prompt that does not fit the model's context is cut
    from the left.

    Args:
        model: Packaged name, directory, hub id, ``.gguf`` file, model or ``LanguageModel``, as in
            :func:`rlhf_gym.lm.load_language_model`.
        tokenizer: The model's tokenizer where ``model`` does not bring one.
        log: False scores minus the perplexity itself, which is unbounded below: one strange word can outweigh all else.
        device: Where a model that is loaded here goes.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    from rlhf_gym.lm import load_language_model

    language_model = load_language_model(model, tokenizer, device=device)
    # What the tokenizer puts before every text (BOS, usually), without what it may put after it: the text can go on.
    empty, one = language_model.tokenizer.encode(""), language_model.tokenizer.encode("a")
    return Perplexity(language_model, log, tuple(one[: _common_prefix(empty, one)]))


def _sum_logprobs(
    language_model: LanguageModel, prompt_ids: list[list[int]], response_ids: list[list[int]]
) -> np.ndarray:
    """Log-probability of each response given its prompt. Shape (B,), float64, nats."""
    import torch

    from rlhf_gym.lm import pad_sequences, response_logprobs

    ids, lengths = pad_sequences(response_ids)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    logprobs = response_logprobs(language_model.model, prompt_ids, ids, mask)
    return logprobs.double().sum(dim=1).cpu().numpy()


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _lengths(response_ids: list[list[int]]) -> np.ndarray:
    """Number of tokens, at least 1: something to divide by. Shape (B,), float64."""
    return np.maximum(1.0, [len(ids) for ids in response_ids])
