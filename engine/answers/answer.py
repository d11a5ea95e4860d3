"""What tasks say of texts: one pass of the trunk for a batch of them, whatever is asked of each.

R rows, D width, C columns of a task, r rows that a task looks at in a text
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import BiLSTM, Model
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.text.layout import Laid

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


class Answer(TypedDict, total=False):
    """What a task says of a text, and how sure it is."""

    label: Any
    """A class name, a list of them, a number, a tag for each word, or a text; always there."""
    score: float | list[float | None]
    """The probability of the class or the span; of tags one for each word, of sentences one for each chosen one."""
    scores: dict[str, float]
    """The probability of every class."""


class Question(NamedTuple):
    """A text, and the tasks that are to say something of it."""

    laid: Laid
    tasks: tuple[int, ...]  # places in the model, at least one
    rows: Sequence[Sequence[int]]  # of each task, the tokens that it looks at
    readers: tuple[int, ...]  # of each task, see `reader_of`

    @property
    def size(self) -> int:
        """Tokens or rows, whichever are more: what it takes of a batch's budget."""
        return max(len(self.laid.tokens) * len(set(self.readers)), sum(map(len, self.rows)))


def reader_of(model: Model, task: int) -> int:
    """Tasks of the same reader share what the model makes of a text: all, but for adapters, and for a Bi-LSTM, whose
    attention is each task's own."""
    if isinstance(model, BiLSTM):
        return task
    return 0 if model.adapters is None else model.adapters.places[task]


def in_batches(questions: Iterable[Question], tokens: int) -> Iterator[list[Question]]:
    """Questions in their order, as many at a time as the budget holds; a larger one is alone."""
    batch: list[Question] = []
    room = tokens
    for question in questions:
        if batch and question.size > room:
            yield batch
            batch, room = [], tokens
        batch.append(question)
        room -= question.size
    if batch:
        yield batch


def answer(engine: "Engine", questions: Sequence[Question]) -> list[dict[str, Answer]]:
    """What its tasks say of each text, by name, from one pass through the trunk; equal sequences are read once."""
    model, tasks = engine.model, engine.tasks
    if model.training:  # to say so again takes as long as a block
        model.eval()
    typed = engine.config.trunk.token_types > 1
    # who reads which sequence, and for whom: the question's place, and that of the task in it
    readings: dict[tuple[int, bytes, bytes], list[tuple[int, int]]] = defaultdict(list)
    for place, question in enumerate(questions):
        sequence = question.laid.tokens.tobytes(), question.laid.types.tobytes()
        for n, reader in enumerate(question.readers):
            readings[reader, *sequence].append((place, n))
    askers, examples = list(readings.values()), []
    for own in askers:
        place, n = own[0]
        rows = [*chain.from_iterable(questions[place].rows[n] for place, n in own)]
        laid, types = questions[place].laid, questions[place].laid.types if typed else None
        examples.append(Example(questions[place].tasks[n], laid.tokens, np.array(rows, np.int64), types=types))
    said: list[dict[int, Answer]] = [{} for _ in questions]  # by task
    with torch.inference_mode(), engine.autocast():
        batch = pack(examples, len(tasks)).to(engine.device)
        x = model.hidden(batch)  # (R, D)
        asked = [asker for example in batch.order for asker in askers[example]]
        sizes = [len(questions[place].rows[n]) for place, n in asked]
        of_task: dict[int, list[tuple[int, range]]] = defaultdict(list)  # the rows of x for each text
        for (place, n), size, end in zip(asked, sizes, accumulate(sizes), strict=True):
            of_task[questions[place].tasks[n]].append((place, range(end - size, end)))
        counts = {t: [len(places) for _, places in of_task[t]] for t in sorted(of_task)}
        rows = [row for t in counts for _, places in of_task[t] for row in places]
        chosen = torch.tensor(rows, dtype=torch.int64).to(x.device)  # none where no word is read
        logits = model.logits_by_task(x[chosen], {t: sum(of_texts) for t, of_texts in counts.items()})
        for t, of_texts in counts.items():
            parts = logits[t].float().cpu().split(of_texts)  # (r, C) of every text
            for (place, _), part in zip(of_task[t], parts, strict=True):
                said[place][t] = _said(engine, t, part, questions[place].laid)
    return [{tasks[t].name: said[place][t] for t in question.tasks} for place, question in enumerate(questions)]


def _said(engine: "Engine", t: int, logits: torch.Tensor, laid: Laid) -> Answer:
    """What one task says of a text, from the logits (r, C) of its rows."""
    task, head = engine.tasks[t], HEADS[engine.tasks[t].head]
    value = engine.model.predict(logits, t)
    scores = head.scores(task, value, logits / engine.temperature(t), laid)
    return {"label": head.describe(task, value, laid), **scores}  # type: ignore[typeddict-item]
