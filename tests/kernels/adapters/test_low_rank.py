"""Low-rank adapters of rows sorted by adapter, against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity import assert_as_accurate
from trunkline.kernels.adapters.low_rank import _backward, _forward, low_rank, low_rank_reference

QKV = (0, 24, 24, 32, 40, 48)  # queries and values of 24 + 8 + 8 + 8 columns, and keys in part


def make(counts, dtype=torch.float32, rank=4, parts=QKV, width=20, columns=48, device="cpu"):
    """base, x, down, up, offsets, parts and scale."""
    torch.manual_seed(0)
    T, R, P = len(counts), sum(counts), len(parts) // 2
    W = sum(parts[1::2]) - sum(parts[::2])
    tensors = torch.randn(R, columns), torch.randn(R, width), torch.randn(T, width, P * rank), torch.randn(T, rank, W)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    return *(x.to(device, dtype) for x in tensors), offsets, list(parts), 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [[5, 0, 30, 1, 0, 7], [0, 3], [1], [0, 0]], ids=str)
def test_matches_definition(counts, dtype):
    assert_as_accurate(low_rank, low_rank_reference, make(counts, dtype))


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_one_part_of_all_columns(rank):
    *tensors, offsets, parts, scale = make([3, 9], torch.float64, rank, parts=(0, 48))
    y = low_rank(*tensors, offsets, None, scale)
    base, x, down, up = tensors
    expected = torch.cat([base[:3] + 0.5 * x[:3] @ down[0] @ up[0], base[3:] + 0.5 * x[3:] @ down[1] @ up[1]])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_columns_of_no_part_stay():
    base, *others = make([4, 2])
    assert torch.equal(low_rank(base, *others)[:, 32:40], base[:, 32:40])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_any_segments(counts):
    inputs = make(counts, torch.float64)
    torch.testing.assert_close(low_rank(*inputs), low_rank_reference(*inputs), rtol=1e-12, atol=1e-12)


def test_ops_are_what_pytorch_expects():
    base, x, down, up, offsets, parts, scale = make([5, 0, 3])
    torch.library.opcheck(_forward, (base, x, down, up, offsets, parts, scale))
    y, h = _forward(base, x, down, up, offsets, parts, scale)
    torch.library.opcheck(_backward, (y, x, h, down, up, offsets, parts, scale))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (4, lambda offsets: offsets + 1, r"offsets must rise from 0 to R = 8"),
        (3, lambda up: up[:, :, 1:], r"up must be \[2, 4, 40\], got \[2, 4, 39\]"),
        (2, lambda down: down[:, 1:], r"x must be \[8, 19\], got \[8, 20\]"),
        (2, lambda down: down[:0], "at least one adapter"),
        (5, lambda parts: [8, 0], "parts must be"),
        (5, lambda parts: [0, 49], "parts must be"),
        (1, lambda x: x.double(), "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, message):
    inputs = list(make([5, 3]))
    inputs[place] = change(inputs[place])
    with pytest.raises(ValueError, match=message):
        low_rank(*inputs)
