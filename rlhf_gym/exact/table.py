"""Language models that are tables: a finite automaton reads the tokens, and each of its states has a row of logits.

An n-gram model is one (its states are contexts), and so is a tabular policy (its states are those of a decision
process). Reading a token is one look-up, however long the text is already.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Up to here the head's input is one-hot, so that a linear value head is a table too. Beyond, it is the state's number.
MAX_ONE_HOT = 4096


class TableConfig(PreTrainedConfig):
    """Sizes of a table.

    Args:
        vocab_size: V.
        num_states: S.
        start_state: The state before the first token.
    """

    def __init__(self, vocab_size: int = 2, num_states: int = 1, start_state: int = 0, **kwargs):
        self.vocab_size = vocab_size
        self.num_states = num_states
        self.start_state = start_state
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class TableHead(nn.Module):
    """Looks up a row of logits per state.

    It takes what `encode_states` gives and is no matrix product: 0 * -inf, a forbidden token in another state's row,
    would be NaN.
    """

    def __init__(self, num_states: int, vocab_size: int):
        super().__init__()
        self.in_features = num_states if num_states <= MAX_ONE_HOT else 1  # as `encode_states` has it
        self.out_features = vocab_size

    def rows(self) -> Tensor:
        """Logits of every state. Shape (S, V)."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """As a linear layer would have it, (V, in_features). Where states are numbers only its shape means anything."""
        return self.rows()[: self.in_features].t()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows()[decode_states(hidden)]


def encode_states(states: Tensor, num_states: int) -> Tensor:
    """States as the input of a head: one-hot (..., S), or the number itself (..., 1) where there are many. float32."""
    if 1 < num_states <= MAX_ONE_HOT:
        return nn.functional.one_hot(states, num_states).float()
    return states[..., None].float()  # exact up to 2**24


def decode_states(hidden: Tensor) -> Tensor:
    """The inverse of `encode_states`. (..., in_features) -> (...), int64."""
    return hidden.argmax(-1) if hidden.shape[-1] > 1 else hidden[..., 0].long()


def read_tokens(transitions: Tensor, states: Tensor, input_ids: Tensor) -> Tensor:
    """Lets an automaton read.

    Args:
        transitions: The state after a token. Shape (S, V), integers.
        states: Where each row begins. Shape (B,), int64.
        input_ids: Shape (B, L), int64.

    Returns:
        The state after each token. Shape (B, L), int64.
    """
    visited = []
    for tokens in input_ids.unbind(1):
        states = transitions[states, tokens].long()
        visited.append(states)
    return torch.stack(visited, 1)


def at_last_token(values: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What stands at each row's last real token (real tokens come first). (B, L, ...) -> (B, ...)."""
    if attention_mask is None:
        return values[:, -1]
    return values[torch.arange(len(values), device=values.device), attention_mask.sum(1).long() - 1]


def language_model_output(
    logits: Tensor, labels: Tensor | None, past_key_values: tuple[Tensor, ...] | None
) -> CausalLMOutputWithPast:
    """What a causal language model returns; with labels (shifted here, -100 is ignored) the loss too."""
    loss = None
    if labels is not None:
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


class SmallStateLM(PreTrainedModel):
    """What our small models share: ``past_key_values`` is a tuple of tensors (layers, B, width) of fixed size."""

    base_model_prefix = ""
    has_fixed_size_cache = True

    def get_input_embeddings(self) -> nn.Module | None:
        return None

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("the words of a table cannot be replaced")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings


class TableForCausalLM(SmallStateLM):
    """A language model whose next-token logits are the row of its automaton's state.

    ``past_key_values`` is the state after the last real token, ((1, B, 1) int64,).
    """

    is_table = True  # nothing is multiplied, so there is nothing for `fast_linear` to do

    def __init__(self, config: TableConfig, head: TableHead):
        super().__init__(config)
        self.register_buffer("transitions", torch.zeros(config.num_states, config.vocab_size, dtype=torch.int32))
        self.lm_head = head
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is random here."""

    def row_logits(self) -> Tensor:
        """Logits of every state, -inf where a token is impossible. Shape (S, V), float32, detached."""
        return self.lm_head.rows().detach()

    @property
    def forbids_tokens(self) -> bool:
        """Whether some token is impossible in some state."""
        return bool((self.row_logits() == -torch.inf).any())

    def state_after(self, ids: Tensor) -> int:
        """The state after reading a sequence of tokens (L,)."""
        start = torch.tensor([self.config.start_state], device=self.transitions.device)
        return int(read_tokens(self.transitions, start, ids[None].to(start.device))[0, -1])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Tensor] | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of every position.

        Args:
            input_ids: Tokens. Shape (B, L), int64.
            attention_mask: 1 for real tokens, which come first. Shape (B, L). None: all are real.
            past_key_values: State to continue from.
            labels: Tokens to predict, shifted here; -100 is ignored. Shape (B, L), int64.
            use_cache: Whether to return the state after the last real token.
            **kwargs: Ignored (``position_ids`` and the like mean nothing to a table).

        Returns:
            ``logits`` (B, L, V), ``loss`` with labels, ``past_key_values`` with ``use_cache``.
        """
        if past_key_values is None:
            states = torch.full_like(input_ids[:, 0], self.config.start_state)
        else:
            states = past_key_values[0][0, :, 0]
        states = read_tokens(self.transitions, states, input_ids)
        logits = self.lm_head(encode_states(states, self.config.num_states))
        past = (at_last_token(states, attention_mask)[None, :, None],) if use_cache else None
        return language_model_output(logits, labels, past)
