"""What there is to compile and to time: every file in kernels/ with a public function of its name and example inputs.

Such a file has `SHAPES`, sizes by name, and `example(device, dtype, **sizes)`, the keyword arguments of its function.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import trunkline.kernels


@dataclass(frozen=True)
class Kernel:
    """A public function of kernels/ and the sizes it is certified and measured at."""

    name: str
    function: Callable[..., Any]
    shapes: dict[str, dict[str, Any]]
    example: Callable[..., dict[str, Any]]
    module: ModuleType


def kernel_of(module: ModuleType) -> Kernel:
    name = module.__name__.rpartition(".")[2]
    return Kernel(name, getattr(module, name), module.SHAPES, module.example, module)


def shipped_kernels() -> list[Kernel]:
    """All of kernels/, in the order of their names."""
    (room,) = map(Path, trunkline.kernels.__path__)
    files = sorted(room.rglob("*.py"), key=lambda file: file.stem)
    modules = [
        import_module(".".join(["trunkline.kernels", *f.relative_to(room).with_suffix("").parts])) for f in files
    ]
    return [kernel_of(module) for module in modules if hasattr(module, "example")]


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same value with every tensor in it changed, in dictionaries, sequences and dataclasses (a `PackPlan`).

    A tensor that is there twice is changed once: some functions ask whether two arguments are the same tensor.
    """
    changed: dict[int, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return changed[id(value)] if id(value) in changed else changed.setdefault(id(value), change(value))
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: walk(getattr(value, f.name)) for f in fields(value)})
        if isinstance(value, list | tuple):
            make = getattr(value, "_make", type(value))  # a named tuple is made in its own way
            return make(walk(item) for item in value)
        return value

    return walk(value)


LABELS = ("value", "row_weight")  # of rows; no gradient flows to them


def leaves(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments that gradients flow to, by name: tensors of the kernel's dtype, which from now on require them."""
    found = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.dtype == dtype}
    return {name: x.requires_grad_() for name, x in found.items() if name not in LABELS}


def first(outputs: Any) -> Tensor:
    """What a function is measured and compared by: its only output, or the first of several."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


ROWS = ("rows", "tokens")  # sizes that say how much there is to do, as `lengths` does
WIDTHS = ("width", "width_in", "width_out", "columns", "head_dim")


def scaled(sizes: dict[str, Any], rows: int, width: int) -> dict[str, Any]:
    """The same shape for a smaller machine: at most about so many rows or tokens, and widths up to `width`.

    Of many sequences every n-th is taken, and the last, so that a mix stays a mix; what is still too much is shortened.
    """
    small = dict(sizes)
    for key in small:
        if key in ROWS:
            small[key] = min(small[key], rows)
        elif key in WIDTHS:
            small[key] = min(small[key], width)
    small.update({"vocabulary": min(small["vocabulary"], 32 * width)} if "vocabulary" in small else {})
    if "lengths" in small:
        lengths = small["lengths"]
        every = max(1, sum(lengths) // rows)
        kept = [*lengths[:-1:every], lengths[-1]]
        shorter = max(1.0, sum(kept) / (1.5 * rows))
        small["lengths"] = [max(1, int(length / shorter)) for length in kept]
    return small
