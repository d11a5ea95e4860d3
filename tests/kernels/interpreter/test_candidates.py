"""Whatever `trunkline tune` may choose, the numbers are right: every candidate of every decision, at small sizes."""

import pytest
import torch

from trunkline.kernels.decisions import questions, trying
from trunkline.kernels.tasks import task_projection_triton
from trunkline.training.self_test import OPS, Check

OF_NAME = {op.name: op for op in OPS}
ATTENTION = {"lengths": [30, 1, 70, 0, 130], "causal": True}  # tiles of both widths, and blocks
SIZES = {
    "heads of 64": ("attention", {**ATTENTION, "heads": 1, "head_dim": 64}),
    "heads of 128": ("attention", {**ATTENTION, "heads": 1, "head_dim": 128}),
    "grouped heads": ("attention", {"lengths": [30, 70], "causal": False, "heads": 2, "kv_heads": 1, "head_dim": 64}),
    "small products": ("task_projection", {"rows": 150, "tasks": 4, "width": 72, "columns": 80}),
    "large products": ("task_projection", {"rows": 150, "tasks": 4, "width": 72, "columns": 80}),
    "narrow products": ("task_projection", {"rows": 150, "tasks": 4, "width": 40, "columns": 16}),
    "losses": ("task_loss", {"rows": 70, "tasks": 3, "width": 40, "classes": 5}),
    "words": ("linear_cross_entropy", {"rows": 5, "width": 16, "vocabulary": 9000, "tasks": 2}),
    "gradients": ("task_gradients", {"tokens": 90, "tasks": 3, "width_in": 70, "width_out": 50}),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_every_candidate_is_right(name, device, monkeypatch):
    if name == "large products":
        monkeypatch.setattr(task_projection_triton, "_is_large", lambda *sizes: True)
    of_op, sizes = SIZES[name]
    check = Check(OF_NAME[of_op], OF_NAME[of_op].example(torch.device(device), torch.float16, **sizes), torch.float16)
    with questions() as asked:
        assert check.outcome().problem == ""
    tried = [  # whose kernels is no matter of ours
        (question, answer) for question in asked for answer in question.answers[1:] if not isinstance(answer, str)
    ]
    assert tried
    for question, answer in tried:
        with trying(question, answer):
            assert check.outcome().problem == "", f"{question.place}: {answer}"
