"""From rows to encoded examples: every label checked, every text laid out as a sequence of tokens.

n examples, L tokens of an example
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from trunkline.engine.heads.head import Piece, Row
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.tokenizer import Tokenizer, UntokenizedError
from trunkline.training.data.encoded import Counts, Encoded
from trunkline.training.data.sources import Rows

ENCODED_AT_ONCE = 4_000_000  # characters that are encoded together: a token in the tokenizer's hands takes 150 bytes


def encode(task: Task, rows: Rows, tokenizer: Tokenizer, max_length: int, causal: bool, typed: bool = False) -> Encoded:
    """Encodes all rows of a split and checks every label on the way.

    Args:
        max_length: longest example, in tokens.
        causal: the kind of trunk it is for, which decides where the END token stands.
        typed: whether the trunk has token types.

    Raises:
        ValueError: a row's text or label cannot be used; names task, file, row and value.
    """
    head, layout = HEADS[task.head], Layout(tokenizer, max_length, causal)
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
                column = (task.label_columns if problem == "unlabelled" else task.text)[0]
                raise ValueError(
                    f"{problem} row: '{column}' is {rows.columns[column][row]!r}; policy is 'error', and "
                    f"`{problem}: drop` on the task leaves such rows out"
                )
            else:
                counts[problem] += 1
        for chunk in _chunks(task, rows, usable):
            columns = [[text_of(rows.columns[column][row]) for row in chunk] for column in task.text]
            try:
                encoded = [tokenizer.encode(column, offsets=head.offsets) for column in columns]
            except UntokenizedError as error:
                row = chunk[error.place]
                raise
            pieces: list[Piece] = []
            for i, row in enumerate(chunk):
                texts, ids = [column[i] for column in columns], [column[i] for column in encoded]
                if not any(len(tokens) for tokens, _ in (ids[-1:] if head.reads_last else ids)):
                    if task.empty == "error":
                        raise ValueError(f"empty row: the tokenizer makes no token of {texts!r}; policy is 'error'")
                    counts["empty"] += 1
                    continue
                label = _label(task, rows, row)
                start = rows.columns[task.start][row] if task.start else None
                made, cut = head.encode(layout, task, Row(texts, ids, label, start))
                for piece in made:
                    if piece.types is not None and len(piece.types) != len(piece.tokens):
                        raise ValueError(
                            f"head '{task.head}' gives {len(piece.tokens)} tokens of a row and {len(piece.types)} "
                            "token types: it has to cut both alike"
                        )
                if cut and task.too_long == "error":
                    raise ValueError(
                        f"{sum(len(tokens) for tokens, _ in ids)} tokens of text: longer than {max_length} tokens, "
                        "and the task's policy for that is 'error'"
                    )
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
        types=np.concatenate([part.types for part in parts]) if typed else None,
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
    head = HEADS[task.head]
    return "unlabelled" if head.labelled and head.unlabelled(task, _label(task, rows, row)) else ""


def _label(task: Task, rows: Rows, row: int) -> Any:
    """The cell of the label column; of a task with a column for every class, all of their cells."""
    cells = [rows.columns[column][row] for column in task.label_columns]
    return cells[0] if task.label else cells or None


class _Flat(NamedTuple):
    """Many encoded examples in few arrays: one for each example takes several times the memory of what is in them."""

    tokens: np.ndarray  # all examples' tokens, int32
    lengths: np.ndarray  # (n,)
    labels: np.ndarray  # all examples' labels, float64
    label_lengths: np.ndarray  # (n,)
    references: list[str | list[str]]
    types: np.ndarray  # all examples' token types, uint8

    @classmethod
    def of(cls, pieces: list[Piece]) -> "_Flat":
        return cls(
            tokens=np.concatenate([piece.tokens for piece in pieces]).astype(np.int32),
            lengths=np.array([len(piece.tokens) for piece in pieces]),
            labels=np.concatenate([piece.label for piece in pieces]).astype(np.float64),
            label_lengths=np.array([len(piece.label) for piece in pieces]),
            references=[piece.reference for piece in pieces if piece.reference is not None],
            types=np.concatenate([np.zeros(len(p.tokens), np.uint8) if p.types is None else p.types for p in pieces]),
        )
