"""Every head: which rows an example has and what they say, what logits predict, and the loss of spans."""

import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

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
from trunkline.engine.heads.tag import UNREAD, word_rows
from trunkline.engine.network.span_loss import span_loss
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Counts, Encoded

# Tags


@either_trunk
@pytest.mark.parametrize("labels", [[0, 2, 1], ["noun", "other", "verb"], "noun other verb", "0 2 1"])
def test_a_tag_is_at_the_last_token_of_its_word(labels, causal):
    encoded = made(TAG, causal=causal, text=[" dogs of\n\twar "], label=[labels])
    example = encoded.example(0, task=0)
    shift = 0 if causal else 1
    assert example.rows.tolist() == [4 + shift, 7 + shift, 12 + shift]  # the s, the f and the r
    assert example.targets.tolist() == [0, 2, 1]
    assert encoded.reference(0) == [0, 2, 1]


def test_tags_are_those_of_the_last_text_column():
    task = changed(TAG, text=("context", "text"))
    example = made(task, context=["x y z"], text=["ab c"], label=["verb noun"]).example(0, task=0)
    assert (example.rows.tolist(), example.targets.tolist()) == ([7, 9], [1, 0])


def test_words_that_are_cut_off_have_no_tag():
    for max_length, rows in ((14, [3, 7, 12]), (13, [3, 7]), (9, [3, 7]), (8, [3]), (5, [3])):
        encoded = made(TAG, max_length, text=["dogs dog dogs"], label=["noun verb other"])
        assert encoded.example(0, task=0).rows.tolist() == rows
        assert encoded.reference(0) == [0, 1, 2][: len(rows)]
        assert encoded.counts == Counts(truncated=int(max_length < 14))
    columns = {"text": ["dogs", "do"], "label": ["noun", "verb"]}
    assert made(TAG, 4, **columns).counts == Counts(too_long=1)  # not one whole word is left


@pytest.mark.parametrize("label", ["noun", ["noun", "verb", "noun"], "noun verb other", 1])
def test_another_number_of_tags_than_words_is_an_error(label):
    message = error_of(TAG, text=["a b", "a b"], label=["noun verb", label])
    count = 1 if label in ("noun", 1) else 3
    assert "label must have one tag for each of the 2 words, got " + str(count) in message
    assert message.endswith(f"{label!r} (train.csv, row 2)")


@pytest.mark.parametrize("tag", [3, -100, "adverb", None, math.nan])
def test_a_tag_that_is_no_class_is_an_error(tag):
    message = error_of(TAG, text=["a b", "a b"], label=[[0, 1], [0, tag]])
    assert message.endswith(f"one of noun, verb, other, got {tag!r} (train.csv, row 2)")


def test_a_single_tag_needs_no_list():
    assert made(TAG, text=["dogs"], label=[1]).reference(0) == [1]


def test_tags_stay_at_their_words_where_the_tokenizer_drops_characters():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "dogs": 1, "bark": 2}, "[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    columns = {"text": ["dogs \u200b bark"], "label": [["noun", "other", "verb"]]}  # a word of no width, no token
    encoded = made(TAG, tokenizer=Tokenizer(inner), **columns)
    assert encoded.tokens_of(0)[:2].tolist() == [1, 2]
    example = encoded.example(0, task=0)
    assert (example.rows.tolist(), example.targets.tolist()) == ([0, 1], [0, 1])
    laid = Layout(Tokenizer(inner), 64, causal=True).lay(columns["text"])
    assert HEADS["tag"].rows(laid) == [0, 1]
    assert HEADS["tag"].describe(TAG, [0, 1], laid) == ["noun", UNREAD, "verb"]


def bert(letters: str) -> Tokenizer:
    """A tokenizer like BERT's, which leaves out control characters, marks and accents."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return Tokenizer(inner)


@either_trunk
@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("red\u200b mug", [True, True]),
        ("red \u00ad mug", [True, False, True]),
        ("\ufeff red mu\u00adg\u00ad", [False, True, True]),
        ("r\u0301 e\u0301d\u0301 \u0301 g", [True, True, False, True]),
        ("घर में है", [True, True, True]),  # whose vowel signs are marks
        ("\u200b \u200b", [False, False]),
        (["red mug", "", "\u200b", "mug"], [True, False, False, True]),
        (["", "red"], [False, True]),
    ],
    ids=ascii,
)
def test_every_word_has_its_own_tag_or_none(text, read, causal):
    tokenizer = bert("redmugघरमह")
    text = text_of(text)
    tags = [place % 3 for place in range(len(read))]
    laid = Layout(tokenizer, 64, causal).lay([text])
    head, expected = HEADS["tag"], [tag for tag, seen in zip(tags, read, strict=True) if seen]
    assert [token >= 0 for token in word_rows(laid)] == read
    words = [TAG.labels[tag] if seen else UNREAD for tag, seen in zip(tags, read, strict=True)]
    assert head.describe(TAG, expected, laid) == words
    good = {"text": [text, "g"], "label": [tags, [0]]}
    encoded = made(TAG, causal=causal, tokenizer=tokenizer, **good)
    assert encoded.counts == Counts(empty=int(not any(read)))
    assert encoded.reference(0) == (expected or [0])


def test_the_parts_of_a_list_are_its_words():
    columns = {"text": [["New York", "", "sleeps", "now"]], "label": [["noun", "other", "verb", "other"]]}
    encoded = made(TAG, **columns)
    example = encoded.example(0, task=0)
    read = [BYTES.decode(encoded.tokens_of(0)[: row + 1]) for row in example.rows]
    assert [text.split()[-1] for text in read] == ["York", "sleeps", "now"]
    assert example.targets.tolist() == [0, 1, 2]
    message = error_of(TAG, text=columns["text"], label=[["noun", "noun", "verb", "other", "other"]])
    assert "one tag for each of the 4 words, got 5" in message


@pytest.mark.parametrize("length", [64, 12, 9, 8, 4, 3])
def test_a_long_text_has_a_tag_or_a_placeholder_for_every_word(length):
    laid = Layout(BYTES, length, causal=True).lay(["one two three"])
    rows = word_rows(laid)
    assert len(rows) == 3
    read = [end <= length - 1 for end in (3, 7, 13)]
    assert [token >= 0 for token in rows] == read
    assert HEADS["tag"].describe(TAG, [1] * sum(read), laid) == ["verb" if seen else UNREAD for seen in read]


def test_of_a_token_of_two_words_the_later_one_has_the_row():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a b": 1, " c": 2, "d": 3}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("a b| c|d"), "isolated")
    laid = Layout(Tokenizer(inner), 64, causal=True).lay(["a b cd"])
    assert laid.offsets == [(0, 3), (3, 5), (5, 6)]
    assert word_rows(laid) == [-1, 0, 2]


def test_the_placeholder_is_no_tag():
    with pytest.raises(ValueError, match="task 'pos': labels: '<unread>' stands for"):
        changed(TAG, labels=("noun", UNREAD))


@pytest.mark.parametrize("text", ["The quick-brown fox, naïve!", "漢字 🎉🎉x a\u00a0b", " a\x85b\x1cc\n\nd  é "])
def test_the_row_of_a_word_has_read_the_word_and_no_more(text, shared_data: Path):
    folder = shared_data.parent / "tokenizers" / "gpt2"
    gpt2 = Tokenizer.load(str(folder)) if folder.is_dir() else pytest.skip(f"needs the tokenizer of GPT-2 in {folder}")
    laid = Layout(gpt2, 128, causal=True).lay([text])
    rows = word_rows(laid)
    read = [gpt2.inner.decode(laid.tokens[: row + 1].tolist()) for row in rows]
    assert [prefix.split()[-1] for prefix in read] == text.split()
    assert [len(prefix.split()) for prefix in read] == list(range(1, len(text.split()) + 1))


# Spans


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
