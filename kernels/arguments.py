"""What the public functions look at before any work is done: types, dtypes, devices, values that may be inspected."""

import os
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

NONE: Mapping[str, Tensor] = {}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHECK = os.environ.get("TRUNKLINE_CHECK") == "1"  # look at values on a GPU too, which waits for it at every call


def can_look(x: Tensor) -> bool:
    """Whether the values of a tensor may be inspected: always in the CPU's memory, on a GPU if that is asked for."""
    return x.device.type == "cpu" or _CHECK


def check_tensors(
    function: str,
    one_dtype: Mapping[str, Tensor],
    integers: Mapping[str, Tensor] = NONE,
    others: Mapping[str, Tensor] = NONE,
    optional: Mapping[str, Tensor | None] = NONE,
) -> None:
    """Checks what is true of all arguments whatever their shapes.

    Args:
        function: what they are arguments of.
        one_dtype: name -> tensor; of one floating-point dtype.
        integers: of int32 or int64.
        others: of dtypes that are looked at elsewhere.
        optional: the same, or None.

    Raises:
        TypeError: something that is not a dense tensor.
        ValueError: dtypes that are others, and tensors on several devices.
    """
    given = {**one_dtype, **integers, **others, **{name: x for name, x in optional.items() if x is not None}}
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
            kind = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{function}: {name} must be a dense tensor, got {kind}")
        if x.is_complex():
            raise ValueError(f"{function}: {name} must be of real numbers, got {x.dtype}")
    dtypes = [x.dtype for x in one_dtype.values()]
    if any(dtype not in FLOATS or dtype != dtypes[0] for dtype in dtypes):
        raise ValueError(
            f"{function}: {_listed(one_dtype)} must have one dtype, float16, bfloat16, float32 or float64, "
            f"got {', '.join(map(str, dtypes))}"
        )
    for name, x in integers.items():
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{function}: {name} must be of integers, got {x.dtype}; int32 and int64 are taken")
    devices = {name: x.device for name, x in given.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{function}: {_listed(devices)} must be on one device, got {', '.join(map(str, devices.values()))}"
        )


def _listed(names: Iterable[str]) -> str:
    """'q, k and v'"""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def check_offsets(function: str, offsets: Tensor | np.ndarray, rows: int) -> None:
    """Raises ValueError unless the tasks' rows, one task after the other, are all rows."""
    bounds = np.asarray(offsets.cpu() if isinstance(offsets, Tensor) else offsets)
    if bounds[0] != 0 or bounds[-1] != rows or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(f"{function}: offsets must rise from 0 to R = {rows}, got {bounds.tolist()}")
