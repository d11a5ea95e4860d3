"""Several labels an example: what cells mean, what is learnt and predicted, and what cannot be."""

import math

import pytest
import torch
import torch.nn.functional as F

from encoded import changed, error_of, made
from trunkline.engine.heads.multi_label import MultiLabel
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.tasks.task import Task

TOPICS = Task("topics", "multi-label", ("text",), "label", ("billing", "bug", "urgent"))
FLAGS = changed(TOPICS, label="")
HEAD = MultiLabel()


def test_cells_are_lists_or_texts():
    cells = [["bug"], "bug|urgent", [], "", [2, "billing"], " bug | billing ", "urgent", 1]
    cells += ["['bug', \"urgent\"]", "[]"]  # as pandas writes lists
    encoded = made(TOPICS, text=["a"] * len(cells), label=cells)
    assert [encoded.reference(i) for i in range(len(cells))] == [
        (1,), (1, 2), (), (), (0, 2), (0, 1), (2,), (1,), (1, 2), ()
    ]  # fmt: skip
    assert [encoded.example(i, 0).targets.tolist() for i in range(len(cells))] == [
        [0b010], [0b110], [0], [0], [0b101], [0b011], [0b100], [0b010], [0b110], [0]
    ]  # fmt: skip


def test_a_column_of_0_and_1_for_every_label():
    columns = {"billing": ["0", "1", "0.0"], "bug": [1, 1, True], "urgent": [0.0, "1", False]}
    encoded = made(FLAGS, text=["a"] * 3, **columns)
    assert [encoded.reference(i) for i in range(3)] == [(1,), (0, 1, 2), (1,)]


def test_63_labels_are_bits_of_one_number():
    task = changed(TOPICS, labels=tuple(f"label {c}" for c in range(63)))
    encoded = made(task, text=["a"], label=[[0, 61, 62]])
    assert encoded.example(0, 0).targets.tolist() == [1 + 2**61 + 2**62]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["bug", "bugs"], "a class id in [0, 3) or one of billing, bug, urgent, got 'bugs' (train.csv, row 2)"),
        (["bug", "bug||urgent"], "got '' (train.csv, row 2)"),
        (["[bug]"], "got '[bug]' (train.csv, row 1)"),
        ([[1], [3]], "one of billing, bug, urgent, got 3 (train.csv, row 2)"),
        ([[0, 1, 1]], "label names 'bug' twice in [0, 1, 1]; it must be a list of classes, or a text with '|' between"),
        ([["bug"], None], "unlabelled row: 'label' is None; policy is 'error', and"),
        ([["bug"], math.nan], "unlabelled row: 'label' is nan"),
        ([["bug"], {"bug": 1}], "got {'bug': 1} (train.csv, row 2)"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_cells_are_named(cells, message):
    assert message in error_of(TOPICS, text=["a"] * len(cells), label=cells)


@pytest.mark.parametrize("cell", ["yes", 2, "-1", None, "0,5", [1]])
def test_a_flag_is_0_or_1(cell):
    error = error_of(FLAGS, text=["a", "b"], billing=[0, 1], bug=[0, cell], urgent=[1, 1])
    assert f"column 'bug' must be 0 or 1, got {cell!r} (train.csv, row 2)" in error


def test_a_row_without_any_flag_is_unlabelled():
    columns = {"text": ["a", "b"], **dict.fromkeys(TOPICS.labels, [1, None])}
    assert "unlabelled row: 'billing' is None" in error_of(FLAGS, **columns)
    assert made(changed(FLAGS, unlabelled="drop"), **columns).counts.unlabelled == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ()}, "head 'multi-label' needs labels"),
        ({"labels": tuple(map(str, range(64)))}, "takes at most 63 labels, got 64"),
        ({"labels": ("a", "b|c")}, r"labels: 'b\|c' has a '\|', which stands between the labels of one cell"),
        ({"metrics": ("matthews",)}, "of a 'multi-label' head are micro_f1, macro_f1, accuracy; got 'matthews'"),
        ({"threshold": 1.0}, "threshold must be 'fit' or a probability between 0 and 1, got 1.0"),
        ({"threshold": "best"}, "threshold"),
        ({"head": "classify", "threshold": 0.4}, "threshold belongs to multi-label, not to 'classify'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_task_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(TOPICS, **fields)


def model_of(*tasks: Task) -> MultiTaskModel:
    torch.manual_seed(0)
    trunk = TrunkConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    return MultiTaskModel(Trunk(trunk), tasks).double().eval()


def test_loss_is_binary_cross_entropy_beside_other_tasks():
    other = changed(TOPICS, name="topic", head="classify")
    model = model_of(other, TOPICS)
    texts = {"text": ["a note", "b", "some more"], "label": [["bug"], "billing|urgent", ""]}
    several = made(TOPICS, **texts)
    one = made(other, text=texts["text"], label=["bug"] * 3)
    examples = [*(one.example(i, 0) for i in range(3)), *(several.example(i, 1) for i in range(3))]
    sums = model(pack(examples, 2))
    x = model.hidden(batch := pack([several.example(i, 1) for i in range(3)], 2))
    holds = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 0, 0]]).double()[list(batch.order)]
    expected = F.binary_cross_entropy_with_logits(F.linear(x, model.weight[3:], model.bias[3:]), holds)
    torch.testing.assert_close(sums.loss[1] / sums.weight[1], expected, check_dtype=False)
    alone = model(pack([one.example(i, 0) for i in range(3)], 2))
    torch.testing.assert_close(sums.loss[0], alone.loss[0])


def test_what_is_above_its_threshold_is_predicted():
    model = model_of(changed(TOPICS, threshold=0.75))
    odds = torch.tensor([[2.9, 3.1, 1.0]]).log().double()  # of 3 to 1 the probability is 3/4
    assert model.predict(odds, 0) == (1,)
    model.threshold[2] = 0.4
    assert model.predict(odds, 0) == (1, 2)
    model.temperature[0] = 1e6  # all probabilities are about 1/2
    assert model.predict(odds, 0) == (2,)


def test_probabilities_of_labels():
    said = HEAD.scores(TOPICS, (1,), torch.tensor([[0.0, 3.0, -1.0]]).exp().log(), None)
    assert said["scores"] == pytest.approx({"billing": 0.5, "bug": 0.9525741, "urgent": 0.2689414})
    logits, target = HEAD.choices(torch.tensor([[0.5, 3.0, -1.0]]), made(TOPICS, text=["a"], label=["bug"]).piece(0))
    torch.testing.assert_close(logits.softmax(-1)[:, 1], torch.tensor([0.5, 3.0, -1.0]).sigmoid())
    assert target.tolist() == [0, 1, 0]


def test_trivial_prediction_is_the_most_common_label():
    assert HEAD.trivial([(), (), (2,), (1, 2)], [], [(), (0,)]) == {"most common label": [(2,), (2,)]}
    assert HEAD.trivial([(), ()], [], [()]) == {"most common label": [()]}
