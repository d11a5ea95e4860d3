"""What may come out of a call: a right result, by the rule of parity.py, or a ValueError or TypeError with a text."""

from collections.abc import Callable, Collection
from typing import Any

from parity import assert_as_accurate


def assert_right(
    op: Callable[..., Any],
    definition: Callable[..., Any],
    arguments: dict[str, Any],
    differentiable: Collection[str],
    slack: float = 4.0,
    floor: float = 1e-5,
) -> None:
    """Both take the arguments by name; gradients are looked at of those in `differentiable` alone."""
    names = list(arguments)

    def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: function(**dict(zip(names, values, strict=True)))

    constant = [place for place, name in enumerate(names) if name not in differentiable]
    inputs = list(arguments.values())
    assert_as_accurate(by_name(op), by_name(definition), inputs, constant, slack=slack, floor=floor)


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
