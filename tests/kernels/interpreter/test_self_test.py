"""A kernel that gives wrong numbers is switched off, and PyTorch's operations serve in its place."""

import pytest
import torch

from trunkline.kernels import dispatch
from trunkline.kernels.tasks import task_loss_triton, task_projection_triton
from trunkline.training import self_test as module
from trunkline.training.self_test import OPS, self_test


@pytest.fixture
def wrong_projection(monkeypatch):
    """A kernel of `task_projection` whose output is a hundredth too large, and nothing is switched off yet."""
    right = task_projection_triton.forward

    def wrong(*arguments, **options):
        y, saved = right(*arguments, **options)
        return 1.01 * y, saved

    monkeypatch.setattr(task_projection_triton, "forward", wrong)
    monkeypatch.setattr(dispatch, "REPLACED", {})
    monkeypatch.setattr(module, "REPLACED", dispatch.REPLACED)
    monkeypatch.setattr(module, "OPS", tuple(op for op in OPS if op.name in ("task_projection", "task_loss")))


@pytest.mark.usefixtures("wrong_projection")
def test_wrong_kernel_is_switched_off_and_named(device, monkeypatch):
    told: list[str] = []
    outcomes = self_test(torch.device(device), told.append, [torch.float32])
    assert {outcome.op.name: bool(outcome.problem) for outcome in outcomes} == {
        "task_projection": True,
        "task_loss": False,
    }
    (line,) = told
    assert line.startswith("the kernel of task_projection in float32 errs by")
    assert "in the output: it is switched off" in line
    assert dispatch.REPLACED == {"task_projection_forward": 0, "task_projection_backward": 0}

    again = self_test(torch.device(device), told.append, [torch.float32])
    assert not any(outcome.problem for outcome in again)
    assert dispatch.REPLACED == {"task_projection_forward": 1, "task_projection_backward": 1}  # one call of ours each

    monkeypatch.setattr(task_loss_triton, "forward", None)  # the other's kernel runs as before
    self_test(torch.device(device), told.append, [torch.float32])
    assert told[-1].startswith("the kernel of task_loss")
    assert "fails: TypeError" in told[-1]


@pytest.mark.usefixtures("wrong_projection")
def test_strict_is_an_error(device, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_STRICT", "1")
    with pytest.raises(ValueError, match="the kernel of task_projection .*; TRUNKLINE_STRICT=1 forbids to replace it"):
        self_test(torch.device(device), print, [torch.float32])
    assert dispatch.REPLACED == {}
