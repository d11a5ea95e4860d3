"""What may come out of a call: a right result, by the rule of parity.py, or a ValueError or TypeError with a text."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from parity import assert_as_accurate

SHARE = 4  # ulps of the least precise input that a result may err by, as a share of its largest value


def assert_right(
    op: Callable[..., Any],
    definition: Callable[..., Any],
    arguments: dict[str, Any],
    differentiable: Collection[str],
    slack: float = 4.0,
    floor: float = 1e-5,
) -> None:
    """Both take the arguments by name; gradients are looked at of those in `differentiable` alone."""
    dtypes = [x.dtype for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
    share = SHARE * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    names = list(arguments)

    def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: function(**dict(zip(names, values, strict=True)))

    constant = [place for place, name in enumerate(names) if name not in differentiable]
    inputs = list(arguments.values())
    assert_as_accurate(by_name(op), by_name(definition), inputs, constant, slack=slack, floor=floor, share=share)


def assert_right_or_refused(
    op: Callable[..., Any], definition: Callable[..., Any], arguments: dict[str, Any], **rule: float
) -> None:
    try:
        op(**arguments)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        assert_right(op, definition, arguments, differentiable=(), **rule)
        return
    assert refusal.strip(), "an error without a text"
