"""Text to token ids and back: a tokenizer of the user's, or one trained on the run's own text.

The file name is that of Hugging Face: a folder with a tokenizer.json serves here, and one of ours serves there.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import tokenizers

Ids = tuple[np.ndarray, list[tuple[int, int]]]  # token ids of a text, (l,) int32, and the characters each covers
FILE = "tokenizer.json"
# What marks the end of a text, what stands between two texts, and where a summary begins. A tokenizer that comes with
# a token for the purpose keeps it; otherwise the first name is added to its vocabulary.
END = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "[CLS]")
SEPARATOR = ("<|separator|>", "[SEP]")
SUMMARY = ("<|summary|>",)
MASK = (
    "<|mask|>",
    "[MASK]",
    "<mask>",
)  # in place of a token that is to be guessed; for masked language models


class UntokenizedError(ValueError):
    """A text that a tokenizer has no tokens for, such as one with an unknown word where it has no token for these."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place  # of the text among those that were given


class Tokenizer:
    """A `tokenizers.Tokenizer` with the three special tokens that tasks are put together with."""

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # a text that spells '<|end|>' out has no END token
        self.inner = inner
        self.end, self.separator, self.summary = (self._special(names) for names in (END, SEPARATOR, SUMMARY))

    def _special(self, names: tuple[str, ...]) -> int:
        ids = self.inner.get_vocab()
        users = Counter(ids.values())  # where somebody added a token to a vocabulary with gaps, an id may have two
        present = [name for name in names if name in ids and (name == names[0] or users[ids[name]] == 1)]
        if not present:
            self.inner = _with_special(self.inner, names[0])
        token = self.inner.token_to_id((present or names)[0])
        assert token is not None
        return token

    def mask(self) -> int:
        """The token that hides others; added to a vocabulary that has none."""
        return self._special(MASK)

    @classmethod
    def load(cls, source: str) -> "Tokenizer":
        """From a tokenizer.json, a folder that has one, or the Hugging Face hub.

        Raises:
            ValueError: it is neither.
        """
        path = Path(source)
        path = path / FILE if path.is_dir() else path
        if path.is_file():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(path)))
            except Exception as error:
                raise ValueError(f"{path} is not a tokenizer: {error}") from error
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(source))
        except Exception as error:
            raise ValueError(
                f"tokenizer '{source}' is no file, no folder with a {FILE}, and not to be had from the hub: {error}"
            ) from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> "Tokenizer":
        """A byte-level BPE made for these texts; the same texts give the same tokenizer.

        With `lowercase` a word is the same tokens wherever it stands: capitals become small letters, and the first
        word of a text has a space before it like any other.
        """
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        if lowercase:
            inner.normalizer = tokenizers.normalizers.Lowercase()
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=lowercase)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END[0], SEPARATOR[0], SUMMARY[0]],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a vocabulary may have gaps."""
        return max(self.inner.get_vocab().values()) + 1

    @property
    def digest(self) -> str:
        """SHA-256 of the whole tokenizer; keys what is encoded with it."""
        return sha256(self.inner.to_str().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        self.inner.save(str(folder / FILE))

    def encode(self, texts: Sequence[str], offsets: bool = True) -> list[Ids]:
        """Every text without special tokens.

        Args:
            offsets: whether the characters of the tokens are wanted, which take ten times the memory of the ids.
        """
        try:
            encodings = self.inner.encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # of the package's own, without a class and without the place
            raise self._untokenized(texts) from error
        return [(np.array(e.ids, np.int32), e.offsets if offsets else []) for e in encodings]

    def _untokenized(self, texts: Sequence[str]) -> "UntokenizedError":
        """The error about the first text that cannot be encoded."""
        for place, text in enumerate(texts):
            try:
                self.inner.encode(text, add_special_tokens=False)
            except Exception as error:
                cause = " ".join(str(error).split())
                return UntokenizedError(f"the tokenizer cannot encode {text[:60]!r}: {cause}", place)
        raise AssertionError("each text can be encoded, and all of them cannot")

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens; special ones are left out, and what they separate is joined by ' | '."""
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token in (self.end, self.separator, self.summary):
                parts.append([])
            else:
                parts[-1].append(int(token))
        return " | ".join(text for part in parts if (text := self.inner.decode(part).strip()))


def _with_special(inner: tokenizers.Tokenizer, name: str) -> tokenizers.Tokenizer:
    """With a special token more.

    The package gives it the number of entries as its id, which in a vocabulary with gaps may be that of a word. There
    it gets the lowest id that is nobody's.
    """
    taken = set(inner.get_vocab().values())
    free = next(id for id in range(len(taken) + 1) if id not in taken)
    if free < max(taken, default=-1):
        settings = json.loads(inner.to_str())
        own = {token["content"]: token["id"] for token in settings["added_tokens"]}  # which would be numbered anew
        settings["model"]["vocab"] |= {**own, name: free}
        inner = tokenizers.Tokenizer.from_str(json.dumps(settings))
        inner.encode_special_tokens = True
    inner.add_special_tokens([name])
    return inner
