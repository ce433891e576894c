"""A language model as the Q-network of DQN and QR-DQN."""

from __future__ import annotations

import copy
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_gym.exact.table import TableForCausalLM, encode_states
from rlhf_gym.lm import LanguageModel, TokenFilter
from rlhf_gym.lm.forward import forward_at

from .derived import DerivedLM, certain, set_rows
from .policy import FORBIDDEN, check_spaces, sequences, share_prefixes, trainable_copy

# A model is saved with logits Q times this: values that differ by 1e-5 are told apart.
SHARPNESS = 1e6


class LMQNetwork(nn.Module):
    """Q(s, .) is a linear function of what the model's LM head reads at the last token; it starts at 0.

    Tokens that the model itself or ``allowed_tokens`` forbids have a value so low that they are never chosen. On a
    table (`rlhf_gym.exact.tabular_policy`) the LM head reads the state, one-hot: the Q-function is a table too.

    Args:
        model: The model to start from, copied; its trunk is trained along.
        token_filter: The environment's.
        num_quantiles: Of the distribution of returns; None: its mean alone.
    """

    def __init__(self, model: PreTrainedModel, token_filter: TokenFilter, num_quantiles: int | None = None) -> None:
        super().__init__()
        self.lm, self.token_filter, self.num_quantiles = trainable_copy(model), token_filter, num_quantiles
        head, embeddings = self.lm.get_output_embeddings(), self.lm.get_input_embeddings()
        self.vocab_size, width = head.weight.shape
        self.width = getattr(self.lm, "value_width", width)
        if self.width == 1:
            raise ValueError(
                "the LM head of this table reads a number instead of a vector (the table has one state, or thousands), "
                "of which a linear Q-function makes nothing; start from policy='tabular' or policy='transformer'"
            )
        # The LM head is not used, but for what it forbids; embeddings that were tied to it are trained without it.
        tied = [] if embeddings is None else [p.data_ptr() for p in embeddings.parameters()]
        for name, p in list(head.named_parameters()):
            if p.data_ptr() in tied:
                setattr(head, name, nn.Parameter(p.detach().clone()))
        head.requires_grad_(False)
        self.q_head = nn.Linear(self.width, self.vocab_size * (num_quantiles or 1), bias=False)
        nn.init.zeros_(self.q_head.weight)

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """Values (n, V), or quantiles (n, num_quantiles, V), of n states, each sequence run once."""
        ids, rows, columns = share_prefixes(*sequences(obs))
        logits, hidden, _ = forward_at(self.lm, ids, rows[None], columns[None], use_cache=False)
        return self.values(logits[0], hidden[0])

    def values(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The same where the model's logits (n, V) and its head's inputs (n, d) are known."""
        values = self.q_head(hidden[:, : self.width]).unflatten(-1, (-1, self.vocab_size))
        forbidden = logits.detach() == -torch.inf
        mask = self.token_filter.mask(logits)
        if mask is not None:
            forbidden = forbidden | ~mask
        values = values.masked_fill(forbidden[:, None], FORBIDDEN)
        return values[:, 0] if self.num_quantiles is None else values

    def best(self, values: Tensor) -> Tensor:
        """The greedy tokens, (n,) int64; of equals the first."""
        return (values if self.num_quantiles is None else values.mean(1)).argmax(-1)

    @torch.no_grad()
    def greedy_table(self) -> TableForCausalLM | None:
        """The greedy policy as a table, where the model is one."""
        if not isinstance(self.lm, TableForCausalLM):
            return None
        table = copy.deepcopy(self.lm).requires_grad_(False)
        states = torch.arange(table.config.num_states, device=self.q_head.weight.device)
        values = self.values(self.lm.row_logits(), encode_states(states, table.config.num_states))
        set_rows(table, certain(self.best(values), self.vocab_size))
        return table

    @torch.no_grad()
    def greedy_weights(self) -> PreTrainedModel:
        """The model with SHARPNESS * Q as its logits: the greedy policy but for equal values, and it can be saved."""
        lm = copy.deepcopy(self.lm).requires_grad_(False)
        weight = SHARPNESS * self.q_head.weight.detach().unflatten(0, (-1, self.vocab_size)).mean(0)
        head = lm.get_output_embeddings()
        if hasattr(head, "reference"):  # a network on top of a table, of which only what it forbids is left
            head.reference[head.reference > -torch.inf] = 0.0
            head.linear.weight.copy_(weight)
            head.linear.bias.zero_()
            return lm
        has_bias = getattr(head, "bias", None) is not None  # as the model's class will want to load it
        sharp = nn.Linear(self.width, self.vocab_size, bias=has_bias, device=weight.device)
        sharp.weight.copy_(weight)
        if has_bias:
            sharp.bias.zero_()
        lm.config.tie_word_embeddings = False
        lm.set_output_embeddings(sharp.requires_grad_(False))
        lm.all_tied_weights_keys = {}  # what save_pretrained would leave out
        for config in (lm.config, lm.config.get_text_config()):
            if getattr(config, "final_logit_softcapping", None):  # it would make all large values equal
                config.final_logit_softcapping = None
        return lm


class GreedyLM(DerivedLM):
    """The greedy policy of a Q-network as a causal language model: the best token has probability 1.

    Args:
        network: Copied.
    """

    def __init__(self, network: LMQNetwork) -> None:
        network = copy.deepcopy(network).requires_grad_(False)
        super().__init__(network.lm)
        self.network = network

    @torch.no_grad()
    def next_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """See `DerivedLM`."""
        return certain(self.network.best(self.network.values(logits, hidden)), self.network.vocab_size)


class LMQPolicy(BasePolicy):
    """A Q-network and its target, as Stable-Baselines3's DQN and sb3-contrib's QR-DQN want them.

    Args:
        observation_space: ``Dict(input_ids, attention_mask)``, right-padded.
        action_space: ``Discrete(V)`` with the model's vocabulary size.
        lr_schedule: SB3's.
        language_model: The model to start from; it is copied and never changed.
        token_filter: The environment's.
        n_quantiles: For QR-DQN; None for DQN.
        optimizer_class, optimizer_kwargs: SB3's.

    Raises:
        TypeError, ValueError: As `LMActorCriticPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any,
        *,
        language_model: LanguageModel | PreTrainedModel,
        token_filter: TokenFilter | None = None,
        n_quantiles: int | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        token_filter = token_filter or TokenFilter()
        model = language_model.model if isinstance(language_model, LanguageModel) else language_model
        check_spaces(observation_space, action_space, model)
        if token_filter.uses_reference:
            raise ValueError(
                "top_k and top_p of the reference forbid other tokens in every state, and a replay buffer keeps no "
                "masks; use TopKAction, whose actions are the k tokens, or an environment without them"
            )
        super().__init__(observation_space, action_space)
        self.network = LMQNetwork(model, token_filter, n_quantiles)
        self.target = LMQNetwork(model, token_filter, n_quantiles).requires_grad_(False)
        self.target.load_state_dict(self.network.state_dict())
        self.n_quantiles = n_quantiles
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(trained, lr=lr_schedule(1), **(optimizer_kwargs or {}))

    # The names that DQN and QR-DQN know them by.
    q_net = quantile_net = property(lambda self: self.network)
    q_net_target = quantile_net_target = property(lambda self: self.target)

    def forward(self, obs: dict[str, Tensor], deterministic: bool = True) -> Tensor:
        """The best token of each state, (n,) int64."""
        return self._predict(obs, deterministic)

    def _predict(self, observation: dict[str, Tensor], deterministic: bool = True) -> Tensor:
        return self.network.best(self.network(observation))
