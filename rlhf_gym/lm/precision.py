"""bf16 compute weights with float32 masters.

bfloat16 has 8 significant bits: between 1 and 2 its numbers are 0.0078 apart, so an Adam step of 1e-5 added to a bf16
weight of that size rounds away, every time. The forward and backward passes do not mind the format and are much faster
in it; the sum of many small steps does. So the steps are added up in a float32 copy, and the model gets the rounded
sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """An optimiser over float32 masters of a model's parameters.

    Parameters that stay in float32 are their own masters, at no cost: a float32 model trains bit for bit as with the
    bare optimiser, and a model may mix both. Parameters that do not require a gradient are left out.

    Gradients of several micro-batches are added in float32 if `accumulate` is called after each backward; without it
    they add up in the parameters' own format, where the last small ones are lost.

    Attributes:
        parameters: The trained parameters, in the order given.
        masters: Their float32 masters, in the same order; for a float32 parameter the parameter itself.
        optimizer: The optimiser over the masters (learning-rate schedules set its ``param_groups``).

    Args:
        parameters: The model's parameters. float32, bfloat16 or float16 (which gets no loss scaling here).
        optimizer_factory: Makes the optimiser from the list of masters, e.g. ``partial(torch.optim.AdamW, lr=1e-5)``.
        compute_dtype: What to round the parameters to, in place; the masters keep their float32 values. None leaves
            each in its own. Only parameters: ``model.to(torch.bfloat16)`` would round buffers too, and with them the
            frequencies of rotary position embeddings.

    Raises:
        ValueError: If no parameter requires a gradient, or the optimiser was given other tensors.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> trainer = MasterWeights([weight], lambda masters: torch.optim.SGD(masters, lr=0.001))
        >>> for _ in range(10):
        ...     weight.sum().neg().backward()
        ...     _ = trainer.step()
        >>> round(trainer.masters[0].item(), 4), weight.item()
        (1.01, 1.0078125)
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer_factory: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("parameters must hold at least one that requires a gradient: everything is frozen.")
        self.masters: list[Tensor] = []
        for parameter in self.parameters:
            dtype = compute_dtype or parameter.dtype
            self.masters.append(parameter.detach().float().requires_grad_() if dtype in _HALF else parameter)
            parameter.data = parameter.data.to(dtype)
        self.optimizer = optimizer_factory(self.masters)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if {id(p) for p in held} != {id(m) for m in self.masters}:
            raise ValueError("optimizer_factory must put all the masters that it is given, and only those, to use.")

    def accumulate(self) -> None:
        """Move the gradients of the last backward over to the masters, adding to what is there. Free in float32."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

    def zero_grad(self) -> None:
        """Forget all gradients, of the parameters and of the masters."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def step(self, max_grad_norm: float = torch.inf) -> Tensor:
        """Take one optimiser step on the masters, round them into the parameters, forget the gradients.

        Args:
            max_grad_norm: All gradients together are scaled down to this Euclidean norm when it is larger.

        Returns:
            The norm before scaling. Shape (), float32.

        Raises:
            ValueError: If a gradient is NaN or infinite. The weights and the optimiser's state are as they were, the
                gradients are forgotten.
        """
        self.accumulate()
        norm = self._clip(max_grad_norm)
        if not bool(norm.isfinite()):
            self.zero_grad()
            raise ValueError(
                f"the gradient's norm must be finite, got {norm.item()}; no step was taken. Lower the learning rate, or "
                "look for extreme rewards"
            )
        self.optimizer.step()
        self.copy_to_parameters()
        self.zero_grad()
        return norm

    def _clip(self, max_grad_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.masters, max_grad_norm)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    @contextmanager
    def master_precision(self) -> Iterator[None]:
        """Give the model its float32 masters for a while: to save it without rounding, or to load weights into it.

        What is written into the parameters meanwhile stays, rounded after the end.
        """
        rounded = [parameter.data for parameter in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = master.data
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, rounded, strict=True):
                parameter.data = data
            self.copy_to_parameters()

    def divide(self) -> None:
        """Called before an update, for those who divide the parameters among processes: here each has all of them."""

    def gather(self) -> None:
        """Called after an update, which leaves them divided."""

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a part of the model, to be saved; inside of `master_precision` without rounding."""
        return module.state_dict()

    def load_weights(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """Replace the state of a part of the model. The masters follow with `load_state_dict`."""
        module.load_state_dict(weights)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is needed to go on bit for bit, besides the parameters themselves.

        Returns:
            Tensors, for a safetensors file: ``master.{i}`` of the parameters that have one of their own and
            ``optimizer.{i}.{name}`` (AdamW: exp_avg, exp_avg_sq, step), copies; and JSON-able scalars: the optimiser's
            settings and those of its states that are no tensors.
        """
        optimizer = self.optimizer.state_dict()
        tensors = {f"master.{i}": self._saved(master) for i, master in self._own_masters().items()}
        scalars: dict[str, Any] = {"param_groups": optimizer["param_groups"], "state": {}}
        for index, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = self._saved(value)
                else:
                    scalars["state"].setdefault(str(index), {})[name] = value
        return tensors, scalars

    def load_state_dict(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Go on from a saved state. The parameters are then the rounded masters.

        Args:
            tensors: The tensors of `state_dict`.
            scalars: Its scalars, also after a round trip through JSON.

        Raises:
            ValueError: If the state is of another model: masters missing, too many, or of another shape. Nothing has
                been changed then.
        """
        own = {f"master.{i}": master for i, master in self._own_masters().items()}
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith("master.")}
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(
                f"The saved optimiser state does not fit this model: it has {len(saved)} float32 master weights, the "
                f"model needs {len(own)} of its own shapes. Was it saved in another precision or for another model?"
            )
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in scalars["state"].items()}
        for key, tensor in tensors.items():
            if not key.startswith("optimizer."):
                continue
            index, name = int(key.split(".")[1]), key.split(".", 2)[2]
            # Adam's step is a single number, the moments have the shape of their weights.
            if index >= len(held) or tensor.shape not in ((), held[index].shape):
                raise ValueError(
                    f"The saved optimiser state does not fit this model: {key} has shape {tuple(tensor.shape)}. "
                    "Was it saved for another model?"
                )
            state.setdefault(index, {})[name] = self._held(tensor, held[index])
        self.optimizer.load_state_dict({"state": state, "param_groups": scalars["param_groups"]})
        with torch.no_grad():
            for name, master in own.items():
                master.copy_(self._held(saved[name], master))
        self.copy_to_parameters()

    def _own_masters(self) -> dict[int, Tensor]:
        """The masters that are not the parameters themselves, by their number."""
        return {i: master for i, master in enumerate(self.masters) if master is not self.parameters[i]}

    def _saved(self, tensor: Tensor) -> Tensor:
        """A copy of a master or of an optimiser's tensor, for a file."""
        return tensor.detach().clone().contiguous()

    def _held(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor of a file as the optimiser holds it beside ``like``: a copy, since it is the caller's."""
        return tensor.clone()


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the forward passes: "float32", "bfloat16", or "auto" (bfloat16 on a CUDA device that has it, else
    float32)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "auto", "float32" or "bfloat16", got {name!r}')
    return getattr(torch, name)
