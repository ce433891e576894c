"""The parts of a trust-region update: Fisher-vector products, the natural gradient, the line search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, kl_divergence
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Where all probabilities are 0 or 1 the curvature is 0 as well; a step is never longer than (2 target_kl / this)^.5.
_LEAST_DAMPING = 1e-6


def natural_direction(
    fisher: Callable[[Tensor], Tensor], gradient: Tensor, *, damping: float, relative: bool, max_iter: int
) -> tuple[Tensor, float, float]:
    """The damped natural gradient d = (F + damping I)^-1 g, by conjugate gradients.

    Args:
        fisher: v -> F v.
        gradient: g, flat.
        damping: Added to the diagonal of F.
        relative: It is in units of g^T F g / g^T g, the curvature along the gradient.
        max_iter: Fisher-vector products of the solver.

    Returns:
        d, the curvature along it d^T (F + damping I) d (NaN for a gradient of 0), and the damping that was added.
    """
    if relative:
        damping = max(damping * float(gradient @ fisher(gradient) / (gradient @ gradient)), _LEAST_DAMPING)

    def damped(vector: Tensor, **_: Any) -> Tensor:
        return fisher(vector) + damping * vector

    direction = conjugate_gradient_solver(damped, gradient, max_iter=max_iter)
    return direction, float(direction @ damped(direction)), damping


def hessian_vector_product(
    losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """The function v -> H v, where H is the Hessian of the sum of the losses.

    H v = d/dtheta (grad L . v), summed over the losses. A single loss is evaluated now, and its graph kept for every
    product; several are evaluated anew for each product, so that one graph is in memory at a time.

    Args:
        losses: Each returns a scalar that depends on the parameters, twice differentiable.
        parameters: Tensors that require gradients; v is flat, in their order.

    Returns:
        A function of a flat vector.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product([lambda: (x ** 3).sum()], [x])(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """

    def gradient(loss: Callable[[], Tensor]) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True))

    kept = [gradient(losses[0])] if len(losses) == 1 else None

    def product(vector: Tensor) -> Tensor:
        pieces = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]
        result = torch.zeros_like(vector)
        for grads in kept if kept is not None else map(gradient, losses):
            dot = sum((g * v).sum() for g, v in zip(grads, pieces, strict=True) if g is not None)
            seconds = torch.autograd.grad(dot, parameters, retain_graph=kept is not None, allow_unused=True)
            flat = [torch.zeros_like(p) if s is None else s for s, p in zip(seconds, parameters, strict=True)]
            result = result + torch.cat([f.reshape(-1) for f in flat])
        return result

    return product


@torch.no_grad()
def line_search(
    parameters: Sequence[Tensor],
    step: Tensor,
    measure: Callable[[], Any],
    acceptable: Callable[[Any], bool],
    *,
    shrink: float,
    max_iter: int,
) -> Any | None:
    """Tries ever shorter steps, in place, until one is acceptable; else restores the parameters, whatever ends it.

    Args:
        parameters: Changed in place.
        step: Flat, in their order: the longest step.
        measure: Measures the parameters as they then are.
        acceptable: Judges what was measured.
        shrink: Factor from one try to the next, in (0, 1).
        max_iter: Number of tries.

    Returns:
        What was measured at the accepted step, or None.
    """
    original = [p.detach().clone() for p in parameters]
    pieces = [s.view_as(p) for s, p in zip(step.split([p.numel() for p in parameters]), parameters, strict=True)]
    accepted = False
    try:
        for i in range(max_iter):
            for p, start, piece in zip(parameters, original, pieces, strict=True):
                p.copy_(start + shrink**i * piece)
            measured = measure()
            accepted = acceptable(measured)
            if accepted:
                return measured
        return None
    finally:  # also when it was interrupted: a trial step must not be taken for the result
        if not accepted:
            for p, start in zip(parameters, original, strict=True):
                p.copy_(start)


def mean_kl(new: Distribution, old: Distribution) -> Tensor:
    """KL(new || old), the mean over the states, in nats; differentiable."""
    if isinstance(new, CategoricalDistribution):
        # torch's own is the same, but calls it infinite where the old probability has underflowed to 0.
        p, q = new.distribution, old.distribution
        return (p.probs * (p.logits - q.logits)).sum(-1).mean()
    return kl_divergence(new, old).mean()


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention and recurrent layers run in kernels with a second derivative, which the fast ones lack."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
