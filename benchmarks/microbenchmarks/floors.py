"""The least a computation costs: bytes that must be moved and operations that must be done, and the time that takes.

The roofline: a device that moves B bytes and does F operations a second needs at least max(bytes / B, operations / F).
Attention also has exponentials, for which GPUs have few units.
Source: Williams et al., Roofline, CACM 2009. The rates are what well-made code reaches, not what data sheets say.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Work(NamedTuple):
    bytes: float  # every input read once, every output written once
    operations: float  # of matrix products, 2 a multiply-add
    exponentials: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]  # not the tuple's
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


# device -> bytes (read + write), 16-bit matrix operations and exponentials a second; both cards have the same chip, and
# so as many units for exponentials
RATES = {
    "NVIDIA H100 80GB HBM3": Work(3.0e12, 798e12, 3.87e12),
    "NVIDIA H200": Work(4.3e12, 790e12, 3.87e12),
}


def floor(work: Work, device: str | None) -> float | None:
    """Seconds, for 16-bit inputs; None where nobody has measured the device's rates."""
    if device not in RATES:
        return None
    return max(amount / rate for amount, rate in zip(work, RATES[device], strict=True))


def work_of(kernel: str, direction: str, arguments: dict[str, Any]) -> Work:
    """The least work of a public function's forward pass, its backward pass or both."""
    forward, backward = WORK[kernel](arguments)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def _bytes(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _attention(a: dict[str, Any]) -> tuple[Work, Work]:
    q, k, v = a["q"], a["k"], a["v"]
    lengths = a["plan"].cu_seqlens.diff().double()
    pairs = float(q.shape[1] * lengths.square().sum()) / (2 if a["causal"] else 1)
    forward = Work(_bytes(q, k, v, q), 4 * pairs * q.shape[2], pairs)
    # reads q, k, v, the output and its gradient; writes three gradients; five products, of which one is done again
    return forward, Work(2 * forward.bytes, 10 * pairs * q.shape[2], pairs)


def _linear_cross_entropy(a: dict[str, Any]) -> tuple[Work, Work]:
    x, weight = a["x"], a["weight"]
    product = 2.0 * len(x) * weight.numel()
    return Work(_bytes(x, weight), product), Work(2 * _bytes(x, weight), 2 * product)


def _task_projection(a: dict[str, Any]) -> tuple[Work, Work]:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    y = len(x) * weight.shape[2] * x.element_size()
    product = 2.0 * x.numel() * weight.shape[2]
    return Work(_bytes(x, weight, bias) + y, product), Work(2 * _bytes(x, weight, bias) + 2 * y, 2 * product)


def _low_rank(a: dict[str, Any]) -> tuple[Work, Work]:
    base, x, down, up = a["base"], a["x"], a["down"], a["up"]
    h = len(x) * down.shape[2]
    products = 2.0 * h * x.shape[1] + 2.0 * len(x) * up[0].numel()
    forward = Work(_bytes(base, x, down, up) + _bytes(base) + h * x.element_size(), products)
    # reads dy, x, h, A and B; writes dx, dA and dB
    return forward, Work(_bytes(base) + 2 * _bytes(x, down, up) + h * x.element_size(), 2 * products)


def _task_loss(a: dict[str, Any]) -> tuple[Work, Work]:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    logits = float((a["offsets"].diff().double() * a["class_offsets"].diff()).sum())
    product = 2.0 * x.shape[1] * logits
    return Work(_bytes(x, weight, bias), product), Work(2 * _bytes(x, weight, bias), 2 * product)


def _task_gram(a: dict[str, Any]) -> tuple[Work, Work]:
    x, dy = a["x"], a["dy"]
    return Work(_bytes(x, dy), 2.0 * len(x) * x.shape[1] * dy.shape[1]), Work(0, 0)


WORK: dict[str, Callable[[dict[str, Any]], tuple[Work, Work]]] = {
    "attention": _attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "task_projection": _task_projection,
    "low_rank": _low_rank,
    "task_loss": _task_loss,
    "task_gram": _task_gram,
}
