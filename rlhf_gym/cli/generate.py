"""``rlhf-gym generate``: continue a prompt."""

from __future__ import annotations

import math

import torch

from rlhf_gym.cli.options import Generate
from rlhf_gym.cli.saved import BestOf, acting_policy
from rlhf_gym.cli.setup import model_source, quiet_transformers
from rlhf_gym.envs.prompts import PromptEncoder
from rlhf_gym.envs.render import visible
from rlhf_gym.lm import TokenFilter, generate, load_language_model, make_engine


def run(options: Generate) -> int:
    """Sample and print the responses; returns the exit code."""
    quiet_transformers()
    lm = load_language_model(model_source(options.model), device=options.device, dtype=options.dtype)
    policy = acting_policy(options, lm)
    if isinstance(policy, BestOf):
        raise ValueError(
            f"--model {options.model} holds a best-of-n agent, which chooses by a reward; rlhf-gym evaluate with --prompts, "
            "--reward and --out FILE.jsonl writes its responses"
        )
    token_filter = TokenFilter(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    encoder = PromptEncoder(lm.tokenizer, lm.vocab_size, lm.eos_token_ids, lm.bos_token_id, truncate=None)
    texts = [text for text in options.prompt for _ in range(options.num_samples)]
    prompts = [encoder.encode({"prompt": text}, None, f"--prompt {text!r}").ids for text in texts]
    longest = max(len(ids) for ids in prompts)
    room = math.inf if lm.max_context is None else lm.max_context - longest
    num_tokens = int(min(128, room)) if options.max_response_tokens is None else options.max_response_tokens
    if not 1 <= num_tokens <= room:
        raise ValueError(
            f"a prompt of {longest} tokens leaves {room} of the model's context of {lm.max_context}, not {max(1, num_tokens)}"
        )
    num_rows = min(64, len(prompts))
    engine = make_engine(policy, num_rows, longest + num_tokens)
    reference = make_engine(lm, num_rows, longest + num_tokens) if token_filter.uses_reference else None
    uniforms = torch.rand(len(prompts), num_tokens, generator=torch.Generator().manual_seed(options.seed))
    responses = generate(
        engine,
        prompts,
        max_response_tokens=num_tokens,
        eos_token_ids=lm.eos_token_ids,
        uniforms=None if options.greedy else uniforms,
        token_filter=token_filter,
        reference_engine=reference,
    )
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        response = responses.response_ids[i][responses.response_mask[i]].tolist()
        # Decoded together: many tokenizers drop the space before the first word of what they decode.
        whole, head = (
            lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt.tolist() + response, prompt)
        )
        shown = text + whole[len(head) :] if whole.startswith(head) else whole
        print(("\n" if i else "") + "\n".join(visible(line) for line in shown.split("\n")))
    return 0
