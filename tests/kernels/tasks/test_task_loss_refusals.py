"""Bad input of the small heads' losses: the error names what was expected and what came, with task and row."""

import importlib.util

import pytest
import torch

from small_heads import CLASSES, ROWS, make
from trunkline.kernels import arguments
from trunkline.kernels.tasks.task_loss import task_loss


@pytest.mark.parametrize(("weight", "bias"), [((19, 23), (19,)), ((19, 24), (18,)), ((19, 24), (19, 1))])
def test_wrong_table_is_named(weight, bias):
    message = (
        rf"task_loss: weight must be \(K, 24\) and bias \(K,\), got \[{', '.join(map(str, weight))}\] and "
        rf"\[{', '.join(map(str, bias))}\]"
    )
    inputs = make([0, 1])._replace(weight=torch.zeros(weight), bias=torch.zeros(bias))
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs, width=max(CLASSES))


@pytest.mark.parametrize("name", ["target", "value", "row_weight"])
def test_wrong_number_of_rows_is_named(name):
    inputs = make([0, 1])
    inputs = inputs._replace(**{name: getattr(inputs, name).repeat(2)})
    with pytest.raises(ValueError, match=rf"task_loss: {name} must be \(R,\) = \(2,\) to match x, got \[4\]"):
        task_loss(*inputs, width=max(CLASSES))


@pytest.mark.parametrize("target", [-1, 2, 7])
def test_target_outside_of_the_classes_is_named(target):
    inputs = make(ROWS["mixed"])
    inputs.target[101] = target
    message = rf"task_loss: target must be in \[0, 2\) for task 2, got {target} at row 101"
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs, width=max(CLASSES))


@pytest.mark.parametrize("target", [-1, 3, 50])
def test_target_outside_of_the_classes_is_named_with_class_weights(target):
    inputs = make([0, 1, 1, 2])
    inputs.target[0] = target
    with pytest.raises(ValueError, match=rf"target must be in \[0, 3\) for task 0, got {target} at row 0"):
        task_loss(*inputs, width=max(CLASSES), class_weight=torch.ones(sum(CLASSES)))


def test_class_weights_of_other_classes_are_named():
    with pytest.raises(ValueError, match=r"task_loss: class_weight must be \(K,\) = \(19,\), got \[18\]"):
        task_loss(*make([0, 1]), width=max(CLASSES), class_weight=torch.ones(18))


@pytest.mark.gpu
def test_debug_flag_looks_at_every_target_on_a_gpu(monkeypatch):
    monkeypatch.setattr(arguments, "_CHECK", True)
    inputs = make(ROWS["mixed"], device="cuda")
    inputs.target[101] = 2
    with pytest.raises(ValueError, match=r"target must be in \[0, 2\) for task 2, got 2 at row 101"):
        task_loss(*inputs, width=max(CLASSES))


@pytest.mark.parametrize(("flag", "looks"), [("1", True), ("", False)])
def test_debug_flag_comes_from_the_environment(flag, looks, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CHECK", flag)
    found = importlib.util.spec_from_file_location("read_again", arguments.__file__)
    read_again = importlib.util.module_from_spec(found)
    found.loader.exec_module(read_again)
    assert read_again.can_look(torch.empty(0, device="meta")) == looks  # like a GPU's: not in the CPU's memory
    assert read_again.can_look(torch.empty(0))


def test_float_targets_are_named():
    inputs = make([0, 1])
    with pytest.raises(ValueError, match=r"target must be int64 classes, got torch.float32; numbers belong into value"):
        task_loss(*inputs._replace(target=inputs.target.float()), width=max(CLASSES))


@pytest.mark.parametrize("class_weight", [None, torch.ones(sum(CLASSES))], ids=["", "class weights"])
@pytest.mark.parametrize("offsets", [[0, 1, 1, 1, 1, 1, 1], [0, 2, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]])
def test_offsets_that_do_not_cover_the_rows_are_named(offsets, class_weight):
    inputs = make([0, 1])._replace(offsets=torch.tensor(offsets, dtype=torch.int32))
    message = rf"task_loss: offsets must rise from 0 to R = 2, got \[{', '.join(map(str, offsets))}\]"
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs, width=max(CLASSES), class_weight=class_weight)


def test_wrong_number_of_tasks_is_named():
    inputs = make([0, 1])
    message = r"offsets must be \(7,\) and regression \(6,\) to match class_offsets of N = 6 tasks, got \[6\] and \[6\]"
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs._replace(offsets=inputs.offsets[:-1]), width=max(CLASSES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2)}, r"x must be \(R, D\) and class_offsets \(N \+ 1,\) of at least one task, got \[2\]"),
        ({"class_offsets": torch.zeros(1, dtype=torch.int32)}, r"of at least one task, got \[2, 24\] and \[1\]"),
        (
            {"weight": torch.zeros(3, 24), "bias": torch.zeros(3)},
            "every one of N = 6 tasks must have a column, got K = 3",
        ),
        ({"regression": torch.zeros(6, dtype=torch.int64)}, r"regression must be bool, got torch\.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_tasks_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        task_loss(*make([0, 1])._replace(**changes), width=max(CLASSES))


def test_width_of_nothing_is_named():
    with pytest.raises(ValueError, match="width must be the columns of the widest task, at least 1, got 0"):
        task_loss(*make([0, 1]), width=0)


@pytest.mark.parametrize("width", [6, max(CLASSES)])
def test_columns_that_do_not_fit_the_table_are_named(width):
    inputs = make([0, 1])
    if width == max(CLASSES):
        inputs.class_offsets[-1] -= 1
    message = rf"class_offsets must rise from 0 to K = 19 by 1 to C = {width} columns a task, got \[0, 3, 4, 6, 13, 14"
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs, width=width)


def test_a_regression_of_several_columns_is_named():
    inputs = make(ROWS["mixed"])
    inputs.regression[3] = True
    with pytest.raises(ValueError, match="task_loss: a regression has one column, got 7 in class_offsets for task 3"):
        task_loss(*inputs, width=max(CLASSES))
