"""A small LSTM language model that behaves like any other causal model of transformers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class LSTMConfig(PreTrainedConfig):
    """Sizes of an `LSTMForCausalLM`. There is no ``max_position_embeddings``: its context has no limit."""

    model_type = "rlhf_gym_lstm"

    def __init__(self, vocab_size: int = 256, hidden_size: int = 128, num_hidden_layers: int = 1, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class LSTMForCausalLM(PreTrainedModel):
    """Embedding, LSTM layers, linear head.

    ``past_key_values`` is (h, c), each of shape (layers, B, hidden), as ``torch.nn.LSTM`` has it: that of the last
    real token, where an attention mask says which tokens are real (they must come first).
    """

    config_class = LSTMConfig
    base_model_prefix = ""
    has_fixed_size_cache = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(self.config.hidden_size**-0.5), self.config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Tensor, Tensor] | None = None,
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
            **kwargs: Ignored (``position_ids`` and the like mean nothing to an LSTM).

        Returns:
            ``logits`` (B, L, V), ``loss`` with labels, ``past_key_values`` with ``use_cache``.
        """
        embedded = self.embed_tokens(input_ids)
        if attention_mask is None or not use_cache or bool(attention_mask.all()):
            # Nothing before a padding token depends on it: the padding matters to the final state only.
            hidden, state = self.lstm(embedded, past_key_values)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(
                embedded, attention_mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
            )
            packed, state = self.lstm(packed, past_key_values)
            hidden, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=input_ids.shape[1])
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=state if use_cache else None)


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
