"""Tags: every word has its own, or a placeholder, whatever the tokenizer makes of it."""

import math
from pathlib import Path

import pytest
import tokenizers

from encoded import (
    BYTES,
    TAG,
    bert,
    changed,
    either_trunk,
    error_of,
    made,
)
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.heads.tag import UNREAD, word_rows
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Counts


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
