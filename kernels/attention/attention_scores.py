"""What happens to an attention score between the two matrix products: soft cap and dropout. Shared by all tilings.

Soft cap: c * tanh(s / c), on scaled scores and before the mask.
Dropout: the weight of query i and key j in head h is kept if the first word of Philox-4x32-10 is at least 2^32 * p, and
multiplied by 1 / (1 - p). Counter (i, j, h, 0), with i and j counted in their packed streams; key: the 64 bits of the
seed, lower half first. The same weights fall in forward and backward, and whatever the tiling.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; soft cap as in Gemma 2, arXiv:2408.00118.
"""

import math

import torch
from torch import Tensor

from trunkline.kernels.dispatch import tl, triton

_WORD = 2**32 - 1


def dropout_threshold(dropout: float) -> int:
    """The least word of which a weight is kept."""
    return math.ceil(dropout * 2**32)


def word_reference(seed: int, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
    """The random word of every weight: int64, of the shape to which the int64 indices broadcast."""
    c0, c1, c2, c3 = query, key, head, torch.zeros_like(head)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # may wrap to negative, but all 64 bits are there
        c0, c1 = second >> 32 & _WORD ^ c1 ^ k0, second & _WORD
        c2, c3 = first >> 32 & _WORD ^ c3 ^ k1, first & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0


def kept_reference(seed: int, query: Tensor, key: Tensor, head: Tensor, dropout: float) -> Tensor:
    """Which weights dropout keeps: bool, of the shape to which the int64 indices broadcast."""
    return word_reference(seed, query, key, head) >= dropout_threshold(dropout)


@triton.jit
def kept(seed, query, key, head, threshold):
    """Which weights dropout keeps, in a kernel; the indices are int32, `threshold` is `dropout_threshold`."""
    word, _, _, _ = tl.philox(seed, query, key, head, 0)
    return word >= threshold.to(tl.uint32)


@triton.jit
def tanh(x):
    """Through exp2, and where that would lose digits, by its series: both run everywhere, the interpreter included."""
    decay = tl.math.exp2(tl.abs(x) * -2.885390081777927)  # exp(-2 |x|)
    far = (1 - decay) / (1 + decay)
    square = x * x
    near = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(square < 0.1, x * near, tl.where(x < 0, -far, far))
