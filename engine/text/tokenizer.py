"""Text to token ids and back: a tokenizer of the user's, or one trained on the run's own text.

The file names are those of Hugging Face: a folder with a tokenizer.json serves here, and one of ours serves there.
"""

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from trunkline.engine.text.template import Frame, Marks, Template

Version = Literal[1, 2]  # of the layout: the same for every tokenizer, or as the tokenizer's own template says
Ids = tuple[np.ndarray, list[tuple[int, int]]]  # token ids of a text, (l,) int32, and the characters each covers
FILE, SETTINGS = "tokenizer.json", "generation_config.json"
BESIDE = (SETTINGS, "config.json", "tokenizer_config.json")  # files that may say what ends a text
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
    """A `tokenizers.Tokenizer`, and the tokens that tasks are put together with.

    Args:
        inner: the tokenizer.
        layout: 2: what stands around texts is asked from the tokenizer, and what ends one is `ends`; 1: neither is.
        grows: tokens that the vocabulary lacks for a purpose are added; otherwise text stands in their place, which
            is what a model has learnt that never saw such a token.
        ends: tokens any of which ends a text, the one to be learnt first; none: the first of END that there is.

    Raises:
        ValueError: two tokens with one id, or a vocabulary without an end, which may not grow.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, *, layout: Version = 2, grows: bool = True, ends: Sequence[int] = ()
    ):
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # a text that spells '<|end|>' out has no END token
        _check_ids(inner)
        self.inner, self.added = (_numbered(inner) if _would_change(inner) else inner), 0
        grows = grows or layout == 1
        if not (layout == 2 and ends):
            ends = [token for token in [self._special(END, grows)] if token is not None]
        if not ends:
            raise ValueError(
                f"tokenizer: its vocabulary has no token that ends a text, none of {', '.join(END)}, and no {SETTINGS} "
                "beside it names an eos_token_id"
            )
        self.end, self.ends = ends[0], tuple(ends)
        self.separator, self.summary = self._special(SEPARATOR, grows), self._special(SUMMARY, grows)
        self.template = Template.of(self.inner) if layout == 2 else None

    def _special(self, names: tuple[str, ...], grows: bool) -> int | None:
        """The first of these tokens that there is; the first of all, added, where there is none and it may grow."""
        for name in names:
            if (token := self.inner.token_to_id(name)) is not None:
                return token
        if not grows:
            return None
        self.inner = _with_special(self.inner, names[0])
        self.added += 1
        return self.inner.token_to_id(names[0])

    def mask(self) -> int:
        """The token that hides others; added to a vocabulary that has none."""
        token = self._special(MASK, grows=True)
        assert token is not None
        return token

    def frame(self, texts: int, causal: bool) -> Frame:
        """What stands around so many texts of an example."""
        if self.template is not None:
            return self.template.frame(texts)
        end, none = Marks.of(self.end), Marks()
        between = [self._marks(self.separator, "\n")] * (texts - 1)
        return Frame((none if causal else end, *between, end if causal else none), (0,) * texts)

    def prompt_frame(self) -> Frame:
        """What stands around a document that a summary is to follow."""
        return Frame((self.prefix, self._marks(self.summary, "\nSummary:")), (0,))

    @property
    def prefix(self) -> Marks:
        """What a text begins with that goes on to be written."""
        return Marks() if self.template is None else self.template.prefix

    def _marks(self, token: int | None, text: str) -> Marks:
        return Marks.of(*(self.inner.encode(text, add_special_tokens=False).ids if token is None else [token]))

    @property
    def special(self) -> set[int]:
        """All tokens that are structure, and no text."""
        present = {token for token in (*self.ends, self.separator, self.summary) if token is not None}
        return present if self.template is None else present | self.template.ids

    @classmethod
    def load(cls, source: str, *, layout: Version = 2, grows: bool = True) -> "Tokenizer":
        """From a tokenizer.json, a folder that has one, or the Hugging Face hub.

        What ends a text is what generation_config.json, config.json or tokenizer_config.json beside it say.

        Raises:
            ValueError: it is neither, or one that `Tokenizer` refuses; names the file.
        """
        path = Path(source)
        path = path / FILE if path.is_dir() else path
        if path.is_file():
            try:
                inner = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:
                raise ValueError(f"{path} is not a tokenizer: {error}") from error
            ends = _ends_beside(path, inner)
            try:
                return cls(inner, layout=layout, grows=grows, ends=ends)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        try:
            from huggingface_hub import snapshot_download

            return cls.load(snapshot_download(source, allow_patterns=[FILE, *BESIDE]), layout=layout, grows=grows)
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
        """SHA-256 of the whole tokenizer and of how it frames texts; keys what is encoded with it."""
        state = sha256(self.inner.to_str().encode())
        if not self.is_plain:
            state.update(repr((self.ends, self.frame(2, causal=True), self.prompt_frame())).encode())
        return state.hexdigest()

    @property
    def is_plain(self) -> bool:
        """Whether both versions of the layout are the same to it."""
        own = self.separator is not None and self.summary is not None
        return own and self.template is None and self.ends == (self._special(END, grows=False),)

    def save(self, folder: Path) -> None:
        self.inner.save(str(folder / FILE))
        if not self.is_plain:
            (folder / SETTINGS).write_text(json.dumps({"eos_token_id": list(self.ends)}) + "\n", encoding="utf-8")

    def encode(self, texts: Sequence[str], offsets: bool = True) -> list[Ids]:
        """Every text without special tokens.

        Args:
            offsets: whether the characters of the tokens are wanted, which take ten times the memory of the ids.
        """
        try:
            encode = self.inner.encode_batch if offsets else self.inner.encode_batch_fast
            encodings = encode(list(texts), add_special_tokens=False)
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
        special = self.special
        for token in tokens:
            if token in special:
                parts.append([])
            else:
                parts[-1].append(int(token))
        return " | ".join(text for part in parts if (text := self.inner.decode(part).strip()))


def _check_ids(inner: tokenizers.Tokenizer) -> None:
    """
    Raises:
        ValueError: two tokens have one id. A file keeps but one of them, which one is chance, so a text would have
            other tokens once the tokenizer is read again.
    """
    names: dict[int, str] = {}
    for name, token in inner.get_vocab().items():
        if (other := names.setdefault(token, name)) != name:
            first, second = sorted((name, other))
            raise ValueError(
                f"tokenizer: {first!r} and {second!r} are both number {token} of its vocabulary: give one of them a "
                "number that is nobody's (tokens added to a vocabulary with gaps may get a word's)"
            )


def _would_change(inner: tokenizers.Tokenizer) -> bool:
    """Whether tokens that somebody added get other ids once the tokenizer is written and read, as they may where the
    vocabulary has gaps: the package numbers them anew, from the number of entries on."""
    entries = inner.get_vocab(with_added_tokens=False)
    added = sorted(id for id, token in inner.get_added_tokens_decoder().items() if token.content not in entries)
    return added != [*range(len(entries), len(entries) + len(added))]


def _numbered(inner: tokenizers.Tokenizer, **more: int) -> tokenizers.Tokenizer:
    """With the ids of all added tokens, and of more words, in the model's vocabulary, which a file keeps as it is."""
    settings = json.loads(inner.to_str())
    if isinstance(settings["model"]["vocab"], dict):  # else a list, without gaps
        settings["model"]["vocab"] |= {token["content"]: token["id"] for token in settings["added_tokens"]} | more
        inner = tokenizers.Tokenizer.from_str(json.dumps(settings))
        inner.encode_special_tokens = True
    return inner


def _with_special(inner: tokenizers.Tokenizer, name: str) -> tokenizers.Tokenizer:
    """With a special token more.

    The package gives it the number of entries as its id, which in a vocabulary with gaps may be that of a word. There
    it gets the lowest id that is nobody's.
    """
    taken = set(inner.get_vocab().values())
    free = next(id for id in range(len(taken) + 1) if id not in taken)
    if free < max(taken, default=-1):
        inner = _numbered(inner, **{name: free})
    inner.add_special_tokens([name])
    return inner


def _ends_beside(path: Path, inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text as the files beside a tokenizer.json say; none where they say nothing.

    Raises:
        ValueError: a file is damaged, or speaks of a token that the tokenizer lacks.
    """
    ends: list[int] = []
    for name in BESIDE:
        file = path.with_name(name)
        settings = _json(file)
        said = settings.get("eos_token_id", settings.get("eos_token"))
        for token in said if isinstance(said, list) else [] if said is None else [said]:
            token = token["content"] if isinstance(token, dict) else token
            known = inner.token_to_id(token) if isinstance(token, str) else token
            if known is None or inner.id_to_token(known) is None:
                raise ValueError(f"tokenizer: {file} says that {token!r} ends a text, which {path} does not have")
            ends.append(known)
    return tuple(dict.fromkeys(ends))


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where there is none."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is not JSON: {error}") from error
