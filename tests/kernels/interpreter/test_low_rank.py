"""The kernels of low-rank adapters against their definition in float64."""

import pytest
import torch

from parity import assert_as_accurate
from trunkline.kernels.adapters.low_rank import low_rank, low_rank_reference

PARTS = (0, 40, 40, 56, 72, 80)


def make(counts, dtype, device, rank, width=40):
    """base, x, down, up, offsets, parts and scale."""
    T, R = len(counts), sum(counts)
    tensors = torch.randn(R, 80), torch.randn(R, width), torch.randn(T, width, 3 * rank), torch.randn(T, rank, 64)
    tensors = (*tensors[:2], tensors[2] / width**0.5, tensors[3] / rank**0.5)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    return *(x.to(device, dtype) for x in tensors), offsets, list(PARTS), 0.5


@pytest.mark.parametrize("rank", [4, 16, 144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches_definition(dtype, rank, device):
    assert_as_accurate(low_rank, low_rank_reference, make([5, 0, 70, 1, 0], dtype, device, rank))


@pytest.mark.parametrize("counts", [[1], [0, 1, 0], [0, 0]], ids=str)
def test_few_rows(counts, device):
    assert_as_accurate(low_rank, low_rank_reference, make(counts, torch.float32, device, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 128])
def test_large_tiles(rank):
    assert_as_accurate(low_rank, low_rank_reference, make([5, 0, 9000, 1, 4200], torch.bfloat16, "cuda", rank, 200))
