"""What tests of encoded data share: a task for every head, a tokenizer of bytes, and rows made on the spot."""

from dataclasses import replace
from typing import Any

import pytest
import tokenizers

from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Encoded
from trunkline.training.data.encoding import encode
from trunkline.training.data.sources import Rows

BYTES = Tokenizer.train([], 259)  # a character of ASCII is a token, so that places in texts are places in examples
END, SEPARATOR, SUMMARY = BYTES.end, BYTES.separator, BYTES.summary
CLASSIFY = Task("toy", "classify", ("text",), "label", ("no", "yes", "maybe"))
PAIR = Task("pair", "classify", ("first", "second"), "label", ("no", "yes"))
REGRESS = Task("score", "regress", ("text",), "label")
TAG = Task("pos", "tag", ("text",), "label", ("noun", "verb", "other"))
SPAN = Task("answer", "span", ("question", "text"), "label")
GENERATE = Task("short", "generate", ("text",), "label", max_target_tokens=10)
TEXT = Task("books", "language-model", ("text",))

either_trunk = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def rows_of(**columns: list[Any]) -> Rows:
    return Rows(columns, (("train.csv", len(next(iter(columns.values())))),), "digest")


def made(
    task: Task,
    max_length: int = 64,
    causal: bool = True,
    tokenizer: Tokenizer = BYTES,
    typed: bool = False,
    **columns: list[Any],
) -> Encoded:
    return encode(task, rows_of(**columns), tokenizer, max_length, causal, typed)


def error_of(task: Task, max_length: int = 64, tokenizer: Tokenizer = BYTES, **columns) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        made(task, max_length, tokenizer=tokenizer, **columns)
    return str(caught.value)


def ids(text: str, tokenizer: Tokenizer = BYTES) -> list[int]:
    return tokenizer.encode([text])[0][0].tolist()


def changed(task: Task, **fields) -> Task:
    return replace(task, **fields)


def tokens(encoded: Encoded) -> list[list[int]]:
    return [encoded.tokens_of(i).tolist() for i in range(len(encoded))]


def bert(letters: str) -> Tokenizer:
    """A tokenizer like BERT's, which leaves out control characters, marks and accents."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return Tokenizer(inner)
