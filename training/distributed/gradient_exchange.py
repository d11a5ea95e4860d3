"""Sums the ranks' gradients, in buckets that travel while the backward pass still runs.

    the last backward pass --> gradients of a bucket are complete --> one flat tensor --> all-reduce, SUM
                                                                      the next bucket meanwhile
Sums and never means: what every loss is divided by is the weight of the whole step, on all ranks. A bucket's flat
tensor takes the place of the gradients in it, so that what is held besides them is one bucket.

Every rank sends the same buckets in the same order, whatever is in its batches: a parameter without a gradient sends
zeros, and one that has none on any rank has none after the exchange, as in a run with one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.training.distributed.ranks import Ranks

BUCKET = 25 << 20  # bytes of gradients that travel together, as in DistributedDataParallel


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    missing: int = 0  # gradients that the last backward pass has not completed yet
    had: list[bool] = field(default_factory=list)  # whether this rank has a gradient, of each parameter
    flat: Tensor | None = None  # the gradients, once they are sent
    wait: Callable[[], None] | None = None


class GradientExchange:
    """A context. In every step `begin`, `last_pass` before the last backward pass, and `finish` after it.

    Args:
        model: its parameters that learn have their gradients summed.
        ranks: with one alone, or with a model in slices, there is nothing to do.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.ranks, self.watches, self.sent = ranks, False, 0
        self.buckets: list[_Bucket] = []
        self.hooks: list[Any] = []
        if not ranks.active or ranks.shards:
            return
        room, dtype = 0, None
        for parameter in reversed([p for p in model.parameters() if p.requires_grad]):  # as the backward pass goes
            if parameter.nbytes > room or parameter.dtype != dtype:
                self.buckets.append(_Bucket([]))
                room, dtype = BUCKET, parameter.dtype
            self.buckets[-1].parameters.append(parameter)
            room -= parameter.nbytes

    def __enter__(self) -> "GradientExchange":
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                hook = partial(self._completed, bucket)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def begin(self) -> None:
        """Begins a step, or an attempt at it after one that ran out of memory: what that one sent was complete, and
        stays sent."""
        self.watches = False
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def last_pass(self) -> None:
        """From here on a gradient that arrives is complete."""
        self.watches = True

    def _completed(self, bucket: _Bucket, _: Tensor) -> None:
        if self.watches:
            bucket.missing -= 1
            while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
                self._send()

    def _send(self) -> None:
        bucket = self.buckets[self.sent]
        bucket.had = [p.grad is not None for p in bucket.parameters]
        bucket.flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket.parameters]
        )
        bucket.wait = self.ranks.begin_sum(bucket.flat)
        self.sent += 1
        for parameter in bucket.parameters:
            parameter.grad = None

    def finish(self) -> None:
        """Gives every parameter the sum of the ranks' gradients."""
        if not self.buckets:
            return
        self.watches = False
        while self.sent < len(self.buckets):
            self._send()
        had = torch.tensor([of_one for bucket in self.buckets for of_one in bucket.had], dtype=torch.uint8)
        there = iter(self.ranks.largest(had).tolist())
        for bucket in self.buckets:
            assert bucket.wait is not None
            assert bucket.flat is not None
            bucket.wait()
            sizes = [parameter.numel() for parameter in bucket.parameters]
            for parameter, gradient in zip(bucket.parameters, bucket.flat.split(sizes), strict=True):
                parameter.grad = gradient.view_as(parameter) if next(there) else None
            bucket.flat = bucket.wait = None
        self.sent = 0
