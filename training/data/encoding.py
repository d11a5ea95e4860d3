"""From rows to encoded examples: every label checked, every text laid out as a sequence of tokens.

n examples, L tokens of an example
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np

from trunkline.engine.tasks.task import SUMMARIES, Task
from trunkline.engine.text.layout import Layout, word_rows
from trunkline.engine.text.sentences import sentences_of
from trunkline.engine.text.tokenizer import Ids, Tokenizer
from trunkline.training.data.cells import class_of, number_of, references_of, text_of
from trunkline.training.data.encoded import Counts, Encoded
from trunkline.training.data.oracle import oracle
from trunkline.training.data.sources import Rows

ENCODED_AT_ONCE = 4_000_000  # characters that are encoded together: a token in the tokenizer's hands takes 150 bytes
MASKED = 0.15  # of a text's tokens: Devlin et al., BERT, arXiv:1810.04805, section 3.1, without its random replacements
UNLABELLED = ("-1", "-1.0", "-100")  # what data sets and loss functions write for "no class"


def encode(task: Task, rows: Rows, tokenizer: Tokenizer, max_length: int, causal: bool) -> Encoded:
    """Encodes all rows of a split and checks every label on the way.

    Args:
        max_length: longest example, in tokens.
        causal: the kind of trunk it is for, which decides where the END token stands.

    Raises:
        ValueError: a row's text or label cannot be used; names task, file, row and value.
    """
    layout = Layout(tokenizer, max_length, causal)
    counts = dict.fromkeys(("empty", "too_long", "unlabelled", "truncated"), 0)
    parts: list[_Flat] = []
    row = 0
    try:
        usable = []
        for row in range(len(rows)):
            problem = _problem(task, rows, row)
            if not problem:
                usable.append(row)
            elif getattr(task, problem) == "error":
                column = task.label if problem == "unlabelled" else task.text[0]
                raise ValueError(f"{problem} row: '{column}' is {rows.columns[column][row]!r}; policy is 'error'")
            else:
                counts[problem] += 1
        for chunk in _chunks(task, rows, usable):
            columns = [[text_of(rows.columns[column][row]) for row in chunk] for column in task.text]
            encoded = [tokenizer.encode(column, offsets=task.head != "language-model") for column in columns]
            pieces: list[_Piece] = []
            for i, row in enumerate(chunk):
                texts, ids = [column[i] for column in columns], [column[i] for column in encoded]
                label = rows.columns[task.label][row] if task.label else None
                start = rows.columns[task.start][row] if task.start else None
                made, cut = _ENCODERS[task.head](layout, task, texts, ids, label, start)
                if cut and task.too_long == "error":
                    raise ValueError(f"longer than {max_length} tokens, and the task's policy for that is 'error'")
                if not made or (cut and task.too_long == "drop"):
                    counts["too_long"] += 1
                else:
                    counts["truncated"] += cut
                    pieces += made
            parts += [_Flat.of(pieces)] if pieces else []
    except ValueError as error:
        raise ValueError(f"task '{task.name}': {error} ({rows.where(row)})") from error
    if not parts:
        raise ValueError(
            f"task '{task.name}': none of the {len(rows)} rows of {rows.origins[0][0]} can be used: {counts}"
        )
    return Encoded(
        task=task,
        causal=causal,
        tokens=np.concatenate([part.tokens for part in parts]),
        bounds=_bounds([part.lengths for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        label_bounds=_bounds([part.label_lengths for part in parts]),
        references=[reference for part in parts for reference in part.references],
        counts=Counts(**counts),
    )


def _bounds(lengths: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))])


def _chunks(task: Task, rows: Rows, usable: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about `ENCODED_AT_ONCE` characters at a time, be they many sentences or a few books."""
    chunk: list[int] = []
    characters = 0
    for row in usable:
        chunk.append(row)
        characters += sum(len(text_of(rows.columns[column][row])) for column in task.text)
        if characters >= ENCODED_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _problem(task: Task, rows: Rows, row: int) -> Literal["empty", "unlabelled", ""]:
    """Whether a row lacks its text or its label."""
    texts = [text_of(rows.columns[column][row]) for column in task.text]  # all of them: each has to be text
    if not any(text.strip() for text in texts):
        return "empty"
    label = rows.columns[task.label][row] if task.label else 0
    missing = label is None or label == [] or (isinstance(label, float) and math.isnan(label))
    if task.head in SUMMARIES and not missing:
        blank = not references_of(label)
    else:
        blank = isinstance(label, str) and not label.strip()
    no_class = task.head == "classify" and str(label) in UNLABELLED and label not in task.labels
    return "unlabelled" if missing or blank or no_class else ""


class _Piece(NamedTuple):
    """One encoded example."""

    tokens: np.ndarray
    label: Sequence[float] | np.ndarray
    reference: str | list[str] | None = None


class _Flat(NamedTuple):
    """Many encoded examples in few arrays: one for each example takes several times the memory of what is in them."""

    tokens: np.ndarray  # all examples' tokens, int32
    lengths: np.ndarray  # (n,)
    labels: np.ndarray  # all examples' labels, float64
    label_lengths: np.ndarray  # (n,)
    references: list[str | list[str]]

    @classmethod
    def of(cls, pieces: list[_Piece]) -> "_Flat":
        return cls(
            tokens=np.concatenate([piece.tokens for piece in pieces]).astype(np.int32),
            lengths=np.array([len(piece.tokens) for piece in pieces]),
            labels=np.concatenate([piece.label for piece in pieces]).astype(np.float64),
            label_lengths=np.array([len(piece.label) for piece in pieces]),
            references=[piece.reference for piece in pieces if piece.reference is not None],
        )


_Made = tuple[list[_Piece], bool]  # the examples of a row, none if it is too long to be used; whether text was cut


def _encode_class(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    laid = layout.lay(texts, ids)
    return [_Piece(laid.tokens, [class_of(task, label)])], laid.cut


def _encode_number(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    laid = layout.lay(texts, ids)
    return [_Piece(laid.tokens, [number_of(label, "label")])], laid.cut


def _encode_tags(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    """`label` is one tag for each word of the last text column: a list, or separated by white space."""
    tags = label.split() if isinstance(label, str) else label if isinstance(label, list) else [label]
    words = texts[-1].split()
    if len(tags) != len(words):
        raise ValueError(f"label must have one tag for each of the {len(words)} words, got {len(tags)}: {label!r}")
    classes = np.array([class_of(task, tag) for tag in tags])
    laid = layout.lay(texts, ids)
    rows = word_rows(laid)
    of_token = np.full(len(laid.tokens), -1.0)
    of_token[rows[rows >= 0]] = classes[rows >= 0]
    return [_Piece(laid.tokens, of_token)] if (rows >= 0).any() else [], laid.cut


def _encode_span(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    """`label` is the answer's text, inside the last text column."""
    answer = text_of(label)
    begin = texts[-1].find(answer) if start is None else int(number_of(start, "start"))
    end = begin + len(answer)
    if begin < 0 or texts[-1][begin:end] != answer:
        place = "" if start is None else f" at character {start}"
        raise ValueError(f"label {answer!r} does not stand{place} in column '{task.text[-1]}'")
    laid = layout.lay(texts, ids)
    inside = [i for i, (first, last) in enumerate(laid.offsets) if first < end and last > begin]
    if not inside or laid.offsets[inside[-1]][1] < end:  # the answer was cut off
        return [], laid.cut
    return [_Piece(laid.tokens, [laid.first, laid.end, laid.first + inside[0], laid.first + inside[-1]])], laid.cut


def _encode_target(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    """`label` is the text to be generated; of several references the first is learnt."""
    references = references_of(label)
    ((target, _),) = layout.tokenizer.encode([" " + references[0].strip()])
    kept = target[: task.max_target_tokens]
    prompt = layout.prompt(texts[0], task.max_target_tokens, ids[0])
    tokens = np.concatenate([prompt.tokens, kept, [layout.tokenizer.end]])
    return [_Piece(tokens, [len(prompt.tokens)], _one_or_several(references))], prompt.cut or len(kept) < len(target)


def _one_or_several(references: list[str]) -> str | list[str]:
    return references[0] if len(references) == 1 else references


def _encode_sentences(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    """`label` is a summary; what is learnt is which sentences come nearest to it."""
    references = references_of(label)
    laid = layout.lay(texts, ids)
    sentences = sentences_of(laid.text, laid.offsets)
    of_token = np.full(len(laid.tokens), -1.0)
    of_token[[laid.first + token for _, token in sentences]] = 0
    for place in oracle([sentence for sentence, _ in sentences], references[0]):
        of_token[laid.first + sentences[place][1]] = 1
    return [_Piece(laid.tokens, of_token, _one_or_several(references))], laid.cut


def _encode_masked(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    """A part of the tokens is hidden, the same ones whenever the text is met."""
    laid = layout.lay(texts, ids)
    tokens, random = laid.tokens.copy(), np.random.default_rng(crc32(laid.tokens.tobytes()))
    text = np.isin(tokens, (layout.tokenizer.end, layout.tokenizer.separator), invert=True).nonzero()[0]
    hidden = random.choice(text, max(1, round(MASKED * len(text))), replace=False)
    of_token = np.full(len(tokens), -1.0)
    of_token[hidden] = tokens[hidden]
    tokens[hidden] = layout.tokenizer.mask()
    return [_Piece(tokens, of_token)], laid.cut


def _encode_text(layout: Layout, task: Task, texts: list[str], ids: list[Ids], label: Any, start: Any) -> _Made:
    """A text of any length, in as many pieces as it takes; nothing is cut off, and no piece has two texts."""
    whole = np.concatenate([[layout.tokenizer.end], ids[0][0], [layout.tokenizer.end]]).astype(np.int32)
    step = layout.max_length - 1  # the last token of a piece is the first of the next, so that each is predicted once
    return [_Piece(whole[i : i + step + 1], []) for i in range(0, len(whole) - 1, step)], False


_ENCODERS: dict[str, Callable[[Layout, Task, list[str], list[Ids], Any, Any], _Made]] = {
    "classify": _encode_class,
    "regress": _encode_number,
    "tag": _encode_tags,
    "span": _encode_span,
    "generate": _encode_target,
    "extract": _encode_sentences,
    "language-model": _encode_text,
    "masked-language-model": _encode_masked,
}
