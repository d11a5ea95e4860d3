"""Rows become examples: where every token and label goes, what is dropped and counted, what is an error and where."""

import math

import numpy as np
import pytest
import tokenizers

from encoded import (
    BYTES,
    CLASSIFY,
    END,
    GENERATE,
    PAIR,
    REGRESS,
    SEPARATOR,
    SPAN,
    TAG,
    TEXT,
    changed,
    either_trunk,
    error_of,
    ids,
    made,
    tokens,
)
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data import encoding
from trunkline.training.data.encoded import Counts
from trunkline.training.data.encoding import encode
from trunkline.training.data.sources import Rows

# Layout


def test_a_causal_trunk_has_the_end_last_and_a_bidirectional_one_first():
    task, columns = changed(PAIR, text=("a", "b", "c")), {"a": ["ab"], "b": ["def"], "c": ["g"], "label": [0]}
    body = [*ids("ab"), SEPARATOR, *ids("def"), SEPARATOR, *ids("g")]
    assert tokens(made(task, **columns)) == [[*body, END]]
    assert tokens(made(task, causal=False, **columns)) == [[END, *body]]


@either_trunk
def test_the_class_is_at_the_end_token(causal):
    encoded = made(PAIR, causal=causal, first=["ab", "c"], second=["def", "gh"], label=[1, 0])
    for i, (length, target) in enumerate([(7, 1), (5, 0)]):
        example = encoded.example(i, task=3)
        assert example.task == 3
        assert example.rows.tolist() == [length - 1 if causal else 0]
        assert example.targets.tolist() == [target]
        assert example.weights.tolist() == [1.0]
        assert example.tokens[example.rows[0]] == END


@either_trunk
@pytest.mark.parametrize(
    ("first", "second", "max_length", "kept"),
    [
        ("abcdefghij", "xyz", 15, ("abcdefghij", "xyz")),
        ("abcdefghij", "xyz", 14, ("abcdefghi", "xyz")),
        ("xyz", "abcdefghij", 12, ("xyz", "abcdefg")),
        ("abcdefghij", "uvwxyz", 12, ("abcde", "uvwxy")),
        ("abcdefghij", "uvwxyz", 11, ("abcd", "uvwxy")),
        ("abcdefghij", "", 6, ("abcd", "")),
    ],
)
def test_the_longest_text_loses_its_tail(first, second, max_length, kept, causal):
    encoded = made(PAIR, max_length, causal, first=[first], second=[second], label=[0])
    body = [*ids(kept[0]), SEPARATOR, *ids(kept[1])]
    assert tokens(encoded) == [[*body, END] if causal else [END, *body]]
    assert encoded.counts == Counts(truncated=int((first, second) != kept))


def test_arrays_hold_examples_one_after_the_other():
    encoded = made(CLASSIFY, text=["abc", "d"], label=["yes", 0])
    assert len(encoded) == 2
    assert encoded.tokens.dtype == np.int32
    assert (encoded.bounds.tolist(), encoded.lengths.tolist()) == ([0, 4, 6], [4, 2])
    assert (encoded.labels.tolist(), encoded.label_bounds.tolist()) == ([1.0, 0.0], [0, 1, 2])
    assert encoded.prompt_of(1).tolist() == [*ids("d"), END]
    assert [encoded.reference(i) for i in range(2)] == [1, 0]


# Classes and numbers


def test_a_class_is_a_name_an_id_or_its_digits():
    labels = ["yes", 1, "1", 1.0, "1.0", True, "no", 0, False, "maybe", "2"]
    encoded = made(CLASSIFY, text=["a"] * len(labels), label=labels)
    assert [encoded.reference(i) for i in range(len(labels))] == [1, 1, 1, 1, 1, 1, 0, 0, 0, 2, 2]


def test_a_name_goes_before_an_id():
    task, labels = changed(CLASSIFY, labels=("1", "0", "-1")), ["1", "0", "-1", 1, 0, -1, -1.0, "-1.0", "01"]
    encoded = made(task, text=["a"] * len(labels), label=labels)
    assert [encoded.reference(i) for i in range(len(labels))] == [0, 1, 2, 0, 1, 2, 2, 2, 0]


@pytest.mark.parametrize(
    "label", [3, -2, "3", "-2", "Yes", "perhaps", "1.5", "3.0", 1.5, math.inf, [1], {"a": 1}, "1 "]
)
def test_a_label_that_is_no_class_is_an_error_with_task_file_row_and_value(label):
    message = error_of(CLASSIFY, text=["a", "b", "c"], label=[0, label, 0])
    assert message.startswith("task 'toy': label must be a class id in [0, 3) or one of no, yes, maybe, got ")
    assert message.endswith(f" {label!r} (train.csv, row 2)")


MISSING = [-1, -100, "-1", "-100", -1.0, "-1.0", None, math.nan, "", " ", []]


@pytest.mark.parametrize("label", MISSING, ids=repr)
def test_a_row_without_a_class_is_an_error_or_dropped_and_counted(label):
    columns = {"text": ["a", "b", "c"], "label": [0, label, 1]}
    message = error_of(CLASSIFY, **columns)
    policy = "policy is 'error', and `unlabelled: drop` on the task leaves such rows out"
    assert message == f"task 'toy': unlabelled row: 'label' is {label!r}; {policy} (train.csv, row 2)"
    encoded = made(changed(CLASSIFY, unlabelled="drop"), **columns)
    assert tokens(encoded) == [[*ids("a"), END], [*ids("c"), END]]
    assert [encoded.reference(i) for i in range(2)] == [0, 1]
    assert encoded.counts == Counts(unlabelled=1)


@pytest.mark.parametrize("task", [REGRESS, TAG, SPAN, GENERATE], ids=lambda task: task.head)
@pytest.mark.parametrize("label", [None, "", " ", math.nan, []], ids=repr)
def test_every_head_knows_a_row_without_a_label(task, label):
    columns = {column: ["a", "b"] for column in task.text}
    good = 1.0 if task is REGRESS else "noun" if task is TAG else "b"
    task = changed(task, unlabelled="drop")
    encoded = made(task, **columns, label=[label, good])
    assert encoded.counts == Counts(unlabelled=1)
    assert len(encoded) == 1


@either_trunk
def test_a_number_is_at_the_end_token(causal):
    labels = ["2.5", 3, -1, -100.0, "1e-3", True]
    encoded = made(REGRESS, causal=causal, text=["ab"] * 6, label=labels)
    assert [encoded.reference(i) for i in range(6)] == [2.5, 3.0, -1.0, -100.0, 0.001, 1.0]
    example = encoded.example(0, task=0)
    assert (example.rows.tolist(), example.values.tolist()) == ([2 if causal else 0], [2.5])
    assert example.targets.tolist() == [0]


@pytest.mark.parametrize("label", ["abc", "nan", math.inf, "-inf", [1.0], "1,5", "1_000", 10**400])
def test_a_label_that_is_no_number_is_an_error(label):
    message = error_of(REGRESS, text=["a", "b"], label=[0.0, label])
    assert message == f"task 'score': label must be a finite number, got {label!r} (train.csv, row 2)"


@pytest.mark.parametrize("label", [1e39, "-1e39", 10**39])
def test_a_label_beyond_float32_is_an_error(label):
    message = error_of(REGRESS, text=["a", "b"], label=[3.4028234e38, label])
    assert message == (
        f"task 'score': label must be at most 3.4e+38 in size, the largest float32, got {label!r} (train.csv, row 2)"
    )


# Texts


def test_rows_without_any_text_are_dropped_and_counted_or_an_error():
    columns = {"first": ["", "a", " \n", None], "second": ["b", None, "\t", ""], "label": [0, 1, 0, 1]}
    encoded = made(PAIR, **columns)
    assert tokens(encoded) == [[SEPARATOR, *ids("b"), END], [*ids("a"), SEPARATOR, END]]
    assert [encoded.reference(i) for i in range(2)] == [0, 1]
    assert encoded.counts == Counts(empty=2)
    message = error_of(changed(PAIR, empty="error"), **columns)
    policy = "policy is 'error', and `empty: drop` on the task leaves such rows out"
    assert message == f"task 'pair': empty row: 'first' is ' \\n'; {policy} (train.csv, row 3)"


@pytest.mark.parametrize("value", [5, 0.5, math.nan, True, {"a": "b"}, ["a", 5]])
@pytest.mark.parametrize("column", ["first", "second"])
def test_a_value_that_is_no_text_is_an_error_with_its_row(column, value):
    columns = {"first": ["a"] * 4, "second": ["b"] * 4, "label": [0] * 4}
    columns[column][1] = value
    wrong = value[1] if isinstance(value, list) else value
    assert error_of(PAIR, **columns) == f"task 'pair': text must be a string, got {wrong!r} (train.csv, row 2)"


@pytest.mark.parametrize("text", ["half a character \ud83d", ["a", "\udc00"]])
def test_half_a_character_is_an_error_with_its_row(text):
    message = error_of(CLASSIFY, text=["a", "b", text, "c"], label=[0, 0, 0, 0])
    assert "surrogates not allowed" in message
    assert message.startswith("task 'toy': ")
    assert message.endswith(" (train.csv, row 3)")


@pytest.mark.parametrize("column", ["first", "second"])
def test_a_text_that_the_tokenizer_cannot_encode_is_an_error_with_its_row(column):
    pieces = tokenizers.models.WordPiece({"a": 0, "b": 1}, unk_token="[UNK]")  # an entry that it has not
    columns = {"first": ["a"] * 4, "second": ["b"] * 4, "label": [0] * 4}
    columns[column][2] = "zoo"
    message = error_of(PAIR, tokenizer=Tokenizer(tokenizers.Tokenizer(pieces)), **columns)
    assert message.startswith("task 'pair': the tokenizer cannot encode 'zoo': ")
    assert message.endswith("(train.csv, row 3)")


def test_a_list_of_sentences_is_one_text():
    encoded = made(CLASSIFY, text=[["One.", "Two.", None]], label=[0])
    assert tokens(encoded) == [[*ids("One. Two. "), END]]


def test_a_split_without_a_usable_row_is_an_error_with_the_counts():
    message = error_of(changed(CLASSIFY, unlabelled="drop"), text=["", "a", "b"], label=[0, -1, None])
    assert message.startswith("task 'toy': none of the 3 rows of train.csv can be used: ")
    assert "'empty': 1" in message
    assert "'unlabelled': 2" in message


def test_long_rows_are_cut_dropped_or_an_error():
    columns = {"text": ["abc", "abcdefgh", "abcd"], "label": [0, 1, 2]}
    cut = made(CLASSIFY, 5, **columns)
    assert tokens(cut) == [[*ids(text), END] for text in ("abc", "abcd", "abcd")]
    assert cut.counts == Counts(truncated=1)
    dropped = made(changed(CLASSIFY, too_long="drop"), 5, **columns)
    assert [dropped.reference(i) for i in range(len(dropped))] == [0, 2]
    assert dropped.counts == Counts(too_long=1)
    message = error_of(changed(CLASSIFY, too_long="error"), 5, **columns)
    told = "8 tokens of text: longer than 5 tokens, and the task's policy for that is 'error' (train.csv, row 2)"
    assert message == f"task 'toy': {told}"


def test_rows_are_the_same_however_many_are_encoded_at_once(monkeypatch):
    columns = {"text": ["a", "bc", "", "def", "g", "hi", "j"], "label": [0, 1, 2, 0, -1, 1, 2]}
    task = changed(CLASSIFY, unlabelled="drop")
    whole = made(task, **columns)
    monkeypatch.setattr(encoding, "ENCODED_AT_ONCE", 3)
    at_once, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: at_once.append(len(a[1])) or encode(*a, **k))
    parts = made(task, **columns)
    assert at_once == [2, 1, 2]  # 3, 3 and 3 characters
    assert tokens(whole) == tokens(parts)
    assert whole.labels.tolist() == parts.labels.tolist() == [0, 1, 0, 1, 2]
    columns["label"][5] = "nope"
    assert error_of(task, **columns).endswith("got 'nope' (train.csv, row 6)")


def test_a_row_is_named_by_its_own_file():
    rows = Rows({"text": ["a"] * 5, "label": [0, 0, 0, 7, 0]}, (("a.csv", 2), ("b.csv", 3)), "digest")
    with pytest.raises(ValueError, match=r"got 7 \(b\.csv, row 2\)$"):
        encode(CLASSIFY, rows, BYTES, 64, True)


# The vocabulary


@pytest.mark.parametrize("task", [CLASSIFY, SPAN, GENERATE, TEXT], ids=lambda task: task.head)
def test_tokens_are_entries_of_the_vocabulary(task):
    merged = Tokenizer.train(["dogs bark at night"] * 9, 290)
    text = "dogs 🎉 \x00漢 <|end|> <|separator|>"
    label = {"classify": "no", "span": "dogs"}.get(task.head, "<|end|>🎉")
    encoded = made(task, tokenizer=merged, **dict.fromkeys(task.text, [text]), label=[label])
    assert encoded.tokens.min() >= 0
    assert encoded.tokens.max() < merged.vocab_size
    assert (encoded.tokens == merged.end).sum() == (2 if task is TEXT else 1)  # a text that spells it has none


def test_a_prompt_can_be_learnt_beside_the_target():
    encoded = made(GENERATE, text=["abcd"], label=["xy"])
    target_only, both = encoded.example(0, task=0), encoded.example(0, task=0, prompt_weight=0.25)
    prompt = len(encoded.prompt_of(0))
    assert both.rows.tolist() == list(range(len(both.tokens) - 1))
    assert both.targets.tolist() == both.tokens[1:].tolist()
    assert both.weights.tolist() == [0.25] * (prompt - 1) + [1.0] * len(target_only.rows)
    assert both.rows[prompt - 1 :].tolist() == target_only.rows.tolist()
    assert target_only.weights.tolist() == [1.0] * len(target_only.rows)


def test_classes_count_as_much_as_they_are_said_to():
    encoded = made(CLASSIFY, **{column: ["abc", "de", "f"] for column in CLASSIFY.text}, label=[0, 1, 0])
    weighted = [encoded.example(i, 0, class_weights=[0.5, 3.0]).weights.tolist() for i in range(3)]
    assert weighted == [[0.5], [3.0], [0.5]]
    assert encoded.example(1, 0).weights.tolist() == [1.0]
