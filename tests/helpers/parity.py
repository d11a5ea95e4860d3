"""How accurate a kernel must be: about as accurate as plain torch in the same dtype, both measured against float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_as_accurate(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Any],
    constant: Sequence[int] = (),
    slack: float = 2.0,
    floor: float = 1e-6,
    share: float = 0.0,
) -> None:
    """Outputs and gradients of `op` may err at most `slack` times as much as those of `reference`, plus one ulp.

    The error is the largest absolute difference from `reference` in float64; the ulp is that of the largest value.

    Args:
        op: the function under test; returns a tensor or a tuple of tensors.
        reference: the same in plain torch. Must compute in float64 when its inputs are float64.
        inputs: arguments of both. Floating-point tensors get gradients; anything else is passed on as it is. Tensors
            keep their layout, so a slice of a larger buffer reaches `op` as that slice.
        constant: positions of the floating-point inputs that get no gradient.
        slack: factor on the error of `reference`.
        floor: absolute error that is always allowed, for results that are exactly zero in float64.
        share: error that is always allowed as a share of the largest value, for inputs so many that plain torch has
            the luck to be exact in some.

    Raises:
        AssertionError: naming the output or gradient, the place of its largest error, and what was allowed.
    """
    plain = results(reference, inputs, constant)
    exact = results(reference, inputs, constant, torch.float64)
    ours = results(op, inputs, constant)
    assert ours.keys() == plain.keys(), f"got {list(ours)}, expected {list(plain)}"
    for name in plain:
        check(name, ours[name], plain[name], exact[name], slack, floor, share)


def results(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Any],
    constant: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients by name; `inputs` as for `assert_as_accurate`, in `dtype` if it is given."""
    leaves = [x.detach().to(dtype or x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    differentiable = [
        i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point() and i not in constant
    ]
    for i in differentiable:
        leaves[i].requires_grad_()
    returned = function(*leaves)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    ends = {i: output for i, output in enumerate(outputs) if output.requires_grad}
    if ends:
        starts = [leaves[i] for i in differentiable]
        upstream = [upstream_gradient(output, seed=i) for i, output in ends.items()]
        gradients = torch.autograd.grad(list(ends.values()), starts, upstream, materialize_grads=True)
        found |= {f"gradient {i}": gradient for i, gradient in zip(differentiable, gradients, strict=True)}
    return found


def upstream_gradient(output: Tensor, seed: int) -> Tensor:
    """The gradient that arrives at `output`: random, and the same numbers in every dtype, rounded as bfloat16 is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype)


def check(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, slack: float, floor: float, share: float = 0.0
) -> None:
    assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape), (
        f"{name}: expected {plain.dtype} {list(plain.shape)}, got {ours.dtype} {list(ours.shape)}"
    )
    if not plain.is_floating_point():
        assert torch.equal(ours, plain), f"{name}: differs from plain torch at {(ours != plain).nonzero()[0].tolist()}"
        return
    assert exact.dtype == torch.float64, f"{name}: the reference computes in {exact.dtype} when given float64"
    if not plain.numel():
        return

    def error(result: Tensor) -> Tensor:
        return torch.where(result == exact, 0.0, (result.double() - exact).abs())  # equal infinities are no error

    ulp = max(torch.finfo(plain.dtype).eps, share) * exact.nan_to_num(0.0, 0.0, 0.0).abs().max()
    allowed = slack * error(plain).max() + ulp + floor
    assert allowed.isfinite(), f"{name}: plain torch itself overflows or gives NaN, so nothing could be checked"
    errors = error(ours).nan_to_num(torch.inf)
    place = tuple(int(i) for i in torch.unravel_index(errors.argmax(), ours.shape))
    assert errors[place] <= allowed, (
        f"{name}: error {errors[place]:.3g} at {list(place)}, {ours[place]:.6g} instead of {exact[place]:.6g}; "
        f"allowed {allowed:.3g}, plain torch errs by {error(plain).max():.3g}"
    )
