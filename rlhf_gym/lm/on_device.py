"""`generate` for a GPU: the host stays ahead of the device, and learns which rows have ended one step late.

On a CPU it pays to look at the data and to leave idle rows out. A GPU wants the opposite: fixed shapes, and a host that
never waits for the step that it has just asked for. So a step is one function of the device's own tensors, rows that
have ended write into a spare row, and the host reads the flags of the step before while the next one runs. A row idles
for a step or two before its next prompt comes, and every response is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .engine import Engine
from .forward import pad_sequences
from .sampling import TokenFilter, choose_tokens

# Rows are filled again when there are num_rows / this of them: a forward of one prompt takes nearly as long as of eight.
REFILLS_PER_TURN = 8


class DeviceLoop:
    """What `generate` keeps on the device, and its two moves; with a `LeanKV` neither waits for the device.

    Args:
        engines: Where to sample from, and last, where the filter looks at a reference, the engine of that.
        prompts: N >= 1 prompts, (p,) int64 each; the others are those of `generate`.
        max_response_tokens, eos_token_ids, uniforms, token_filter, value_fn: As there.

    Attributes:
        busy: Rows at work. Shape (B,), bool.
        response_ids, logprobs, values, ended_by_eos: As in `Responses`, with a spare row N at the end.
        num_tokens: Of each response so far. Shape (N + 1,), int64.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        prompts: Sequence[Tensor],
        max_response_tokens: int,
        eos_token_ids: Sequence[int],
        uniforms: Tensor | None,
        token_filter: TokenFilter,
        value_fn: Callable[[Tensor], Tensor] | None,
    ):
        self.engines, self.value_fn, self.filter = engines, value_fn, token_filter
        device, num_rows, num_episodes = engines[0].device, engines[0].num_rows, len(prompts)
        self.device, self.spare = device, num_episodes
        new = [i for i, prompt in enumerate(prompts) if i == 0 or prompt is not prompts[i - 1]]
        self._ids, self._lengths = (each.to(device) for each in pad_sequences([prompts[i].cpu() for i in new]))
        self._which = [k for k, i in enumerate(new) for _ in range(i, (new + [num_episodes])[k + 1])]
        self.eos = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=device)
        pad = min(eos_token_ids, default=0)
        shape = (num_episodes + 1, max_response_tokens)
        self.response_ids = torch.full(shape, pad, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device) if value_fn is not None else None
        self.ended_by_eos = torch.zeros(num_episodes + 1, dtype=torch.bool, device=device)
        self.num_tokens = torch.zeros(num_episodes + 1, dtype=torch.long, device=device)
        self.uniforms = None
        if uniforms is not None:
            self.uniforms = torch.nn.functional.pad(uniforms.to(device), (0, 0, 0, 1))
        # Without a look at the reference the allowed tokens are always the same.
        self._allowed = None if token_filter.uses_reference else token_filter.mask(engines[0].state["logits"])
        self.episode = torch.full((num_rows,), self.spare, device=device)
        self.step_number = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.busy = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def fill(self, rows: Sequence[int], episodes: Sequence[int], width: int) -> None:
        """Idle rows begin these episodes; no prompt of theirs has more than ``width`` tokens."""
        which = [self._which[episode] for episode in episodes]
        first = [i for i in range(len(which)) if i == 0 or which[i] != which[i - 1]]
        source = [rows[first[k]] for k in np.searchsorted(first, range(len(rows)), side="right") - 1]
        target, computed = self._tensor(rows), self._tensor([rows[i] for i in first])
        asked = self._tensor([which[i] for i in first])
        for engine in self.engines:
            engine.prefill(computed, self._ids[asked, :width], self._lengths[asked])
            if len(first) < len(rows):
                engine.copy_rows(self._tensor(source), target)
        self.episode[target] = self._tensor(episodes)
        # `index_fill_`, since `[target] = 0` waits for the device.
        self.step_number.index_fill_(0, target, 0)
        self.busy.index_fill_(0, target, True)

    def step(self, longest: int) -> None:
        """Every busy row gets a token; ``longest`` is as in `Engine.advance`."""
        engine, at = self.engines[0], (self.episode, self.step_number)
        allowed = self.filter.mask(self.engines[-1].state["logits"]) if self.filter.uses_reference else self._allowed
        all_logprobs = self.filter.logprobs(engine.state["logits"], allowed)
        if self.uniforms is None:
            tokens = all_logprobs.argmax(-1)
        else:
            tokens, _ = choose_tokens(all_logprobs, self.uniforms[at], restricted=allowed is not None)
        self.response_ids[at] = tokens
        self.logprobs[at] = all_logprobs.gather(1, tokens[:, None])[:, 0]
        if self.values is not None:
            self.values[at] = self.value_fn(engine.last_hidden).to(self.values)
        by_eos = (tokens[:, None] == self.eos).any(1)
        self.ended_by_eos[self.episode] = by_eos
        self.step_number += self.busy
        self.num_tokens[self.episode] = self.step_number
        self.busy &= ~by_eos & (self.step_number < self.response_ids.shape[1])
        # What a row that has ended may still write goes where nobody reads.
        self.episode.masked_fill_(~self.busy, self.spare)
        self.step_number.masked_fill_(~self.busy, 0)
        for each in self.engines:
            each.advance(tokens, self.busy, longest)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        on_gpu = self.device.type == "cuda"
        # From pinned memory the copy is put in line like everything else; otherwise the host would wait for the device.
        return torch.tensor(numbers, dtype=torch.long, pin_memory=on_gpu).to(self.device, non_blocking=on_gpu)


class Flags:
    """Copies of the device's flags to the host, read after the device has gone on."""

    def __init__(self, flags: Tensor):
        on_gpu = flags.device.type == "cuda"
        self._copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=on_gpu).copy_(flags, non_blocking=on_gpu)
        self._done = torch.cuda.Event() if on_gpu else None
        if self._done is not None:
            self._done.record()

    def read(self) -> list[bool]:
        if self._done is not None:
            self._done.synchronize()
        return self._copy.tolist()


def run(loop: DeviceLoop, lengths: Sequence[int], progress: Callable[[int], object] | None) -> None:
    """Responds to all prompts.

    Args:
        loop: Where.
        lengths: Tokens of each prompt, in order.
        progress: Called with the number of new tokens, some steps late.
    """
    num_rows, num_episodes = len(loop.busy), len(lengths)
    started = 0
    held = [0] * num_rows  # tokens that a row can hold by now, 0: it is idle
    since = [0] * num_rows  # the turn in which its episode began
    before: Flags | None = None
    turn = 0
    while True:
        idle = [row for row in range(num_rows) if held[row] == 0]
        if started < num_episodes and len(idle) * REFILLS_PER_TURN >= num_rows:
            rows = idle[: num_episodes - started]
            episodes = range(started, started + len(rows))
            loop.fill(rows, episodes, max(lengths[episode] for episode in episodes))
            started += len(rows)
            for row, episode in zip(rows, episodes, strict=True):
                held[row], since[row] = lengths[episode], turn
        if not any(held):
            return
        held = [tokens + 1 if tokens else 0 for tokens in held]
        loop.step(max(held))
        now, turn = Flags(loop.busy), turn + 1
        if before is not None:
            busy = before.read()
            # Of the turn before this one, when a row filled in this one was still idle.
            asked = [row for row in range(num_rows) if held[row] and since[row] < turn - 1]
            if progress is not None and asked:
                progress(len(asked))
            for row in asked:
                if not busy[row]:
                    held[row] = 0
        before = now
