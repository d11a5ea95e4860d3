"""Marks the backward pass of an op that has no derivative of its own: a gradient of a gradient is an error."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once_differentiable(name: str) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """Decorates the `backward` of an autograd function of the op `name`.

    PyTorch's decorator of this name would let second gradients be wrong: it takes the inputs of the forward pass, on
    which the gradients depend, for constants, and its error is not reached where only some gradients are asked for.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
    """

    def decorate(backward: Callable[..., tuple]) -> Callable[..., tuple]:
        @wraps(backward)
        def once(ctx: Any, *gradients: Any) -> tuple:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiled graph refuses by itself
                raise RuntimeError(
                    f"{name}: its gradients cannot be differentiated again, so create_graph=True is refused; use "
                    f"{name}_reference, plain PyTorch, for what is differentiated twice"
                )
            return backward(ctx, *gradients)

        return once

    return decorate
