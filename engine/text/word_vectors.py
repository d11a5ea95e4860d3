"""Word vectors that others have learnt, as GloVe's text files hold them: in every line a word and its numbers.

Source: Pennington et al., GloVe: Global Vectors for Word Representation, EMNLP 2014.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trunkline.engine.text.tokenizer import Tokenizer


def put_vectors(embedding: Tensor, tokenizer: Tokenizer, path: Path) -> int:
    """Gives the tokens that are whole words their vectors; other tokens, and columns beyond the vectors', stay.

    Args:
        embedding: (V, D), changed in place.

    Returns:
        How many tokens have one.

    Raises:
        ValueError: a line that is no word with numbers, vectors wider than D, or none for any token; names file and
            line.
    """
    tokens_of: dict[str, list[int]] = {}
    for token in range(tokenizer.vocab_size):
        if token not in tokenizer.special:
            text = tokenizer.inner.decode([token])
            if text.strip() and (text[0] == " " or not text[0].isalnum()):  # the others are ends of words
                tokens_of.setdefault(text.strip().lower(), []).append(token)
    count = 0
    with torch.no_grad():
        for word, vector in _vectors(path, set(tokens_of)):
            if len(vector) > embedding.shape[1]:
                raise ValueError(
                    f"vectors {path}: {len(vector)} numbers a word, more than the {embedding.shape[1]} of embeddings"
                )
            for token in tokens_of.pop(word, ()):
                embedding[token, : len(vector)] = torch.from_numpy(vector)
                count += 1
    if not count:
        raise ValueError(f"vectors {path}: not one of its words is a token of the vocabulary")
    return count


def _vectors(path: Path, words: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The vectors of these words, which all have as many numbers."""
    width = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            word, *numbers = line.rstrip().split(" ")
            width = width or len(numbers)
            if len(numbers) != width or not width:
                raise ValueError(
                    f"vectors {path}, line {number}: expected a word and {width or 'its'} numbers, got {len(numbers)}"
                )
            if word in words:
                try:
                    yield word, np.array(numbers, np.float32)
                except ValueError as error:
                    raise ValueError(f"vectors {path}, line {number}: {error}") from error
