import pytest
import torch

from parity import check
from trunkline.kernels.tasks.task_gram import example, task_gradients, task_gradients_reference

CASES = {  # tokens, tasks, width in, width out
    "several tiles": (150, 3, 140, 200),
    "nine tasks": (90, 9, 40, 24),
    "one token": (1, 1, 16, 16),
}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_as_accurate_as_one_product_a_task(sizes, dtype, device):
    x, dy, offsets = example(device, dtype, *sizes).values()
    x[int(offsets[-1]) :] = dy[int(offsets[-1]) :] = torch.nan  # no task's
    ours = task_gradients(x, dy, offsets)
    plain = task_gradients_reference(x, dy, offsets)
    exact = task_gradients_reference(x.double(), dy.double(), offsets)
    check("gradients", ours, plain, exact, slack=2.0, floor=1e-5)
    assert torch.equal(ours, task_gradients(x, dy, offsets))


def test_tasks_without_tokens(device):
    x, dy, _ = example(device, torch.float32, 20, 1, 16, 16).values()
    offsets = torch.tensor([0, 0, 7, 7, 20, 20], dtype=torch.int32, device=device)
    gradients = task_gradients(x, dy, offsets)
    assert gradients.any((1, 2)).tolist() == [False, True, False, True, False]
    torch.testing.assert_close(gradients[1], dy[:7].T @ x[:7])
