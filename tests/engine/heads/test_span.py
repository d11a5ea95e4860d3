"""Spans: where an answer is among the tokens, and the loss over its two ends."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from encoded import (
    SPAN,
    bert,
    changed,
    either_trunk,
    error_of,
    ids,
    made,
)
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.span_loss import span_loss
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Counts, Encoded


def span_rows(**columns) -> Encoded:
    return made(SPAN, question=["who"] * len(columns["text"]), **columns)


@either_trunk
def test_a_span_is_at_its_first_and_last_token(causal):
    encoded = made(SPAN, causal=causal, question=["who"], text=["it was Bob"], label=["Bob"])
    example = encoded.example(0, task=0)
    first = 4 if causal else 5  # of the text
    assert example.rows.tolist() == list(range(first, first + 10))
    assert example.targets.tolist() == [0] * 7 + [1, 0, 2]
    assert example.weights.tolist() == [0.0] * 7 + [0.5, 0.0, 0.5]
    assert encoded.reference(0) == (7, 9)
    answer = encoded.tokens_of(0)[first + 7 : first + 10]
    assert answer.tolist() == ids("Bob")


def test_an_answer_of_one_token_is_first_and_last():
    encoded = span_rows(text=["a b c"], label=["b"])
    assert encoded.example(0, task=0).targets.tolist() == [0, 0, 3, 0, 0]
    assert encoded.example(0, task=0).weights.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert encoded.reference(0) == (2, 2)


@pytest.mark.parametrize(("start", "first"), [(0, 0), (7, 7), ("7", 7), (7.0, 7), (None, 0)])
def test_the_start_tells_repeated_answers_apart(start, first):
    task = changed(SPAN, start="start")
    columns = {"question": ["who"], "text": ["Bob or Bob"], "label": ["Bob"], "start": [start]}
    assert made(task, **columns).reference(0) == (first, first + 2)
    assert span_rows(text=["Bob or Bob"], label=["Bob"]).reference(0) == (0, 2)


def test_an_answer_inside_a_token_has_that_token():
    merged = Tokenizer.train([" Bobby"] * 9, 300)  # ' Bobby' is one token
    encoded = made(SPAN, tokenizer=merged, question=["?"], text=["a Bobby b"], label=["ob"])
    assert encoded.reference(0) == (1, 1)
    laid = Layout(merged, 64, causal=True).lay(["?", "a Bobby b"])
    assert HEADS["span"].describe(SPAN, (1, 1), laid) == "Bobby"


def test_characters_of_several_tokens_are_in_the_answer_as_a_whole():
    encoded = span_rows(text=["a 🎉🎉 b"], label=["🎉🎉"])  # four bytes each
    assert encoded.reference(0) == (2, 9)


def test_a_text_without_tokens_has_no_span_and_no_sentence():
    tokenizer = bert("abc")
    laid = Layout(tokenizer, 64, causal=False).lay(["abc", "\u200b"])
    with pytest.raises(ValueError, match="there is no span in '.*', which the tokenizer makes no token of"):
        HEADS["span"].rows(laid)
    assert list(HEADS["extract"].rows(laid)) == []
    columns = {"question": ["abc", "a"], "text": ["\u200b", "abc"], "label": ["\u200b", "abc"]}
    assert made(SPAN, tokenizer=tokenizer, **columns).counts == Counts(empty=1)


def test_an_answer_that_is_not_there_is_an_error():
    message = error_of(SPAN, question=["?", "?"], text=["ab", "abc"], label=["b", "d"])
    assert message == "task 'answer': label 'd' does not stand in column 'text' (train.csv, row 2)"
    task, columns = changed(SPAN, start="start"), {"question": ["?"], "text": ["Bob or Bob."], "label": ["Bob"]}
    for start in (1, -4, 100):
        message = error_of(task, **columns, start=[start])
        assert message.startswith(f"task 'answer': label 'Bob' does not stand at character {start} in column 'text'")
    for start in ("x", [7], math.nan):
        message = error_of(task, **columns, start=[start])
        assert message == f"task 'answer': start must be a finite number, got {start!r} (train.csv, row 1)"
    assert "text must be a string, got 5" in error_of(SPAN, question=["?"], text=["a 5"], label=[5])


@pytest.mark.parametrize(
    "label",
    [
        {"text": ["Bob", "b"], "answer_start": [7, 0]},
        {"text": "Bob", "answer_start": 7},
        [{"text": "Bob", "answer_start": 7}, {"text": "or", "answer_start": 4}],
    ],
    ids=str,
)
def test_answers_may_be_nested_as_in_squad(label):
    assert span_rows(text=["Bob or Bob"], label=[label]).reference(0) == (7, 9)
    empty = {"text": [], "answer_start": []}
    drop = made(changed(SPAN, unlabelled="drop"), question=["?"] * 2, text=["ab"] * 2, label=[empty, "b"])
    assert drop.counts == Counts(unlabelled=1)
    assert "unlabelled row: 'label' is" in error_of(SPAN, question=["?"], text=["ab"], label=[empty])
    assert "must be a text, or have a text as SQuAD's" in error_of(SPAN, question=["?"], text=["ab"], label=[{"a": 1}])


def test_an_answer_that_is_cut_off_is_dropped_and_counted():
    columns = {"question": ["?"] * 3, "text": ["abcdefgh"] * 3, "label": ["abc", "bcdefg", "h"]}
    encoded = made(SPAN, 9, **columns)  # six characters of the text are left
    assert len(encoded) == 1
    assert encoded.reference(0) == (0, 2)
    assert encoded.counts == Counts(too_long=2, truncated=1)
    assert len(made(SPAN, 10, **columns)) == 2  # seven
    message = error_of(changed(SPAN, too_long="error"), 9, **columns)
    assert message.endswith("policy for that is 'error' (train.csv, row 1)")


# The loss of spans

LENGTHS, OF_TASK = [3, 1, 6, 2, 4], [0, 0, 1, 1, 3]  # task 2 has none
ANSWERS = [(0, 2), (0, 0), (2, 2), (0, 1), (1, 3)]


def spans() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tasks, targets, weights and sequences of the rows of five texts."""
    task = torch.tensor(OF_TASK).repeat_interleave(torch.tensor(LENGTHS))
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    labels = [
        HEADS["span"].label(np.zeros(length), np.array([0, length, *answer]), True)
        for length, answer in zip(LENGTHS, ANSWERS, strict=True)
    ]
    target = torch.from_numpy(np.concatenate([label.targets for label in labels]))
    weight = torch.from_numpy(np.concatenate([label.weights for label in labels])).float()
    return task, target, weight, sequence


def span_loss_plainly(logits: Tensor) -> list[Tensor]:
    """Of every text: the mean cross-entropy of its first and its last token."""
    losses = []
    for text, (first, last) in zip(logits.split(LENGTHS), ANSWERS, strict=True):
        losses.append(-(text[:, 0].log_softmax(0)[first] + text[:, 1].log_softmax(0)[last]) / 2)
    return losses


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_span_loss_is_the_cross_entropy_over_each_text(scale):
    task, target, weight, sequence = spans()
    logits = (torch.randn(sum(LENGTHS), 2) * scale).requires_grad_()
    sums = span_loss(logits, task, target, weight, sequence, 4)
    exact = logits.detach().double().requires_grad_()
    losses = span_loss_plainly(exact)
    per_task = torch.stack([losses[0] + losses[1], losses[2] + losses[3], losses[2] * 0, losses[4]])
    torch.testing.assert_close(sums.loss.double(), per_task, rtol=1e-6, atol=1e-6)
    assert sums.weight.tolist() == [2.0, 2.0, 0.0, 1.0]  # one for each text
    assert sums.count.tolist() == [3.0, 3.0, 0.0, 2.0]
    factor = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (sums.loss * factor).sum().backward()
    (per_task * factor).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_right_first_or_last_token_is_half_a_right_span():
    task, target, weight, sequence = spans()
    logits = torch.zeros(sum(LENGTHS), 2)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    for text, (first, last) in enumerate(ANSWERS):
        logits[starts[text] + first, 0] = logits[starts[text] + last, 1] = 1.0
    correct = span_loss(logits, task, target, weight, sequence, 4).correct
    assert correct.tolist() == [2.0, 2.0, 0.0, 1.0]
    logits[0, 0] = -1.0  # the first text's first token is wrong now
    correct = span_loss(logits, task, target, weight, sequence, 4).correct
    assert correct.tolist() == [1.5, 2.0, 0.0, 1.0]
    logits[1 + 3 + 2, 1] = -1.0  # an answer of one token, right at one end only, is not right
    correct = span_loss(logits, task, target, weight, sequence, 4).correct
    assert correct.tolist() == [1.5, 1.0, 0.0, 1.0]
