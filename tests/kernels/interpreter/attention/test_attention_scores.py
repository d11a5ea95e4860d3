"""What kernels make of a score, against its definition in torch."""

import pytest
import torch

from trunkline.kernels.attention.attention_scores import dropout_threshold, kept, kept_reference, tanh
from trunkline.kernels.dispatch import tl, triton


@triton.jit(do_not_specialize=["seed", "threshold"])
def _kept_kernel(kept_ptr, query, key, head, seed, threshold):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 32)[None, :]
    tl.store(kept_ptr + i * 32 + j, kept(seed, query + i, key + j, head, threshold).to(tl.int8))


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 17, 2**63 - 1])
@pytest.mark.parametrize("dropout", [0.1, 0.7])
def test_dropout(seed, dropout, device):
    result = torch.empty(16, 32, dtype=torch.int8, device=device)
    _kept_kernel[(1,)](result, 100, 70000, 3, seed, dropout_threshold(dropout))
    query, key = torch.arange(100, 116)[:, None], torch.arange(70000, 70032)
    expected = kept_reference(seed, query, key, torch.tensor(3), dropout)
    assert torch.equal(result.bool().cpu(), expected)


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i)))


def test_tanh(device):
    x = torch.cat([torch.linspace(-1, 1, 256), torch.logspace(-30, 4, 256)]).to(device)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, N=512)
    # a GPU's ex2.approx and div.full err by 2 units in the last place each (PTX ISA), of which four are 4.8e-7
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=4e-7 if device == "cpu" else 1e-6, atol=0)
