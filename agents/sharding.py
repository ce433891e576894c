"""A policy whose training state is divided among the processes of a run, by PyTorch's FSDP2 (``fully_shard``).

Of float32 weights, gradients and Adam's moments, 16 bytes a weight, each of N processes holds an N-th. During an update
a transformer block's weights are gathered from all processes, in the dtype that is computed in, when the forward and the
backward pass come to it, and freed behind it; its gradient goes, summed, to those who hold its parts.

Outside of updates every process holds the whole model in that dtype, since rollouts read all weights for each token: so
the model has to fit on each device once for the policy and once for the frozen reference. What is divided is the rest.

All processes must gather, divide, save and load together: each asks the others for their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_gym.lm.precision import MasterWeights

from . import parallel
from .policy import Policy


def check_can_divide(model: nn.Module, config: Any) -> None:
    """Refuses what ``fsdp`` does not go with.

    Args:
        model: The one to train.
        config: The agent's settings.

    Raises:
        ValueError: If there is one process, an adapter, a critic of its own, or a model without transformer blocks.
    """
    if parallel.size() == 1:
        raise ValueError(
            "fsdp divides the training state among processes, and this is a single one; start them with `torchrun "
            "--nproc-per-node N -m rlhf_gym train ...`, or leave fsdp out"
        )
    if config.lora_rank is not None:
        raise ValueError(
            f"fsdp must be False with lora_rank={config.lora_rank}: an adapter's training state is small, and its base "
            "is not divided; leave one of the two out"
        )
    if getattr(config, "critic", "none") == "separate":
        raise ValueError(
            'fsdp must be False with critic="separate"; a shared critic costs no second model: leave it out'
        )
    if not _blocks(model):
        raise ValueError(
            f"fsdp needs a model of transformer blocks, which are gathered one after another, and {type(model).__name__} "
            "names none (_no_split_modules); leave fsdp out"
        )


class ShardedWeights(MasterWeights):
    """An optimiser over the parts of a policy's float32 weights that this process holds.

    What it saves and loads is what `MasterWeights` does in a run of one process, so either goes on from the other.

    Args:
        policy: A whole policy in float32, the same in each process, on any device; it is divided in place, and whole
            again, in ``compute_dtype``, when this returns.
        optimizer_factory: Makes the optimiser from the list of parameters, which are DTensors.
        compute_dtype: What forward and backward passes compute in; gradients are added up in float32.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer_factory: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        compute_dtype: torch.dtype,
    ):
        self._parts, self._rounds = _shard(policy, compute_dtype), compute_dtype != torch.float32
        super().__init__(policy.parameters(), optimizer_factory)
        self.gather()

    def gather(self) -> None:
        """Makes the weights whole in every process, in the dtype that is computed in, until `divide` is called.

        Nothing then asks other processes for anything, and one may use the policy alone, without gradients.
        """
        for module in self._parts:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
            module.run_hooked = None

    def divide(self) -> None:
        """Leaves each process its parts of the weights: passes gather what they need, block by block."""
        *blocks, policy = self._parts
        policy.reshard()  # embeddings and head, once gathered, are needed until the end of a backward pass
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(True, recurse=False)
            block.run_hooked = _run
            register_fsdp_forward_method(block, "run_hooked")

    def _clip(self, max_grad_norm: float) -> Tensor:
        return super()._clip(max_grad_norm).full_tensor()

    @contextmanager
    def master_precision(self) -> Iterator[None]:
        """Give the policy its float32 masters, of which each process has its parts, for a while."""
        self.divide()
        try:
            yield
        finally:
            self.gather()

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a part of the policy, whole, in the first process; inside of `master_precision`."""
        whole: dict[int, Tensor] = {}  # tied weights have two names and stay one tensor
        named = module.state_dict(keep_vars=True)
        for tensor in named.values():
            if id(tensor) not in whole:
                whole[id(tensor)] = self._saved(tensor)
        return {name: whole[id(tensor)] for name, tensor in named.items()}

    def load_weights(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """Replace the state of a part of the policy by a whole one, which every process has to give."""
        with self.master_precision():
            own = module.state_dict()
            module.load_state_dict({name: self._held(tensor, own[name]) for name, tensor in weights.items()})

    def load_state_dict(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Go on from a saved state, which every process has to give; see `MasterWeights.load_state_dict`."""
        with self.master_precision():
            super().load_state_dict(tensors, scalars)

    def _own_masters(self) -> dict[int, Tensor]:
        # Such as one process has: where it rounds, its masters are tensors beside the parameters.
        return dict(enumerate(self.masters)) if self._rounds else {}

    def _saved(self, tensor: Tensor) -> Tensor:
        """A copy of the whole tensor, in the memory of the first process's host; elsewhere nothing."""
        if not isinstance(tensor, DTensor):
            return super()._saved(tensor)
        whole = tensor.detach().full_tensor()  # all processes take part
        return whole.cpu().contiguous() if parallel.rank() == 0 else whole.new_empty(0)

    def _held(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor, divided as another one is."""
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return super()._held(tensor, like)
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _run(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """How the blocks of `rlhf_gym.lm.blocks` come by FSDP's hooks, which are those of a module's own forward."""
    return forward(*arguments)


def _shard(policy: Policy, compute_dtype: torch.dtype) -> list[Any]:
    """Divides each block, and last, in the policy itself, all that is in none of them, value head and tied weights too."""
    device_type = parallel.device().type
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device_type, (parallel.size(),)),
        # What goes in is right as it is: tokens, and the hidden states of the block before.
        "mp_policy": MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    parts: list[Any] = [*_blocks(policy.model), policy]
    for module in parts:
        fully_shard(module, **settings)
        # Sums, not means: losses are divided by the whole minibatch's normaliser. By plain addition, the only one that
        # gloo knows.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The first forward tells FSDP what the root is: the policy, and not the block that happens to run first.
    root = parts[-1]
    root.start = lambda: None
    register_fsdp_forward_method(root, "start")
    root.start()
    root.reshard()
    return parts


def _blocks(model: nn.Module) -> list[nn.Module]:
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]
