"""What is run on the virtual GPU, and how accurate it must be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parity import check, results
from virtual_gpu.device import VirtualGPU


@dataclass(frozen=True)
class Case:
    """An op on inputs of one dtype, forward and backward."""

    op: str
    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple
    constant: tuple[int, ...] = ()  # positions of inputs that get no gradient
    patches: tuple = ()  # (object, attribute, value) while it runs
    no_kernel: str = ""  # why nothing is launched; empty: something must be


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def placed(x: Tensor, bytes_off: int) -> Tensor:
    """The same values that many bytes behind a multiple of 64."""
    room = torch.empty(x.numel() + 128, dtype=x.dtype)
    first = (-room.data_ptr() % 64 + bytes_off) // x.element_size()
    there = room[first : first + x.numel()].view(x.shape)
    return there.copy_(x)


class TF32Products(TorchDispatchMode):
    """Products of float32 matrices read of each number what TF32 has: sign, exponent and ten bits."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation.overloadpacket.__name__ in self.PRODUCTS:
            factors = [x.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for x in arguments[-2:]]
            arguments = (*arguments[:-2], *factors)
        return operation(*arguments, **keywords or {})


TF32_EPS = 2.0**-10


def wrong_results(case: Case, gpu: VirtualGPU, tf32: bool = False) -> list[str]:
    """What is not as accurate as it must be; the op runs on `gpu`.

    The rule is `parity.check`: at most twice the error of plain torch in the same dtype, against float64. With `tf32`
    plain torch multiplies in TF32, too, and the number that is always allowed is 2^-10 of the largest output or
    gradient: where two TF32 products cancel, what is left of them is as large as that.
    """
    exact = results(case.reference, case.inputs, case.constant, torch.float64)
    if tf32:
        with TF32Products():
            plain = results(case.reference, case.inputs, case.constant)
    else:
        plain = results(case.reference, case.inputs, case.constant)
    with gpu:
        patches = [mock.patch.object(*patch) for patch in case.patches]
        for patch in patches:
            patch.start()
        try:
            ours = results(case.function, case.inputs, case.constant)
        finally:
            for patch in patches:
                patch.stop()
    finite = [x.nan_to_num(0.0, 0.0, 0.0).abs().max() for x in exact.values() if x.is_floating_point() and x.numel()]
    # what cancels leaves a rounding of its terms, in float32 of numbers of about 10
    exactly = 1e-5 if case.inputs[0].dtype == torch.float32 else 1e-6
    floor = TF32_EPS * float(max(finite, default=0.0)) if tf32 else exactly
    wrong = [] if ours.keys() == plain.keys() else [f"got {list(ours)}, expected {list(plain)}"]
    for name in plain:
        try:
            check(name, ours[name], plain[name], exact[name], 2.0, floor)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong
