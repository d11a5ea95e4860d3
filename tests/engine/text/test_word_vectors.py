"""Word vectors go to the tokens that are whole words, and to no others."""

from pathlib import Path

import pytest
import torch

from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.engine.text.word_vectors import put_vectors


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the red hen is in the barn"] * 20, 300, lowercase=True)


def test_whole_words_start_from_their_vectors(tokenizer, tmp_path):
    (tmp_path / "vectors.txt").write_text("the 1 2 3\nzebra 4 5 6\n. 7 8 9\nn 3 3 3\n")
    before = torch.randn(tokenizer.vocab_size, 4)
    after = before.clone()
    count = put_vectors(after, tokenizer, tmp_path / "vectors.txt")
    ((the,), _), ((*_, dot), _) = tokenizer.encode(["the", "hen."])
    changed = (after != before).any(1).nonzero()[:, 0].tolist()
    assert sorted(changed) == sorted([the, dot])  # a letter n ends a word, and is none
    assert count == 2
    assert after[the].tolist() == [1, 2, 3, before[the, 3].item()]
    assert after[dot, :3].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2\nred 1\n", "vectors.txt, line 2: expected a word and 2 numbers, got 1"),
        ("the 1 2\nred 1 x\n", "vectors.txt, line 2: could not convert string to float"),
        ("the 1 2 3 4 5\n", "5 numbers a word, more than the 4 of embeddings"),
        ("zebra 1 2\n", "not one of its words is a token"),
        ("the\n", "line 1: expected a word and its numbers, got 0"),
    ],
)
def test_files_that_cannot_be_used_are_named(tokenizer, tmp_path: Path, text, message):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        put_vectors(torch.zeros(tokenizer.vocab_size, 4), tokenizer, tmp_path / "vectors.txt")
