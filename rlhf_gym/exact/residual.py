"""Small neural policies that begin as the reference exactly: logits = log pi_ref + a network whose last layer is 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from .solve import process_of
from .table import SmallStateLM, TableForCausalLM, at_last_token, language_model_output, read_tokens

RESIDUAL_KINDS = ("transformer", "lstm")


class ResidualConfig(PreTrainedConfig):
    """Sizes of a `ResidualForCausalLM`.

    Args:
        kind: "transformer" or "lstm".
        vocab_size: V.
        hidden_size: Width of the network.
        num_hidden_layers: Its layers.
        max_position_embeddings: Most tokens that it can read; None for an LSTM.
        num_states, start_state: Of the reference's table.
    """

    model_type = "rlhf_gym_residual"

    def __init__(
        self,
        kind: str = "transformer",
        vocab_size: int = 2,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        max_position_embeddings: int | None = 32,
        num_states: int = 1,
        start_state: int = 0,
        **kwargs,
    ):
        self.kind = kind
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.max_position_embeddings = max_position_embeddings
        self.num_states = num_states
        self.start_state = start_state
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class _Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm. One head per 32 channels."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = max(1, width // 32)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, visible: Tensor, cache: tuple[Tensor, Tensor] | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer.

        Args:
            x: Shape (B, L, width).
            visible: Which columns a token sees. Shape (B, L, columns), bool.
            cache: Keys and values of all columns, (B, T, width) each, into which these tokens' are put; or None: the
                columns are these tokens.
            positions: Shape (B, L), int64.

        Returns:
            The output (B, L, width), and keys and values (B, columns, width).
        """
        query, key, value = self.query_key_value(self.norm_1(x)).chunk(3, -1)
        if cache is not None:
            index = positions[..., None].expand_as(key)
            key, value = cache[0].scatter(1, index, key), cache[1].scatter(1, index, value)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (query, key, value))
        # Written out: the fused kernels have no second derivative, which TRPO needs.
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~visible[:, None], -1e9)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x)))), key, value


class _Transformer(nn.Module):
    """Pre-norm transformer with learned positions. Its state: keys, values (layers, B, T * width), length (1, B, 1)."""

    def __init__(self, config: ResidualConfig):
        super().__init__()
        self.width, self.max_tokens = config.hidden_size, config.max_position_embeddings
        self.positions = nn.Embedding(self.max_tokens, self.width)
        self.blocks = nn.ModuleList(_Block(self.width) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(self.width)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, past: tuple[Tensor, ...] | None, use_cache: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        batch, length = x.shape[:2]
        positions = torch.arange(length, device=x.device).expand(batch, -1)
        if past is not None:
            positions = positions + past[2][0]
        x = x + self.positions(positions)
        columns = length if past is None else self.max_tokens
        visible = torch.arange(columns, device=x.device) <= positions[..., None]
        caches: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if past is not None:
            keys, values = (each.unflatten(-1, (self.max_tokens, self.width)) for each in past[:2])
            caches = list(zip(keys, values, strict=True))
        kept = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, key, value = block(x, visible, cache, positions)
            kept.append([nn.functional.pad(each, (0, 0, 0, self.max_tokens - columns)) for each in (key, value)])
        if not use_cache:
            return self.norm(x), ()
        keys, values = (torch.stack(each).flatten(2) for each in zip(*kept, strict=True))
        return self.norm(x), (keys, values, at_last_token(positions + 1, attention_mask)[None, :, None])


class _LSTM(nn.Module):
    """LSTM layers. Their state: h and c, (layers, B, width)."""

    def __init__(self, config: ResidualConfig):
        super().__init__()
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, past: tuple[Tensor, ...] | None, use_cache: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if attention_mask is None or not use_cache or bool(attention_mask.all()):
            return self.lstm(x, past)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, attention_mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        packed, state = self.lstm(packed, past)
        return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0], state


class _ResidualHead(nn.Module):
    """Its input is [the network's output, the number of the reference's state]; 0 at the start."""

    def __init__(self, config: ResidualConfig):
        super().__init__()
        self.in_features, self.out_features = config.hidden_size + 1, config.vocab_size
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("reference", torch.zeros(config.num_states, config.vocab_size))

    @property
    def weight(self) -> Tensor:
        """The linear layer's, with a column of zeros for the state's number. Shape (V, in_features)."""
        return nn.functional.pad(self.linear.weight, (0, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        states = hidden[..., -1].round().long()
        return self.reference[states] + self.linear(hidden[..., :-1].to(self.linear.weight.dtype))


class ResidualForCausalLM(SmallStateLM):
    """A transformer or LSTM whose output is added to a table's log-probabilities.

    Tokens that the table forbids stay forbidden. ``past_key_values`` is the network's state and that of the table, of
    fixed size.

    Attributes:
        value_width: A value head reads that many of the head's inputs, the first ones: the last is a mere number.
    """

    config_class = ResidualConfig

    def __init__(self, config: ResidualConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.network = _Transformer(config) if config.kind == "transformer" else _LSTM(config)
        self.lm_head = _ResidualHead(config)
        self.register_buffer("transitions", torch.zeros(config.num_states, config.vocab_size, dtype=torch.int32))
        self.value_width = config.hidden_size
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head.linear:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(self.config.hidden_size**-0.5), self.config.hidden_size**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Tensor, ...] | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of every position; arguments and result as those of `TableForCausalLM`."""
        if past_key_values is None:
            states, past = torch.full_like(input_ids[:, 0], self.config.start_state), None
        else:
            states, past = past_key_values[-1][0, :, 0], past_key_values[:-1]
        states = read_tokens(self.transitions, states, input_ids)
        hidden, moved = self.network(self.embed_tokens(input_ids), attention_mask, past, use_cache)
        logits = self.lm_head(torch.cat([hidden, states[..., None].float()], -1))
        cache = (*moved, at_last_token(states, attention_mask)[None, :, None]) if use_cache else None
        return language_model_output(logits, labels, cache)


AutoConfig.register(ResidualConfig.model_type, ResidualConfig, exist_ok=True)
AutoModelForCausalLM.register(ResidualConfig, ResidualForCausalLM, exist_ok=True)


def residual_policy(
    envs: Any, kind: str = "transformer", *, width: int = 64, num_layers: int = 1, seed: int = 0
) -> ResidualForCausalLM:
    """A small network for an environment, equal to its reference as long as it is untrained.

    Args:
        envs: An environment whose reference is a table (`ngram_from_table`, `ngram_from_corpus`).
        kind: "transformer" or "lstm".
        width: Channels, a multiple of 32 for more than one attention head.
        num_layers: Layers.
        seed: Of the initial weights.

    Raises:
        ValueError: If the reference is no table, or an argument is out of range.
    """
    process = process_of(envs)
    table = process.language_model.model
    if not isinstance(table, TableForCausalLM):
        raise ValueError(
            f"residual_policy adds a network to a table, but the reference is a {type(table).__name__}; for such a "
            "reference train a copy of it (policy=None)"
        )
    if kind not in RESIDUAL_KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, RESIDUAL_KINDS))}, got {kind!r}")
    config = ResidualConfig(
        kind=kind,
        vocab_size=process.vocab_size,
        hidden_size=width,
        num_hidden_layers=num_layers,
        max_position_embeddings=process.max_tokens if kind == "transformer" else None,
        num_states=table.config.num_states,
        start_state=table.config.start_state,
        eos_token_id=list(process.eos_token_ids),
        bos_token_id=process.bos_token_id,
        pad_token_id=process.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualForCausalLM(config)
    model.transitions.copy_(table.transitions)
    model.lm_head.reference.copy_(table.row_logits())
    return model.to(process.device).eval()
