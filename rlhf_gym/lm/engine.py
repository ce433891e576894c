"""The language-model engine: what every model can do here, whatever its architecture.

An engine holds ``num_rows`` sequences side by side and answers one question quickly: which token comes next? A
subclass says how a row's state is filled (`_prefill`), moved on by one token (`_decode`) and how whole sequences are
scored (`logits_at`); everything else is written once, here, on top of `state`.

Shape letters: B rows of the engine, k rows of one call, P prompt tokens, L tokens, R response tokens, T = `max_tokens`,
V vocabulary, d width of the hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def inference(model: nn.Module | None) -> Iterator[None]:
    """No gradients and no dropout inside; every module's training mode is put back afterwards."""
    training, stack = [], [] if model is None else [model]
    while stack:  # several times as fast as modules(), and this runs for every token
        module = stack.pop()
        if module.training:  # a part can be, in a model that is not
            training.append(module)
        stack += [child for child in module._modules.values() if child is not None]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Engine:
    """B sequences, each with the state that a model needs to continue it.

    The ids are the truth and the rest is a memo of them: `next_logits` takes the ids of all rows and moves the state
    only where they differ from what a row already holds. `prefill` and `decode` are the two moves underneath.

    Attributes:
        num_rows: B, the number of sequences held.
        max_tokens: T, the most tokens a row can hold.
        vocab_size: V, the last dimension of the logits.
        device: Where the state lives and where results come back.
        model: The module that is run, put in eval mode for each call; None for an engine that is no network.
        state: Everything that belongs to a row, each tensor with the row as dimension 0. Always there: ``ids`` (B, T)
            int64, the tokens held, and ``logits`` (B, V) float32, those of each row's next token. The tensors are
            changed in place, never replaced, so that captured CUDA graphs stay valid.
        n: Number of tokens held by each row, 0 for a row that holds nothing. Shape (B,), int64.
    """

    def __init__(
        self,
        num_rows: int,
        max_tokens: int,
        vocab_size: int,
        *,
        device: torch.device | str = "cpu",
        model: nn.Module | None = None,
        hidden_size: int | None = None,
        hidden_dtype: torch.dtype = torch.float32,
    ):
        if num_rows < 1 or max_tokens < 1:
            raise ValueError(f"num_rows and max_tokens must be at least 1, got {num_rows} and {max_tokens}")
        self.num_rows, self.max_tokens, self.vocab_size = num_rows, max_tokens, vocab_size
        self.device = torch.device(device)
        self.model = model
        self.n = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        self.state: dict[str, Tensor] = {
            "ids": torch.zeros(num_rows, max_tokens, dtype=torch.long, device=self.device),
            "logits": torch.zeros(num_rows, vocab_size, device=self.device),
        }
        if hidden_size is not None:
            self.state["hidden"] = torch.zeros(num_rows, hidden_size, device=self.device, dtype=hidden_dtype)
        self._rows = torch.arange(num_rows, device=self.device)

    # What a subclass provides -----------------------------------------------------------------------------------------

    def _prefill(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fills the state of ``rows`` from scratch; returns next-token logits (k, V) and hidden (k, d) or None."""
        raise NotImplementedError

    def _decode(self, tokens: Tensor, active: Tensor, longest: int | None) -> tuple[Tensor, Tensor | None]:
        """Appends ``tokens`` at position ``n`` of the active rows; returns logits (k, V) and hidden (k, d) or None.

        It is given the first k rows of the engine, ``tokens`` (k,) and ``active`` (k,); the others are all inactive.
        The state of inactive rows must not change; what is returned for them is ignored. ``longest`` is as in `advance`.
        """
        raise NotImplementedError

    def logits_at(self, ids: Tensor, lengths: Tensor, start: Tensor, num_tokens: int) -> Tensor:
        """Logits of given sequences, computed in one pass that neither reads nor changes the state.

        Args:
            ids: Right-padded sequences. Shape (b, L), int64.
            lengths: Number of real tokens. Shape (b,), int64.
            start: First wanted position. Shape (b,), int64.
            num_tokens: R, how many positions from ``start`` on.

        Returns:
            Entry r is the distribution of the token that follows position ``start + r``; positions beyond the last
            real token repeat it. Shape (b, R, V), in the model's dtype.
        """
        raise NotImplementedError

    # The two moves ----------------------------------------------------------------------------------------------------

    def prefill(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Rewrites some rows from scratch.

        Args:
            rows: Which rows, each at most once. Shape (k,), int64.
            ids: Their right-padded tokens. Shape (k, P), int64.
            lengths: Number of real tokens, at least 1. Shape (k,), int64.

        Returns:
            Logits of the next token. Shape (k, V), float32.
        """
        with inference(self.model):
            logits, hidden = self._prefill(rows, ids, lengths)
        logits = logits.float()
        self.state["ids"][rows, : ids.shape[1]] = ids
        self.state["logits"][rows] = logits
        if hidden is not None:
            self.state["hidden"][rows] = hidden
        self.n[rows] = lengths
        return logits

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """`advance`, and what it has found.

        Returns:
            Logits of the next token, unspecified for inactive rows. A fresh tensor. Shape (B, V), float32.
        """
        self.advance(tokens, active)
        return self.state["logits"].clone()

    def advance(self, tokens: Tensor, active: Tensor, longest: int | None = None) -> None:
        """Appends one token to each active row and leaves the others exactly as they are.

        What follows is then in ``state["logits"]`` and `last_hidden`. On a GPU the host waits for nothing here where the
        engine is a `LeanKV`.

        Args:
            tokens: Token to append; ignored for inactive rows but a valid id. Shape (B,), int64.
            active: Rows that move. An active row that already holds T tokens stays as it is and its logits mean
                nothing; it never disturbs another row. Shape (B,), bool.
            longest: A number of tokens that no active row exceeds afterwards, for a caller who knows one: a GPU, which
                is not asked how long its rows are, need not look beyond. None: T.
        """
        count = self.num_rows
        if self.device.type == "cpu":  # no work for idle rows at the end; elsewhere fixed shapes are worth more
            moving = (active & (self.n < self.max_tokens)).nonzero()
            count = int(moving[-1]) + 1 if len(moving) else 0
        if count:
            self._advance(tokens[:count], active[:count], None if longest is None else min(longest, self.max_tokens))

    def _advance(self, tokens: Tensor, active: Tensor, longest: int | None) -> None:
        """`advance` of the first rows; beyond `_decode` nothing in it waits for the device or depends on the data."""
        count = len(tokens)
        n, ids, rows = self.n[:count], self.state["ids"], self._rows[:count]
        active = active & (n < self.max_tokens)
        last = n.clamp(max=self.max_tokens - 1)
        ids[rows, last] = torch.where(active, tokens, ids[rows, last])
        with inference(self.model):
            logits, hidden = self._decode(tokens, active, longest)
            for name, new in (("logits", logits.float()), ("hidden", hidden)):
                if new is not None:
                    kept = self.state[name][:count]
                    torch.where(active[:, None], new, kept, out=kept)
        n += active

    # The memo ---------------------------------------------------------------------------------------------------------

    def next_logits(self, ids: Tensor, lengths: Tensor, needed: Tensor | None = None) -> Tensor:
        """Logits of the token after each sequence, at the least cost that what the rows already hold allows.

        A row whose tokens are those it holds costs nothing, one with a single new token costs a decode, any other is
        filled again from scratch. So a caller may edit, replace or shorten its sequences as it likes.

        Args:
            ids: Right-padded sequences, one per row. Shape (B, L), int64.
            lengths: Number of real tokens, from 1 to T. Shape (B,), int64.
            needed: Rows to answer for, all when None. The others are neither read nor changed. Shape (B,), bool.

        Returns:
            Logits, unspecified for rows not needed. A fresh tensor. Shape (B, V), float32.

        Raises:
            ValueError: If a needed row has no token or more than T.
        """
        if needed is None:
            needed = torch.ones_like(self.n, dtype=torch.bool)
        width = min(ids.shape[1], self.max_tokens)
        beyond = torch.arange(width, device=self.device) >= self.n[:, None]
        agrees = ((ids[:, :width] == self.state["ids"][:, :width]) | beyond).all(1) & (self.n > 0)
        one_more = needed & agrees & (lengths == self.n + 1)
        anew = needed & ~one_more & ~(agrees & (lengths == self.n))
        wrong = needed & ((lengths < 1) | (lengths > width))
        # One synchronisation with the device instead of three.
        any_wrong, any_one_more, any_anew = torch.stack([wrong.any(), one_more.any(), anew.any()]).tolist()
        if any_wrong:
            raise ValueError(
                f"lengths must be from 1 to {width} (the width of ids, at most max_tokens={self.max_tokens}), got "
                f"{lengths[wrong].tolist()} in rows {wrong.nonzero()[:, 0].tolist()}"
            )
        if any_one_more:
            newest = ids.gather(1, self.n.clamp(max=width - 1)[:, None])[:, 0]
            self.advance(newest, one_more)
        if any_anew:
            rows = anew.nonzero()[:, 0]
            self.prefill(rows, ids[rows, : int(lengths[rows].max())], lengths[rows])
        return self.state["logits"].clone()

    @property
    def last_hidden(self) -> Tensor | None:
        """The LM head's input for each row's last token: what a value head reads. Shape (B, d); None without a head."""
        return self.state.get("hidden")

    def forget(self, rows: Tensor) -> None:
        """Empties some rows. Shape (k,), int64, or a bool mask (B,)."""
        self.n[rows] = 0

    def invalidate(self) -> None:
        """Forgets everything: to be called whenever the model's weights have changed."""
        self.n.zero_()

    # Copies of the state ----------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all rows, for `restore`. It shares no memory with the engine."""
        return {"n": self.n.clone()} | {name: tensor.clone() for name, tensor in self.state.items()}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Puts a `snapshot` of this engine back, in place. The snapshot can be used again."""
        for name, tensor in ({"n": self.n} | self.state).items():
            tensor.copy_(snapshot[name])

    def copy_rows(self, source: Tensor, destination: Tensor) -> None:
        """Makes rows ``destination`` (k,) copies of rows ``source`` (k,), for several samples from one prompt, say."""
        for tensor in (self.n, *self.state.values()):
            tensor[destination] = tensor[source]
