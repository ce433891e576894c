"""The losses, as pure functions of scores. All in nats per judgement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ORDERS = 24
_FAR = -1e30  # finite: the difference of two infinities would be NaN


def plackett_luce(scores: Tensor, mask: Tensor, margins: Tensor | None = None) -> Tensor:
    """-log P(order) for responses sorted from the best to the worst.

    P = prod_j exp(s_j) / sum_{i >= j} exp(s_i): the best is chosen among all, then the second among the others, and so
    on. Of two responses it is Bradley and Terry's model, P = sigmoid(s_0 - s_1).

    Args:
        scores: From best to worst, anything where the mask is False. Shape (M, K), float.
        mask: True where there is a response; True before False in each row. Shape (M, K), bool.
        margins: Added to the scores of all but the best: of a pair it asks for s_0 - s_1 > margin. Shape (M,).

    Returns:
        Shape (M,), >= 0.

    Source:
        Plackett 1975; Bradley and Terry 1952. The margin is that of Llama 2 (Touvron et al. 2023, eq. 2).

    Example:
        >>> equal = torch.tensor([[1.0, 1.0, 1.0]])
        >>> plackett_luce(equal, torch.ones(1, 3, dtype=torch.bool)).exp().round()  # one of 3! orders
        tensor([6.])
    """
    if margins is not None:
        scores = scores + torch.cat([torch.zeros_like(scores[:, :1]), margins[:, None].expand_as(scores[:, 1:])], 1)
    scores = scores.masked_fill(~mask, _FAR)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)
    return torch.where(mask, remaining - scores, 0.0).sum(1)


def orders_of(ranks: Sequence[float], label_smoothing: float = 0.0) -> list[tuple[tuple[int, ...], float]]:
    """The orders that a judgement may mean, with weights that sum to 1.

    Tied responses stand in every order, with equal weights: half a win for each of two. Rao and Kupper's model has a
    parameter for ties instead; here there is none, since it would measure how readily people press "tie", it differs
    between them, and a saved classifier has no place for it. With label smoothing the reverse orders have that weight.

    Args:
        ranks: Rank of each response, the best has the smallest.
        label_smoothing: Probability that the judgement is the wrong way round.

    Returns:
        Indices of the responses from the best to the worst, and the weight.

    Raises:
        ValueError: If ties leave more than 24 orders open.

    Example:
        >>> orders_of([0, 0])
        [((0, 1), 0.5), ((1, 0), 0.5)]
    """
    levels = [[i for i, rank in enumerate(ranks) if rank == level] for level in sorted(set(ranks))]
    count = math.prod(math.factorial(len(level)) for level in levels)
    if count > MAX_ORDERS:
        raise ValueError(f"ties leave {count} orders of a ranking open, more than {MAX_ORDERS}; rank fewer alike")
    orders = [tuple(itertools.chain(*parts)) for parts in itertools.product(*map(itertools.permutations, levels))]
    weighted = [(order, (1 - label_smoothing) / count) for order in orders]
    if label_smoothing:
        weighted += [(order[::-1], label_smoothing / count) for order in orders]
    return weighted


def ordinal(scores: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """-log P(level) under the cumulative logit model, P(level > k) = sigmoid(score - thresholds[k]).

    Args:
        scores: Shape (N,), float.
        levels: 0 is the worst. Shape (N,), int64.
        thresholds: Increasing. Shape (num_levels - 1,).

    Returns:
        Shape (N,), >= 0.

    Source:
        McCullagh 1980, "Regression models for ordinal data", with proportional odds.
    """
    above = F.pad(scores[:, None] - thresholds, (1, 1))  # logit of "at least this level", with its ends below
    columns = torch.arange(len(thresholds) + 2, device=scores.device)
    above = torch.where(columns == 0, -_FAR, torch.where(columns == len(thresholds) + 1, _FAR, above))
    lower, upper = (above.gather(1, levels[:, None] + step)[:, 0] for step in (0, 1))
    # log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)), stable for all a > b.
    gap = torch.where((levels > 0) & (levels < len(thresholds)), lower - upper, 1e3)
    return -(F.logsigmoid(lower) + F.logsigmoid(-upper) + torch.log(-torch.expm1(-gap.clamp(min=1e-6))))


def ordered(free: Tensor) -> Tensor:
    """Increasing thresholds from the first and the logarithms of the steps. Shape (num_levels - 1,)."""
    return torch.cat([free[:1], free[:1] + free[1:].exp().cumsum(0)])
