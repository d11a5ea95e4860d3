"""Dataclasses of tensors that go to a device as one, and to another process as one buffer."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

ALIGNED = 64  # bytes: what kernels load at once never crosses the beginning of a tensor


@dataclass(frozen=True)
class OnDevice:
    """A dataclass of tensors that moves to a device as one; a tensor that is in two fields is moved once."""

    flat = None  # the buffer that all its tensors are views of, if there is one; no field: `replace` leaves it behind

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        if self.flat is not None:
            return self.flat.to(device, non_blocking).content()
        return self._each(OnDevice | Tensor, lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """In memory that a GPU copies from while the host goes on."""
        return self._each(OnDevice | Tensor, lambda value: value.pin_memory())

    def _each(self, kind: Any, change: Callable[[Any], Any]) -> Self:
        changed: dict[int, Any] = {}

        def once(value: Any) -> Any:
            if isinstance(value, kind) and id(value) not in changed:
                changed[id(value)] = change(value)
            return changed.get(id(value), value)

        return replace(self, **{field.name: once(getattr(self, field.name)) for field in fields(self)})


class _Place(NamedTuple):
    """Where a tensor lies in a buffer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


Content = TypeVar("Content", bound=OnDevice)


@dataclass(frozen=True)
class Flat(Generic[Content]):
    """An `OnDevice` whose tensors are one buffer: a tensor costs a process a file, and a device a copy, each."""

    buffer: Tensor  # (bytes,) uint8
    places: Content  # the dataclass, with places instead of tensors

    @classmethod
    def of(cls, content: Content) -> "Flat[Content]":
        parts: list[Tensor] = []
        end = 0

        def placed(value: Any) -> Any:
            nonlocal end
            if isinstance(value, OnDevice):
                return value._each(OnDevice | Tensor, placed)
            start, size = end, value.numel() * value.element_size()
            parts.append(value.contiguous().view(-1).view(torch.uint8))
            if filler := -size % ALIGNED:
                parts.append(torch.zeros(filler, dtype=torch.uint8))
            end += size + filler
            return _Place(start, tuple(value.shape), value.dtype)

        places = placed(content)
        return cls(torch.cat(parts), places)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Flat[Content]":
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Flat[Content]":
        return replace(self, buffer=self.buffer.pin_memory())

    def content(self) -> Content:
        """Its tensors are views of the buffer."""

        def tensor(value: Any) -> Any:
            if isinstance(value, OnDevice):
                return value._each(OnDevice | _Place, tensor)
            size = prod(value.shape) * value.dtype.itemsize
            return self.buffer[value.start : value.start + size].view(value.dtype).view(value.shape)

        content = tensor(self.places)
        object.__setattr__(content, "flat", self)
        return content
