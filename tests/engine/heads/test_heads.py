"""Every head: which rows an example has and what they say, and what logits predict."""

import pytest
import torch

from encoded import (
    BYTES,
    CLASSIFY,
    END,
    GENERATE,
    REGRESS,
    SPAN,
    SUMMARY,
    TAG,
    TEXT,
    changed,
    either_trunk,
    error_of,
    ids,
    made,
    tokens,
)
from trunkline.engine.heads.head import GROUPS
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Counts

# Texts to be generated


def test_a_target_follows_the_summary_token():
    encoded = made(GENERATE, text=["abc def"], label=[" xy "])
    prompt = [*ids("abc def"), SUMMARY]
    assert tokens(encoded) == [[*prompt, *ids(" xy"), END]]
    assert encoded.prompt_of(0).tolist() == prompt
    assert encoded.reference(0) == " xy "
    example = encoded.example(0, task=0)
    assert example.rows.tolist() == [7, 8, 9, 10]  # SUMMARY predicts the first token, the last one END
    assert example.targets.tolist() == [*ids(" xy"), END]


def test_the_first_of_several_references_is_learnt():
    encoded = made(GENERATE, text=["a", "b", "c"], label=[["x", "yz"], ["w"], ["", " ", "v"]])
    assert tokens(encoded)[0] == [*ids("a"), SUMMARY, *ids(" x"), END]
    assert tokens(encoded)[2] == [*ids("c"), SUMMARY, *ids(" v"), END]
    assert [encoded.reference(i) for i in range(3)] == [["x", "yz"], "w", "v"]
    drop = changed(GENERATE, unlabelled="drop")
    assert made(drop, text=["a", "b"], label=["x", [" ", ""]]).counts == Counts(unlabelled=1)


def test_a_long_target_is_cut_and_counted():
    columns = {"text": ["ab", "ab"], "label": ["123456789", "1234567890"]}  # with the space, 10 and 11 tokens
    encoded = made(GENERATE, **columns)
    assert [example[3:] for example in tokens(encoded)] == [[*ids(" 123456789"), END]] * 2
    assert encoded.counts == Counts(truncated=1)
    assert encoded.reference(1) == "1234567890"  # what is matched is not cut
    assert made(changed(GENERATE, too_long="drop"), **columns).counts == Counts(too_long=1)


def test_a_long_document_leaves_room_for_the_longest_target():
    encoded = made(GENERATE, 20, text=["abcdefghijklmn"] * 2, label=["123456789", "1"])
    for i, target in enumerate((" 123456789", " 1")):
        assert tokens(encoded)[i] == [*ids("abcdefgh"), SUMMARY, *ids(target), END]
    assert encoded.lengths.max() == 20
    assert encoded.counts == Counts(truncated=2)
    assert Layout(BYTES, 20, True).prompt("abcdefghijklmn", 10).tokens.tolist() == encoded.prompt_of(0).tolist()


@pytest.mark.parametrize("label", [5, ["x", 5], {"a": 1}])
def test_a_target_that_is_no_text_is_an_error(label):
    message = error_of(GENERATE, text=["a", "b"], label=["x", label])
    place = "2 of 2" if isinstance(label, list) else "1 of 1"
    wrong = label[1] if isinstance(label, list) else label
    assert message == f"task 'short': reference {place} must be a string, got {wrong!r} (train.csv, row 2)"


# Language modelling


@pytest.mark.parametrize("length", [1, 5, 6, 7, 8, 13, 14, 15, 50])
def test_every_token_of_a_text_is_predicted_once(length):
    text = "".join(map(chr, range(48, 48 + length)))
    encoded = made(TEXT, 8, text=[text, "z"])
    whole, predicted = [END, *ids(text), END], []
    for i in range(len(encoded) - 1):
        example = encoded.example(i, task=0)
        assert 2 <= len(example.tokens) <= 8
        assert example.rows.tolist() == list(range(len(example.tokens) - 1))
        assert example.tokens[example.rows].tolist() == whole[len(predicted) : len(predicted) + len(example.rows)]
        predicted += example.targets.tolist()
        assert encoded.reference(i) == len(example.rows)
    assert predicted == whole[1:]
    assert tokens(encoded)[-1] == [END, *ids("z"), END]
    assert encoded.counts == Counts()


# What heads predict


@pytest.mark.parametrize("tokenizer", [BYTES, Tokenizer.train(["dogs bark at night"] * 9, 290)], ids=["bytes", "words"])
@either_trunk
@pytest.mark.parametrize(
    ("task", "columns", "said"),
    [
        (CLASSIFY, {"text": ["dogs"], "label": ["maybe"]}, "maybe"),
        (REGRESS, {"text": ["dogs"], "label": [2.5]}, 2.5),
        (TAG, {"text": ["dogs bark at night"], "label": ["noun verb other noun"]}, ["noun", "verb", "other", "noun"]),
        (SPAN, {"question": ["when"], "text": ["dogs bark at night"], "label": ["at night"]}, "at night"),
    ],
    ids=lambda value: value.head if isinstance(value, Task) else "",
)
def test_what_is_learnt_is_what_is_looked_at_and_said(task, columns, said, causal, tokenizer):
    """A model that is right about the labelled rows predicts the reference, from the rows that prediction looks at."""
    encoded = made(task, causal=causal, tokenizer=tokenizer, **columns)
    laid = Layout(tokenizer, 64, causal).lay([columns[column][0] for column in task.text])
    example, head = encoded.example(0, task=0), HEADS[task.head]
    assert laid.tokens.tolist() == example.tokens.tolist()
    assert list(head.rows(laid)) == example.rows.tolist()
    logits = torch.zeros(len(example.rows), head.columns(task))
    if task.head == "span":
        logits[example.targets & 1 > 0, 0] = 1.0
        logits[example.targets & 2 > 0, 1] = 1.0
    elif task.head == "regress":
        logits[:, 0] = torch.from_numpy(example.values)
    else:
        logits[torch.arange(len(logits)), torch.from_numpy(example.targets).long()] = 1.0
    prediction = head.predict(logits)
    assert prediction == encoded.reference(0)
    assert head.describe(task, prediction, laid) == said


def test_every_head_has_a_group_and_its_columns():
    tasks = (CLASSIFY, REGRESS, TAG, SPAN, GENERATE, TEXT)
    assert {task.head: (HEADS[task.head].group, HEADS[task.head].columns(task)) for task in tasks} == {
        "classify": ("table", 3),
        "regress": ("table", 1),
        "tag": ("table", 3),
        "span": ("span", 2),
        "generate": ("vocabulary", 0),
        "language-model": ("vocabulary", 0),
    }
    assert {head.group for head in HEADS.values()} == set(GROUPS)


def test_a_class_is_the_largest_logit_and_a_number_the_logit():
    assert HEADS["classify"].predict(torch.tensor([[0.1, -3.0, 0.2]])) == 2
    assert HEADS["regress"].predict(torch.tensor([[-1.5]])) == -1.5
    assert HEADS["tag"].predict(torch.tensor([[0.0, 1.0], [3.0, 2.0], [-2.0, -1.0]])) == [1, 0, 1]
    assert HEADS["tag"].predict(torch.zeros(0, 2)) == []


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_span_is_the_best_pair_in_order(length):
    for _ in range(20):
        logits = torch.randn(length, 2)
        pairs = [(first, last) for first in range(length) for last in range(first, length)]
        best = max(pairs, key=lambda pair: float(logits[pair[0], 0] + logits[pair[1], 1]))
        assert HEADS["span"].predict(logits) == best
    backwards = torch.zeros(3, 2)
    backwards[2, 0] = backwards[0, 1] = 5.0  # the best first token comes after the best last one
    assert HEADS["span"].predict(backwards) in [(0, 0), (2, 2)]
