"""Every op on this device, at small ragged shapes, against its definition in float64.

Kernels are compiled for whatever device there is, and a compiler or a driver can be wrong where all tests passed. So
`trunkline doctor`, and `trunkline train` on a GPU, run them first. An op that fails is switched off for the process:
its reference serves, and counts (`trunkline.kernels.dispatch.REPLACED`). TRUNKLINE_STRICT=1 makes it an error.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trunkline.kernels.adapters import low_rank
from trunkline.kernels.attention import attention
from trunkline.kernels.dispatch import REPLACED, has_kernels, switch_off
from trunkline.kernels.tasks import task_gram, task_loss, task_projection
from trunkline.kernels.vocabulary import linear_cross_entropy

LENGTHS = [40, 1, 60, 0, 128, 200]  # tiles of both widths, and blocks
SLACK = 2.0  # times the error of plain PyTorch in the same dtype, plus one ulp of the largest value


class Op(NamedTuple):
    """A public function, with its definition and arguments that both take."""

    name: str
    kernels: tuple[str, ...]  # the registered ops that it runs
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    example: Callable[..., dict[str, Any]]  # of a device, a dtype and sizes
    sizes: dict[str, Any]  # small and ragged
    inputs: tuple[str, ...]  # to which gradients flow, where they are given


class Outcome(NamedTuple):
    """Of one op in one dtype."""

    op: Op
    dtype: torch.dtype
    share: float  # largest error, of what is allowed
    problem: str  # empty: none

    def __str__(self) -> str:
        told = self.problem or f"errs by {self.share:.0%} of what is allowed"
        return f"{self.op.name} in {str(self.dtype).removeprefix('torch.')} {told}"


def _loss_of(name: str) -> Callable[..., Tensor]:
    module = {"task_loss": task_loss, "linear_cross_entropy": linear_cross_entropy}[name]
    return lambda **arguments: getattr(module, name)(**arguments).loss


def _task_loss_definition(width: int, **arguments: Any) -> Tensor:
    return task_loss.task_loss_reference(**arguments).loss


OPS = (
    Op(
        "attention", ("attention_forward", "attention_backward"), attention.attention, attention.attention_reference,
        attention.example, {"lengths": LENGTHS, "heads": 4, "kv_heads": 2, "head_dim": 64, "causal": True},
        ("q", "k", "v"),
    ),
    Op(
        "task_projection", ("task_projection_forward", "task_projection_backward"), task_projection.task_projection,
        task_projection.task_projection_reference, task_projection.example,
        {"rows": 200, "tasks": 5, "width": 160, "columns": 144}, ("x", "weight", "bias"),
    ),
    Op(
        "task_loss", ("task_loss_forward", "task_loss_backward", "task_logits"), _loss_of("task_loss"),
        _task_loss_definition, task_loss.example, {"rows": 200, "tasks": 9, "width": 96, "classes": 3},
        ("x", "weight", "bias"),
    ),
    Op(
        "linear_cross_entropy", ("linear_cross_entropy",), _loss_of("linear_cross_entropy"),
        linear_cross_entropy.linear_cross_entropy_reference, linear_cross_entropy.example,
        {"rows": 70, "width": 64, "vocabulary": 1001, "tasks": 2, "bias": True}, ("x", "weight", "bias"),
    ),
    Op(
        "task_gradients", ("task_gradients",), task_gram.task_gradients, task_gram.task_gradients_reference,
        task_gram.example, {"tokens": 200, "tasks": 5, "width_in": 96, "width_out": 80}, (),
    ),
    Op(
        "low_rank", ("low_rank_forward", "low_rank_backward"), low_rank.low_rank, low_rank.low_rank_reference,
        low_rank.example, {"rows": 200, "tasks": 5, "width": 160, "columns": 96, "rank": 8, "num_parts": 3},
        ("base", "x", "down", "up"),
    ),
)  # fmt: skip


def self_test(
    device: torch.device, tell: Callable[[str], None], dtypes: Sequence[torch.dtype] | None = None
) -> list[Outcome]:
    """Tells a line of every op that is wrong and switches it off; comes back with all outcomes.

    Args:
        device: to run on.
        tell: is told what fails.
        dtypes: default: all that a device's kernels take; float32 without kernels.

    Raises:
        ValueError: an op without a kernel is wrong; or, with TRUNKLINE_STRICT=1, any op.
    """
    all_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    chosen = dtypes or (all_dtypes if has_kernels(device) else (torch.float32,))
    outcomes = []
    for op in OPS:
        of_op = [outcome(op, device, dtype) for dtype in chosen]
        outcomes += of_op
        for wrong in (result for result in of_op if result.problem):
            if not has_kernels(device) or REPLACED.keys() >= set(op.kernels):
                raise ValueError(
                    f"{op.name} on {device} is wrong without our kernels: {wrong.problem}: is torch intact?"
                )
            if os.environ.get("TRUNKLINE_STRICT") == "1":
                raise ValueError(f"the kernel of {wrong}; TRUNKLINE_STRICT=1 forbids to replace it")
            switch_off(*op.kernels)
            tell(f"the kernel of {wrong}: it is switched off, and PyTorch's own operations serve, which are slower")
            break
    return outcomes


def outcome(op: Op, device: torch.device, dtype: torch.dtype) -> Outcome:
    try:
        return Check(op, op.example(device, dtype, **op.sizes), dtype).outcome()
    except Exception as error:  # whatever a compiler or a driver throws, it is this op's
        first_line = str(error).split("\n")[0]
        return Outcome(op, dtype, float("inf"), f"fails: {type(error).__name__}: {first_line}")


class Check:
    """An op on some arguments, held against its definition in float64 as often as is wanted."""

    def __init__(self, op: Op, arguments: dict[str, Any], dtype: torch.dtype):
        self.op, self.arguments, self.dtype = op, arguments, dtype
        self.plain, self.exact = (
            _results(op, op.definition, arguments, dtype, as_dtype) for as_dtype in (dtype, torch.float64)
        )

    def outcome(self) -> Outcome:
        shares = dict(self._shares())
        name, share = max(shares.items(), key=lambda item: item[1])
        wrong = f"errs by {share:.3g} times what is allowed, in the {name}"
        return Outcome(self.op, self.dtype, share, "" if share <= 1 else wrong)

    def _shares(self) -> Iterator[tuple[str, float]]:
        """Of output and gradients: the largest error over what is allowed; infinity for what is not finite."""
        ours = _results(self.op, self.op.function, self.arguments, self.dtype, self.dtype)
        eps = torch.finfo(self.dtype).eps
        for name, value in self.exact.items():
            allowed = SLACK * (self.plain[name].double() - value).abs().max() + eps * value.abs().max() + 1e-6
            error = (ours[name].double() - value).abs().max()
            yield name, float((error / allowed).nan_to_num(torch.inf))


def _results(
    op: Op, function: Callable[..., Tensor], arguments: dict[str, Any], of: torch.dtype, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients, where tensors `of` one dtype are given in another."""
    given = {
        name: x.detach().to(dtype) if isinstance(x, Tensor) and x.dtype == of else x for name, x in arguments.items()
    }
    leaves = {name: given[name].requires_grad_() for name in op.inputs if given[name] is not None}
    output = function(**given)
    found = {"output": output.detach()}
    if leaves:
        arriving = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
        gradients = torch.autograd.grad(output, [*leaves.values()], arriving)
        found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found
