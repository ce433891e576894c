"""sb3-contrib's RecurrentPPO with an LSTM language model: what was written is remembered, not read again.

A step of a rollout reads one token, from the state that the last step left; the first step of an episode reads the
prompt. Unlike a control task's observations, a text is its whole history. So an update reads each part of an episode from
the episode's beginning, where the stock policies start from the state that was recorded in the rollout: there is no
gradient cut short and no state of older weights (the first step after an update reads the whole text for that reason).

Objective: that of Stable-Baselines3's PPO, E[score] - kl_coef * KL(pi || pi_ref) over whole responses. It differs from
that in its minibatches, which are made of stretches of episodes and not of single tokens.

Source:
    ``sb3_contrib.RecurrentPPO``; Hausknecht and Stone 2015, arXiv:1507.06527.
"""

from __future__ import annotations

from typing import Any

import sb3_contrib
import torch
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from torch import Tensor, nn

from rlhf_gym.exact.table import TableForCausalLM, read_tokens
from rlhf_gym.lm.forward import forward_at

from .algorithms import SB3PPO
from .policy import LMActorCriticPolicy, sequences

States = tuple[Tensor, Tensor]


class LMRecurrentPolicy(LMActorCriticPolicy):
    """`LMActorCriticPolicy` for an LSTM that carries its state (h, c) from step to step, (layers, rows, width) each.

    The critic reads the same hidden state. ``predict`` needs no state: it reads the whole text, which comes to the same.

    Raises:
        TypeError: If the model is no LSTM (`rlhf_gym.lm.LSTMForCausalLM`, ``rlhf_gym.exact.residual_policy(envs, "lstm")``).
    """

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        if not any(isinstance(module, nn.LSTM) for module in self.lm.modules()):
            raise TypeError(
                f"RecurrentPPO trains an LSTM, got a {type(self.lm).__name__}; pass policy='lstm' (tasks whose reference "
                "is a table) or an LSTMForCausalLM"
            )
        if self.critic_lm is not None:
            raise ValueError("critic='separate' would need states of its own; RecurrentPPO has critic='shared' only")

    @property
    def lstm_actor(self) -> nn.LSTM:
        """The LSTM, whose sizes the algorithm asks for."""
        return next(module for module in self.lm.modules() if isinstance(module, nn.LSTM))

    _moved = True  # whether the weights have changed since the last step of a rollout

    def set_training_mode(self, mode: bool) -> None:
        """Train or eval mode, as SB3 sets it; an update is about to come with the first."""
        self._moved = self._moved or mode
        super().set_training_mode(mode)

    # What a recurrent algorithm calls takes states too.

    def forward(  # type: ignore[override]
        self, obs: dict[str, Tensor], lstm_states: RNNStates, episode_starts: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, RNNStates]:
        """Samples a token per row.

        Returns:
            Tokens (B,) int64, values (B, 1), log-probs (B,) and the states after what has been read.
        """
        logits, hidden, states = self._read(obs, lstm_states.pi, episode_starts, from_beginning=self._moved)
        self._moved = False
        logprobs = self.token_filter.logprobs(logits, self._mask(logits))
        actions = self._choose(logprobs, deterministic)
        return actions, self.value_head(hidden), logprobs.gather(1, actions[:, None])[:, 0], RNNStates(states, states)

    def evaluate_actions(  # type: ignore[override]
        self, obs: dict[str, Tensor], actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values (n, 1), log-probs (n,) and entropies (n,) of n states with their actions."""
        logits, hidden, _ = self._read(obs, lstm_states.pi, episode_starts, from_beginning=True)
        distribution = self._distribution(logits)
        return self.value_head(hidden), distribution.log_prob(actions), distribution.entropy()

    def predict_values(  # type: ignore[override]
        self, obs: dict[str, Tensor], lstm_states: States, episode_starts: Tensor
    ) -> Tensor:
        """Values of n states, (n, 1)."""
        return self.value_head(self._read(obs, lstm_states, episode_starts)[1])

    def _read(
        self, obs: dict[str, Tensor], states: States, starts: Tensor, from_beginning: bool = False
    ) -> tuple[Tensor, Tensor, States]:
        """Reads some sequences of states, each of one episode.

        Args:
            obs: S sequences of T states, one behind the other, padded with empty texts. Arrays (S * T, L).
            states: Of the LSTM before the first state of each sequence: after all tokens but its last. (layers, S, width)
            starts: 1 where an episode begins, which can only be the first state of a sequence. Shape (S * T,).
            from_beginning: Read whole texts, whatever ``states`` says.

        Returns:
            Logits (S * T, V), hidden states (S * T, d), and the states after the last token of each sequence.
        """
        ids, lengths = sequences(obs)
        num_sequences = states[0].shape[1]
        lengths, anew = lengths.view(num_sequences, -1), starts.view(num_sequences, -1)[:, 0] > 0
        if from_beginning:
            anew = torch.ones_like(anew)
        rows = torch.arange(num_sequences, device=ids.device)[:, None]
        # All others are prefixes of the longest.
        whole = ids.view(num_sequences, -1, ids.shape[1])[rows[:, 0], lengths.argmax(1)]
        first = torch.where(anew, 0, lengths[:, 0] - 1)[:, None]
        num_tokens = lengths.max(1).values[:, None] - first
        offsets = torch.arange(int(num_tokens.max()), device=ids.device)
        tokens = whole.gather(1, (first + offsets).clamp(max=whole.shape[1] - 1))
        past: tuple[Tensor, ...] = tuple(torch.where(anew[:, None], 0.0, state) for state in states)
        if hasattr(self.lm, "transitions"):  # a table beneath the LSTM has read the same tokens
            past = (*past, self._table_states(whole, first)[None])
        logits, hidden, output = forward_at(
            self.lm,
            tokens,
            rows,
            (lengths - 1 - first).clamp(min=0),
            past_key_values=past,
            attention_mask=(offsets < num_tokens).long(),
            use_cache=True,
        )
        hidden = hidden.flatten(0, 1)[:, : self.value_width]
        return logits.flatten(0, 1), hidden, tuple(output.past_key_values[:2])

    def _table_states(self, ids: Tensor, first: Tensor) -> Tensor:
        """The table's state before the token ``first`` (S, 1) of each text (S, L). Shape (S, 1), int64."""
        start = torch.full_like(first, self.lm.config.start_state)
        visited = read_tokens(self.lm.transitions, start[:, 0], ids)
        return torch.cat([start, visited], 1).gather(1, first)


# Not a subclass: its constructor builds another network. The algorithm asks for no more than the methods.
RecurrentActorCriticPolicy.register(LMRecurrentPolicy)


class RecurrentPPO(SB3PPO):
    """sb3-contrib's RecurrentPPO; see the module's docstring and ``SB3PPOConfig`` (``critic`` must be "shared").

    ``policy=None`` is a copy of the environment's reference where that is an LSTM, and an LSTM that begins as the
    reference (``policy="lstm"``) where it is a table.
    """

    algorithm_class = sb3_contrib.RecurrentPPO
    policy_class = LMRecurrentPolicy
    buffer_class = None  # it takes no other than its own, which keeps the LSTM's states too

    def make_policy(self, policy: Any, arguments: dict[str, Any]) -> None:
        """Puts ``policy_kwargs`` into the algorithm's arguments."""
        reference = getattr(getattr(self.envs.unwrapped, "language_model", None), "model", None)
        if policy is None and isinstance(reference, TableForCausalLM):
            policy = "lstm"
        super().make_policy(policy, arguments)
