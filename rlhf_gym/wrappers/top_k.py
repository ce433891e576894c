"""The reference's k likeliest tokens as the actions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from .hidden_state import text_process

if TYPE_CHECKING:
    from rlhf_gym.envs.core import TextGenerationProcess

FORBIDDEN = ("error", "likeliest")


class TopKAction(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Choose among the reference's k likeliest tokens: action i is the token that it finds (i + 1)-th likeliest.

    Which token that is differs from state to state (`action_tokens`); the observation determines it, as it determines
    what the reference says next.

    **KL.** Rewards are the environment's own, and log pi of an action is log pi of its token, so everything that
    announces log-probs goes on doing so. The KL is to the environment's reference: to the whole of it, where the
    environment has no ``top_k``. A policy on k tokens then pays at least -log of their probability for each token, even
    where it is the reference cut to them. Make the environment with ``top_k=k`` for a KL to the reference renormalised
    on the k tokens, which is 0 there. The sum over all actions may be announced too, ``announce_logprobs`` of shape (k,).

    **Fewer than k.** In some states fewer than k tokens may be possible (``allowed_tokens``, ``top_p``, words that a
    table forbids). The other actions are forbidden there: ``action_masks()`` and ``info["action_mask"]`` say so, and to
    choose one is an error. For algorithms without masks ``forbidden="likeliest"`` makes them mean the likeliest token;
    several actions are then one token, whose log-prob is no longer that of the action, and with ``kl_coef > 0`` all k
    log-probs must be announced (``AnnounceLogprobs`` does).

    Args:
        env: A text-generation environment with a reference.
        k: Number of actions, from 1 to V; None is the environment's own ``top_k``.
        forbidden: "error" or "likeliest".

    Raises:
        TypeError: If ``env`` is no such environment.
        ValueError: If ``k`` is missing or out of range, or ``forbidden`` unknown.
    """

    def __init__(self, env: gym.Env, k: int | None = None, forbidden: str = "error"):
        gym.utils.RecordConstructorArgs.__init__(self, k=k, forbidden=forbidden)
        gym.Wrapper.__init__(self, env)
        self.ranks = Ranks(text_process(env), k, forbidden)
        self.action_space = spaces.Discrete(self.ranks.k)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As the environment's."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._with_masks(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Append the token that the action stands for.

        Raises:
            ValueError: For an action out of range or forbidden, and as the environment's. Nothing has changed then.
        """
        token = int(self.ranks.choose(torch.as_tensor(action).reshape(-1))[0])
        observation, reward, terminated, truncated, info = self.env.step(token)
        return observation, reward, terminated, truncated, self._with_masks(info)

    def action_tokens(self) -> np.ndarray:
        """The token of each action, (k,) int64; anything when the episode has ended."""
        return self.ranks.ranked()[0][0].cpu().numpy().copy()

    def action_masks(self) -> np.ndarray:
        """True where an action may be chosen, (k,) bool."""
        return self.ranks.ranked()[1][0].cpu().numpy().copy()

    def announce_logprobs(self, logprobs: Any) -> None:
        """Tell log pi of the next action: a number or (1,) in nats, or those of all actions, (k,) or (1, k)."""
        announced = torch.as_tensor(logprobs)
        if announced.dim() == 0:
            announced = announced.reshape(1)
        elif announced.dim() == 1 and len(announced) > 1:
            announced = announced[None]
        self.unwrapped.announce_logprobs(self.ranks.announced(announced))

    @property
    def needs_all_logprobs(self) -> bool:
        """Whether an announcement must hold the log-probs of all actions."""
        return self.ranks.share_tokens

    def _with_masks(self, info: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" not in info:
            return info
        info = {key: value for key, value in info.items() if key != "action_mask"}
        return info if self.ranks.share_tokens else info | {"action_mask": self.action_masks().astype(np.int8)}


class Ranks:
    """Tokens by how likely the reference finds them, for all rows of a process.

    Args:
        process: With a reference.
        k, forbidden: See `TopKAction`.
    """

    def __init__(self, process: TextGenerationProcess, k: int | None, forbidden: str):
        if k is None:
            k = process.token_filter.top_k
        if k is None or isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= process.vocab_size:
            raise ValueError(
                f"k must be an integer from 1 to the vocabulary size {process.vocab_size} (None takes the "
                f"environment's top_k), got {k!r}"
            )
        if forbidden not in FORBIDDEN:
            raise ValueError(f"forbidden must be one of {', '.join(map(repr, FORBIDDEN))}, got {forbidden!r}")
        self.process, self.k, self.forbidden = process, int(k), forbidden

    @property
    def share_tokens(self) -> bool:
        """Whether several actions can stand for one token."""
        return self.forbidden == "likeliest" and self.process.forbids_tokens

    def ranked(self) -> tuple[Tensor, Tensor]:
        """What each action stands for (N, k) int64, and which may be chosen (N, k) bool: all in rows that have ended."""
        tokens, possible = rank_tokens(self.process.next_ref_logprobs(), self.k)
        if self.forbidden == "likeliest":
            return torch.where(possible, tokens, tokens[:, :1]), torch.ones_like(possible)
        return tokens, possible | self.process.ended[:, None]

    def choose(self, actions: Any) -> Tensor:
        """The tokens of some actions.

        Args:
            actions: Shape (N,), any integer dtype. In rows that have ended they may be anything.

        Returns:
            Shape (N,), int64.

        Raises:
            ValueError: For an action out of range or forbidden, or a wrong shape or dtype.
        """
        process = self.process
        actions = torch.as_tensor(actions, device=process.device)
        if tuple(actions.shape) != (process.num_rows,) or actions.is_floating_point() or actions.dtype == torch.bool:
            raise ValueError(
                f"actions must be integers of shape ({process.num_rows},), got {actions.dtype} of shape "
                f"{tuple(actions.shape)}"
            )
        inside = (actions >= 0) & (actions < self.k)
        if bool((~inside & ~process.ended).any()):
            row = int((~inside & ~process.ended).nonzero()[0])
            raise ValueError(f"action must be in [0, {self.k}), got {int(actions[row])} in row {row}")
        chosen = torch.where(inside, actions.long(), 0)[:, None]
        tokens, allowed = self.ranked()
        bad = ~allowed.gather(1, chosen)[:, 0]
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"action {int(actions[row])} in row {row} is forbidden here: fewer tokens are possible. Choose where "
                'action_masks() is True, or make the wrapper with forbidden="likeliest"'
            )
        return tokens.gather(1, chosen)[:, 0]

    def announced(self, logprobs: Any) -> Tensor:
        """An announcement about actions as one about tokens.

        Args:
            logprobs: In nats, of the actions that will be taken (N,), or of all actions (N, k).

        Returns:
            Shape (N,) or (N, V).

        Raises:
            ValueError: If all are needed, or the shape is wrong.
        """
        process = self.process
        logprobs = torch.as_tensor(logprobs, device=process.device).detach()
        shape = tuple(logprobs.shape)
        if shape == (process.num_rows,) and not (self.share_tokens and process.needs_announcement):
            return logprobs
        if shape != (process.num_rows, self.k):
            if shape == (process.num_rows,):
                raise ValueError(
                    f"logprobs must be those of all actions, shape ({process.num_rows}, {self.k}): with "
                    'forbidden="likeliest" several of them may stand for one token, and one log-prob does not say how '
                    "likely that is"
                )
            raise ValueError(
                f"logprobs must have shape ({process.num_rows},) or ({process.num_rows}, {self.k}), got {shape}"
            )
        probs = torch.zeros(process.num_rows, process.vocab_size, device=process.device)
        return probs.scatter_add_(1, self.ranked()[0], logprobs.float().exp()).log()


def rank_tokens(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens (..., k) int64, likeliest first and equals by their ids, and which are possible at all.

    Example:
        >>> rank_tokens(torch.tensor([0.2, 0.0, 0.6, 0.2]).log(), 4)
        (tensor([2, 0, 3, 1]), tensor([ True,  True,  True, False]))
    """
    # Only the order of equals is sorted out, not the vocabulary.
    tokens = logprobs.topk(k, sorted=False).indices.sort(-1).values
    values = logprobs.gather(-1, tokens)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return tokens.gather(-1, order), values.gather(-1, order) > -torch.inf
