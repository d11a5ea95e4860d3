"""The ops on the virtual GPU: every kernel once. `make virtual` runs all cases."""

import shutil
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or shutil.which("g++") is None:
    pytest.skip("needs Triton and g++", allow_module_level=True)

from trunkline.training.self_test import OPS, outcome
from virtual_gpu import run
from virtual_gpu.device import ARCHITECTURES, VirtualGPU

pytestmark = pytest.mark.filterwarnings("default")  # Triton compiles in this process

CHOSEN = {
    "bfloat16": [
        "attention: ragged, causal",
        "attention: 6 heads on 2",
        "attention: one tensor",
        "attention: width 256, short",
        "task_projection: ragged",
        "task_projection: many rows of one task",
        "task_gradients: ragged",
        "low_rank: ragged, parts",
        "low_rank: many rows of one adapter",
        "low_rank: one row",
        "task_loss: mixed, smoothed",
        "task_loss: chunks of 1024 rows",
        "task_loss: 256 classes",
        "task_loss: several labels, smoothed",
        "task_loss: 62 labels",
        "task_logits: three tasks",
        "linear_cross_entropy: 1008 words",
        "linear_cross_entropy: 7 words, all rows count",
        "linear_cross_entropy: everything",
    ],
    "float16": ["attention: window (64, 64)", "task_loss: mixed", "low_rank: rank 4"],
    "tf32": [
        "attention: window (0, 0)",
        "task_loss: mixed, smoothed",
        "task_projection: ragged",
        "low_rank: ragged, parts",
    ],
    "float32": ["attention: one head", "task_gradients: odd widths"],
}
CASES = [
    pytest.param(case, dtype, id=f"{dtype}, {case.op}: {case.name}")
    for dtype, names in CHOSEN.items()
    for case in run.cases(dtype)
    if f"{case.op}: {case.name}" in names
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_op(case, dtype, arch):
    _, wrong = run.run(case, arch, dtype)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_what_the_doctor_runs_on_a_gpu_passes(op):
    """In bfloat16, as training does. The rule is its own, and the numbers are those of the kernels."""
    with VirtualGPU(90) as gpu:
        assert outcome(op, torch.device("cpu"), torch.bfloat16).problem == ""
    assert gpu.records


def test_all_chosen_cases_exist():
    assert len(CASES) == sum(map(len, CHOSEN.values()))


def test_kernels_are_known():
    """What `make virtual` must have launched in the end."""
    assert {"_row_kernel", "_backward_in_steps_kernel", "_weight_gradient_kernel"} <= {
        name for _, name in run.kernels()
    }
