"""Nested data as environments return it: dicts, tuples, lists and object arrays of arrays and tensors.

"Raw" data is what an environment returned; "frozen" data is a deep copy in which every tensor has become an array.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np


def torch_or_none() -> Any:
    """Torch if somebody has imported it; before that nothing can be a tensor."""
    return sys.modules.get("torch")


def is_tensor(x: Any) -> bool:
    torch = torch_or_none()
    return torch is not None and isinstance(x, torch.Tensor)


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or is_tensor(x)


def is_object_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == object


def describe(data: Any) -> str:
    """For error messages: what was found where something else should be."""
    if is_array(data):
        return f"{type(data).__name__} of dtype {data.dtype} and shape {tuple(data.shape)}"
    return f"{type(data).__name__} {data!r}"[:200]


def map_leaves(fn: Callable[[Any], Any], data: Any) -> Any:
    """Apply ``fn`` to everything that is no container."""
    if isinstance(data, dict):
        return {key: map_leaves(fn, value) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return type(data)(map_leaves(fn, value) for value in data)
    if is_object_array(data):
        mapped = np.empty(data.shape, dtype=object)
        for index in np.ndindex(data.shape):
            mapped[index] = map_leaves(fn, data[index])
        return mapped
    return fn(data)


def freeze(data: Any) -> Any:
    """A deep copy in which tensors have become arrays."""

    def leaf(x: Any) -> Any:
        if not is_tensor(x):
            return deepcopy(x)
        x = x.detach().cpu()
        if x.dtype == torch_or_none().bfloat16:  # numpy has none
            x = x.float()
        return x.numpy().copy()

    return map_leaves(leaf, data)


def hide_void_rows(infos: dict[str, Any], outer: np.ndarray | None = None) -> dict[str, Any]:
    """Frozen infos with 0 or None in the rows that their ``_key`` masks exclude: nobody may read what stands there."""
    shown: dict[str, Any] = {}
    for key, value in infos.items():
        mask = infos.get(f"_{key}", outer)
        if isinstance(value, dict):
            value = hide_void_rows(value, mask)
        elif isinstance(value, np.ndarray) and mask is not None:
            value = value.copy()
            value[~mask] = None if value.dtype == object else np.zeros((), value.dtype)
        shown[key] = value
    return shown


def difference(a: Any, b: Any, path: str = "", *, exact: bool = True) -> str | None:
    """Where and how two frozen structures differ, or None.

    Args:
        a: Frozen data.
        b: Frozen data.
        path: What the data is called in the answer.
        exact: False lets floats differ by 1e-5, relative and absolute, as Gymnasium's checker does.
    """
    if type(a) is not type(b):
        return f"{path} is of type {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{path} has the keys {list(a)} and {list(b)}"
        pairs = [(a[key], b[key], f"{path}[{key!r}]") for key in a]
    elif isinstance(a, (tuple, list)) or is_object_array(a):
        if len(a) != len(b):
            return f"{path} has {len(a)} and {len(b)} elements"
        pairs = [(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, (np.ndarray, np.generic)):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{path} is {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        equal = (a == b) | ((a != a) & (b != b))  # the second for NaN
        if a.dtype.kind in "fc" and not exact:
            equal |= np.isclose(a, b, rtol=1e-5, atol=1e-5)
        if np.all(equal):
            return None
        where = tuple(int(i) for i in np.argwhere(~equal)[0])
        return f"{path}{list(where) or ''} is {a[where]} and {b[where]}"
    else:
        return None if a == b or a != a else f"{path} is {a!r} and {b!r}"
    return next(filter(None, (difference(x, y, where, exact=exact) for x, y, where in pairs)), None)


def mutable_parts(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every container, array and tensor that its holder could write into, with its path."""
    if is_array(data) or isinstance(data, (dict, list)):
        yield path, data
    if isinstance(data, dict):
        for key, value in data.items():
            yield from mutable_parts(value, f"{path}[{key!r}]")
    elif isinstance(data, (tuple, list)) or is_object_array(data):
        for i, value in enumerate(data):
            yield from mutable_parts(value, f"{path}[{i}]")


def shared_part(a: Any, b: Any) -> tuple[str, str] | None:
    """The paths of a part of raw ``a`` and a part of raw ``b`` that are one object or lie in the same memory."""
    for (path_a, x), (path_b, y) in product(mutable_parts(a), mutable_parts(b)):
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            shared = np.shares_memory(x, y)
        elif is_tensor(x) and is_tensor(y):
            (start_x, end_x), (start_y, end_y) = _addresses(x), _addresses(y)
            shared = x.device == y.device and start_x < end_y and start_y < end_x
        else:
            shared = x is y
        if shared:
            return path_a, path_b
    return None


def _addresses(x: Any) -> tuple[int, int]:
    if not x.numel():
        return 0, 0
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def scribble(data: Any) -> None:
    """Write into every part of raw data, as its holder may."""
    for _, part in list(mutable_parts(data)):
        if is_tensor(part):
            part.fill_(7)
        elif not isinstance(part, np.ndarray):
            part.clear()
        elif part.flags.writeable and part.dtype.kind in "Obiufc":
            part.fill(None if part.dtype == object else 7)
