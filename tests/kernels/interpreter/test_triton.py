"""That kernels run at all: in the interpreter or on the GPU."""

import torch

from trunkline.kernels.dispatch import tl, triton


@triton.jit
def _double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


def test_kernel_runs_on_the_device(device):
    x, y = torch.randn(20, device=device), torch.zeros(32, device=device)
    _double[(2,)](x, y, len(x), BLOCK=16)
    assert torch.equal(y[:20], 2 * x)
    assert not y[20:].any()
