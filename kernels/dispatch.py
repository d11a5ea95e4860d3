"""The one place that chooses between a Triton kernel and its PyTorch reference.

Every op is a pair of functions with one signature. PyTorch's dispatcher takes the Triton one for CUDA tensors and the
reference elsewhere. TRUNKLINE_REFERENCE=1 forces the references everywhere, to tell a kernel bug from a model bug;
TRITON_INTERPRET=1 runs the kernels on the CPU, for tests. A kernel that gives wrong numbers on a device can be switched
off for the process: `switch_off`.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, CPU builds: the references serve there, and kernel files need only be importable

    def _jit(kernel: Callable | None = None, **options: Any) -> Callable:
        return kernel or _jit

    triton, tl = SimpleNamespace(jit=_jit), SimpleNamespace(constexpr=object)

__all__ = [
    "INTERPRET",
    "REPLACED",
    "compute_capability",
    "has_kernels",
    "input_precision",
    "padded_width",
    "register",
    "switch_off",
    "tl",
    "triton",
    "versions",
]

_LIBRARY = torch.library.Library("trunkline", "DEF")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read when a module is imported, as Triton does
_FORCE_REFERENCE = os.environ.get("TRUNKLINE_REFERENCE") == "1"

TRITON: dict[Callable, Callable] = {}  # op -> its Triton implementation, for tools that run or compile it by itself
REPLACED: dict[str, int] = {}  # ops whose kernel is switched off, and the calls that their reference took since


def register(name: str, *, reference: Callable, fake: Callable, triton: Callable | None = None) -> Callable:
    """Registers the op `trunkline::name` and returns it.

    Args:
        name: unique name of the op.
        reference: plain PyTorch on any device; its annotations are the op's schema. Its outputs never alias its inputs.
        fake: same arguments; returns empty, contiguous outputs of the right shape and dtype, for torch.compile.
        triton: same arguments, a tensor first; used for CUDA tensors. None while an op has no kernel: the reference
            serves everywhere.
    """
    _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None and not _FORCE_REFERENCE:
        kernel = _replaceable(name, triton, reference)
        if INTERPRET:
            _LIBRARY.impl(name, kernel, "CPU")
        else:
            _LIBRARY.impl(name, _on_device_of_tensors(kernel), "CUDA")
    torch.library.register_fake(f"trunkline::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.trunkline, name).default
    if triton is not None:
        TRITON[op] = triton
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _without_autocast(op, device), f"Autocast{device.upper()}")
    return op


def _replaceable(name: str, triton: Callable, reference: Callable) -> Callable:
    def call(*args):
        if name not in REPLACED:
            return triton(*args)
        REPLACED[name] += 1
        return reference(*args)

    return call


def has_kernels(device: torch.device) -> bool:
    """Whether ops run Triton kernels on a device, those apart that are switched off."""
    return device.type == ("cpu" if INTERPRET else "cuda") and not _FORCE_REFERENCE


def switch_off(*names: str) -> None:
    """From now on the references of these ops serve in this process. An op's backward pass goes with it."""
    for name in names:
        REPLACED.setdefault(name, 0)


def _on_device_of_tensors(triton: Callable) -> Callable:
    """Triton launches on the current device, and tensors may be on another: a model can be spread over several."""

    def call(x, *args):
        with torch.cuda.device_of(x):
            return triton(x, *args)

    return call


def compute_capability() -> int:
    """Of the current GPU, times ten: 80, 90, 100. Some have fewer registers to spare than others."""
    return 90 if INTERPRET else triton.runtime.driver.active.get_current_target().arch


def input_precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies: float32 as TF32 where PyTorch's own products may, otherwise exactly.

    TF32 reads ten of a number's 23 bits. An output or gradient then errs at most twice as much as that of plain PyTorch
    with such products, plus 2^-10 of the largest output or gradient of the op: where two products cancel, what is left
    of them is that large (tests/virtual_gpu).
    """
    # not allow_tf32: reading that is an error once the newer setting was used
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def padded_width(columns: int) -> int:
    """Columns of a tile that holds so many: a power of two, and no fewer than a product of tiles takes."""
    return max(16, triton.next_power_of_2(columns))


def versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Of tensors by which a result is kept: they count changes in place."""
    return tuple(-1 if x.is_inference() else x._version for x in tensors)


def _without_autocast(op: Callable, device: str) -> Callable:
    """An op decides itself what it computes in which dtype; autocast would round the float32 sums inside it."""

    def call(*args):
        with torch.autocast(device, enabled=False):
            return op(*args)

    return call
