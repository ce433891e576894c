"""A Hugging Face causal language model as the policy of Stable-Baselines3's on-policy algorithms."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_gym.lm import LanguageModel, TokenFilter, disable_dropout, make_engine, sample_tokens
from rlhf_gym.lm.forward import forward_at

# Logit of a forbidden token where gradients flow: exp() of it is exactly 0, and unlike -inf it gives no NaN when two
# distributions are subtracted (-inf - -inf) or differentiated twice.
FORBIDDEN = -1e9


class PreparedStates(NamedTuple):
    """n states as `LMActorCriticPolicy.prepare` gives them, for several passes over the same ones: see
    `share_prefixes`."""

    ids: Tensor
    rows: Tensor
    columns: Tensor


class LMActorCriticPolicy(ActorCriticPolicy):
    """Next-token logits are the action logits; a linear value head reads the head's input of the last real token.

    The model is a float32 copy of the one given, without dropout, so that log-probs do not differ between rollout and
    update; SB3's orthogonal initialisation never touches it. The value head starts at 0.

    Rollouts (``forward`` and ``predict`` without gradients) go through the engine's cache: a step is the forward of one
    token, not of the whole context. Updates use *prefix sharing*: SB3 shuffles states, but a text state is a prefix of
    the later states of its episode, so a minibatch runs each longest sequence once and reads all prefixes out of it.
    The numbers are those of one forward per state, at a fraction of the cost where several states share an episode.

    Args:
        observation_space: ``Dict(input_ids, attention_mask)``, right-padded.
        action_space: ``Discrete(V)`` with the model's vocabulary size.
        lr_schedule: SB3's.
        language_model: The model to start from; it is copied and never changed.
        token_filter: The environment's: its temperature divides the policy's logits, its ``allowed_tokens`` bound them.
        separate_critic: Give the value head a copy of the model of its own, instead of the policy's hidden state.
        optimizer_class, optimizer_kwargs: SB3's.
        use_sde: SB3 passes it; must be False.

    Raises:
        TypeError: If the spaces are not those of text.
        ValueError: If the vocabulary does not fit, or if the filter cuts by the reference's top-k or top-p: what may be
            chosen then differs from state to state, and a plain algorithm keeps no masks for its update.
    """

    takes_masks = False

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any,
        *,
        language_model: LanguageModel | PreTrainedModel,
        token_filter: TokenFilter | None = None,
        separate_critic: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        token_filter = token_filter or TokenFilter()
        model = language_model.model if isinstance(language_model, LanguageModel) else language_model
        check_spaces(observation_space, action_space, model)
        if token_filter.uses_reference and not self.takes_masks:
            raise ValueError(
                "top_k and top_p of the reference forbid other tokens in every state, and this policy keeps no masks; "
                "use an algorithm with masks (MaskablePPO), or an environment with allowed_tokens or none of them"
            )
        if use_sde:
            raise ValueError("use_sde=True is for continuous actions; tokens are discrete")
        self._source = (model, separate_critic)  # in a tuple: nn.Module takes no submodules before its own __init__
        self.token_filter = token_filter
        self.max_tokens = observation_space["input_ids"].shape[0]
        self.generator: torch.Generator | None = None  # None: torch's global one, which SB3 seeds
        self._engines: dict[tuple[str, int], Any] = {}
        self._engine_weights: Any = None
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Any) -> None:
        model, separate_critic = self.__dict__.pop("_source")
        self.lm = trainable_copy(model)
        self.critic_lm = trainable_copy(model) if separate_critic else None
        # A model may say that only the first of the LM head's inputs are for a value head.
        self.value_width = getattr(self.lm, "value_width", self.lm.get_output_embeddings().weight.shape[1])
        self.value_head = nn.Linear(self.value_width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    # ---- the rollout: no gradients, cached

    def forward(self, obs: dict[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Samples a token per row.

        Returns:
            Tokens (B,) int64, values (B, 1) and log-probs (B,) float32.
        """
        if torch.is_grad_enabled():  # somebody wants gradients: the cache has none
            logits, hidden = self._last(self.lm, obs)
            values = self._values(obs, hidden)
        else:
            ids, lengths = sequences(obs)
            logits, hidden = self._cached("lm", ids, lengths)
            values = self.value_head(hidden if self.critic_lm is None else self._cached("critic_lm", ids, lengths)[1])
        logprobs = self.token_filter.logprobs(logits, self._mask(logits))
        actions = self._choose(logprobs, deterministic)
        return actions, values, logprobs.gather(1, actions[:, None])[:, 0]

    def _predict(self, observation: dict[str, Tensor], deterministic: bool = False) -> Tensor:
        logits, _ = self._cached("lm", *sequences(observation))
        return self._choose(self.token_filter.logprobs(logits, self._mask(logits)), deterministic)

    def _mask(self, logits: Tensor) -> Tensor | None:
        """Tokens that may be chosen where the policy's logits are these. Shape (n, V), bool; None: all."""
        return self.token_filter.mask(logits)

    def _choose(self, logprobs: Tensor, deterministic: bool) -> Tensor:
        if deterministic:
            return logprobs.argmax(-1)
        # On the CPU, so that a seed means the same on every device.
        uniforms = torch.rand(len(logprobs), generator=self.generator)
        return sample_tokens(logprobs.detach(), uniforms.to(logprobs.device))

    def _cached(self, name: str, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token logits (B, V) and hidden states (B, d) from the cache of one of our models."""
        weights = _weights_now(self)
        if weights != self._engine_weights:
            for engine in self._engines.values():
                engine.invalidate()
            self._engine_weights = weights
        key = (name, len(ids))
        if key not in self._engines:
            if len(self._engines) >= 4:  # training and evaluation, each with its critic
                del self._engines[next(iter(self._engines))]
            self._engines[key] = make_engine(getattr(self, name), len(ids), self.max_tokens)
        logits = self._engines[key].next_logits(ids, lengths)
        return logits, self._engines[key].last_hidden[:, : self.value_width].to(logits.dtype)

    def set_training_mode(self, mode: bool) -> None:
        """Train or eval mode, as SB3 sets it; an update is about to come with the first, so the cache is forgotten."""
        if mode:  # an optimizer may write through .data, which no version counter sees
            self._engine_weights = None
        super().set_training_mode(mode)

    # ---- the update: differentiable

    def prepare(self, obs: dict[str, Tensor]) -> PreparedStates:
        """Finds out once which of n states share a sequence; the methods below take the result instead of ``obs``."""
        return PreparedStates(*share_prefixes(*sequences(obs)))

    def evaluate_actions(self, obs: dict[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (n, 1), log-probs (n,) and entropies (n,) of n states with their actions."""
        logits, hidden = self._last(self.lm, obs)
        distribution = self._distribution(logits)
        return self._values(obs, hidden), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: dict[str, Tensor] | PreparedStates) -> Distribution:
        """The distribution of the next token in n states."""
        return self._distribution(self._last(self.lm, obs)[0])

    def predict_values(self, obs: dict[str, Tensor]) -> Tensor:
        """Values of n states, (n, 1)."""
        return self._values(obs, None)

    def value_features(self, obs: dict[str, Tensor]) -> Tensor | None:
        """What the value head reads in n states, (n, d), detached; None when the critic's model trains too."""
        return self._last(self.lm, obs)[1].detach() if self.critic_lm is None else None

    def sharing_order(self, obs: dict[str, Tensor]) -> Tensor:
        """An order of n states, (n,), in which those that share a sequence stand together."""
        return _lexicographic(*sequences(obs))[1].argsort(stable=True)

    def _values(self, obs: dict[str, Tensor], hidden: Tensor | None) -> Tensor:
        if self.critic_lm is not None:
            hidden = self._last(self.critic_lm, obs)[1]
        elif hidden is None:
            hidden = self._last(self.lm, obs)[1]
        return self.value_head(hidden)

    def _distribution(self, logits: Tensor) -> Distribution:
        # A model of ours may forbid tokens itself, by -inf.
        logits = (logits.float() / self.token_filter.temperature).clamp(min=FORBIDDEN)
        mask = self._mask(logits)
        return self.action_dist.proba_distribution(logits if mask is None else logits.masked_fill(~mask, FORBIDDEN))

    def _last(self, model: PreTrainedModel, obs: dict[str, Tensor] | PreparedStates) -> tuple[Tensor, Tensor]:
        """Logits (n, V) and hidden states (n, d) at the last real token of n states, each sequence run once."""
        ids, rows, columns = obs if isinstance(obs, PreparedStates) else self.prepare(obs)
        logits, hidden, _ = forward_at(model, ids, rows[None], columns[None], use_cache=False)
        return logits[0], hidden[0, :, : self.value_width]


def policy_kwargs(
    envs: Any, language_model: LanguageModel | PreTrainedModel | None = None, **more: Any
) -> dict[str, Any]:
    """``policy_kwargs`` of an SB3 algorithm that trains ``LMActorCriticPolicy`` on a text environment.

    Args:
        envs: The text environment, scalar or vector; its temperature and allowed tokens become the policy's.
        language_model: The model to start from; None is the environment's reference.
        **more: Further arguments of the policy, such as ``separate_critic=True``.

    Raises:
        ValueError: If there is no model to start from.
    """
    language_model = language_model or getattr(envs.unwrapped, "language_model", None)
    if language_model is None:
        raise ValueError("policy=None starts from the environment's reference, but it has none; pass a language model")
    return {"language_model": language_model, "token_filter": getattr(envs.unwrapped, "token_filter", None), **more}


def _weights_now(module: nn.Module) -> tuple[int, int]:
    """Two numbers that change when a parameter is written to in place or put elsewhere."""
    versions = addresses = 0
    modules = [module]
    while modules:  # several times as fast as parameters(), and this runs for every token
        module = modules.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                versions += parameter._version
                addresses += parameter.data_ptr()
        modules += [child for child in module._modules.values() if child is not None]
    return versions, addresses


def trainable_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy with every parameter trainable and no dropout, in any mode."""
    model = copy.deepcopy(model).float().requires_grad_(True)
    disable_dropout(model)
    return model


def share_prefixes(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fewest sequences that hold all the given ones as prefixes.

    Args:
        ids: Right-padded sequences; what stands after their ends does not matter. Shape (n, L), int64.
        lengths: Number of real tokens, at least 1. Shape (n,), int64.

    Returns:
        Sequences (u, L') of which none is a prefix of another; and for each given sequence the row (n,) that begins
        with it and the column (n,) of its last token.

    Example:
        >>> share_prefixes(torch.tensor([[5, 0], [5, 7], [6, 0]]), torch.tensor([1, 2, 1]))
        (tensor([[5, 7],
                [6, 0]]), tensor([0, 0, 1]), tensor([0, 1, 0]))
    """
    ordered, place = _lexicographic(ids, lengths)
    same = (ordered[:-1] == ordered[1:]) | (ordered[:-1] == -1)
    maximal = torch.ones(len(ordered), dtype=torch.bool, device=ids.device)
    maximal[:-1] = ~same.all(1)
    row = maximal.cumsum(0) - maximal.long()  # maximal sequences before it: the next one begins with it
    return ordered[maximal][:, : int(lengths.max())].clamp(min=0), row[place], lengths - 1


def _lexicographic(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct sequences (m, L), ended by -1s, in order, and each given one's place (n,) among them.

    An end comes before every token, so the extensions of a sequence follow right behind it.
    """
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    ids = torch.where(real, ids, -1)
    # As many columns as fit are the digits of one number, and numbers are sorted from the last to the first (stably, so
    # the first counts most): several times as fast as torch.unique, which compares whole rows.
    digits = (ids + 1).long()
    base = int(digits.max()) + 1
    width = max(1, int(62 / math.log2(max(2, base))))
    order = torch.arange(len(ids), device=ids.device)
    for columns in reversed(digits.split(width, dim=1)):
        number = columns[:, 0]
        for column in columns.unbind(1)[1:]:
            number = number * base + column
        order = order[number[order].argsort(stable=True)]
    ordered = ids[order]
    is_new = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    place = torch.empty_like(order)
    place[order] = is_new.cumsum(0) - 1
    return ordered[is_new], place


def sequences(obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return obs["input_ids"].long(), obs["attention_mask"].long().sum(-1)


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space, model: PreTrainedModel) -> None:
    keys = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else None
    if keys != {"input_ids", "attention_mask"}:
        raise TypeError(f"observations must be Dict(input_ids, attention_mask), right-padded, got {observation_space}")
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"{type(model).__name__} has no output embedding (language-model head), which the value head needs"
        )
    if not isinstance(action_space, spaces.Discrete) or action_space.n != head.weight.shape[0]:
        raise ValueError(
            f"actions must be Discrete({head.weight.shape[0]}), the model's vocabulary, got {action_space}"
        )
