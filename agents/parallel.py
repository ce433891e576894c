"""One training run in several processes: ``torchrun --nproc-per-node N -m rlhf_gym train ...``.

Every process holds the whole model, the optimiser (with ``fsdp`` a part of it, see `sharding.py`) and an environment
with all rows, so each knows every prompt, every random number and every minibatch. The work is shared: a process
generates and scores the responses of its rows, and takes its part of each minibatch through the model; responses and
gradients are then exchanged. What all end up with is the same in each of them, and the same as in a run of one process
up to the order of sums.

Outside of ``torchrun`` there is one process and nothing here does anything.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch, Rollout

GRADIENTS_PER_MESSAGE = 2**25  # numbers; 128 MiB
PATIENCE = datetime.timedelta(hours=12)  # one process measures and saves while the others wait


def start() -> None:
    """Joins the processes that ``torchrun`` has started, and gives this one its GPU where there are any.

    Raises:
        ValueError: If there are fewer GPUs than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ValueError(f"--nproc-per-node must be at most the number of GPUs, {num_gpus}; use that many")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; the one with 0 prints and writes."""
    return dist.get_rank() if size() > 1 else 0


def share(number: int) -> int:
    """The largest part of so many rows that a process can have."""
    return -(-number // size())


def any_of(flag: bool) -> bool:
    """Whether it is true in some process. All must ask."""
    if size() == 1:
        return flag
    flags = torch.tensor([float(flag)], device=device())
    dist.all_reduce(flags)
    return bool(flags > 0)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their sums over all processes, in place. All must give the same shapes, float32."""
    if size() == 1:
        return
    message: list[Tensor] = []
    for tensor in tensors:
        message.append(tensor)
        if sum(each.numel() for each in message) >= GRADIENTS_PER_MESSAGE:
            _add_up(message)
            message = []
    _add_up(message)


def add_up_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces gradients by their sums over all processes, in place; where there is none it counts as 0.

    Those of parameters that are divided among the processes are sums already.
    """
    if size() == 1:
        return
    parameters = [parameter for parameter in parameters if not hasattr(parameter, "placements")]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    add_up([parameter.grad for parameter in parameters])


def _add_up(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def add_up_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Sums over all processes of numbers that have the same names in each."""
    if size() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device())
    dist.all_reduce(values)
    return dict(zip(numbers, values.tolist(), strict=True))


def gather(part: Rollout, num_rows: int) -> Rollout:
    """The rollout that the processes have generated together.

    Args:
        part: Rows ``rank()``, ``rank() + size()``, ... of it; any row at all where there are none for this process.
        num_rows: Of the whole.

    Returns:
        All rows, the same in each process. Only the texts of the responses are not exchanged.
    """
    if size() == 1:
        return part
    width = _largest(part.batch.ids.shape[1])
    batch = replace(part.batch, ids=F.pad(part.batch.ids, (0, width - part.batch.ids.shape[1])))
    whole = {
        item.name: _gather(value, num_rows)
        for item in fields(Batch)
        if (value := getattr(batch, item.name)) is not None
    }
    terms, metrics = (
        {name: _gather(torch.as_tensor(values).to(batch.scores), num_rows) for name, values in sorted(each.items())}
        for each in (part.terms, part.metrics)
    )
    return Rollout(Batch(**whole), terms=terms, metrics=metrics)


def _gather(rows: Tensor, num_rows: int) -> Tensor:
    as_sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    width = share(num_rows)
    padded = F.pad(as_sent, (0, 0) * (rows.dim() - 1) + (0, width - len(rows))).contiguous()
    received = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(received, padded)
    # Row i of process r is row i * size() + r of the whole.
    return torch.stack(received, 1).flatten(0, 1)[:num_rows].to(rows.dtype)


def _largest(number: int) -> int:
    largest = torch.tensor([number], device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def device() -> torch.device:
    """Where messages live; on a GPU this process's own."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
