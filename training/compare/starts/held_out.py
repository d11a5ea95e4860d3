"""What a finished part is asked besides its own validation: the test split, and what it still knows of a language."""

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from trunkline.engine.config import Config
from trunkline.engine.console import tell
from trunkline.engine.engine import Engine
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.tasks.task import Task
from trunkline.training.compare.record import WARM_UP, Record, record_of, with_values, write_json
from trunkline.training.compare.starts.language import log_probabilities
from trunkline.training.compare.systems import Basis, Part
from trunkline.training.data.corpus import load_corpus
from trunkline.training.data.sources import read_rows
from trunkline.training.pages.summary import baseline_scores, predictions_of
from trunkline.training.scoring.evaluation import score_engine

BOOKS = Task("books", "language-model", ("text",), hub="books")
PIECES, LENGTH, CHARACTERS = 24, 256, 4_000  # of book text: how many, of so many tokens, of as many characters each


def completed(part: Part, settings: Mapping[str, Any], split: str, books: list[str]) -> Record:
    """The record of a finished run, with what it is asked besides.

    Args:
        split: that is scored: validation, which the run has done itself, or test.
        books: pieces of held-out text; none: what is forgotten is not asked.
    """
    record = record_of(part, settings)
    if part.name == WARM_UP:
        return record
    forgets = bool(books) and part.config.trunk.causal and part.config.architecture == "trunk"
    if split != "test" and not forgets:
        return record
    engine = Engine.load(part.config.run, device=part.config.device)
    if split == "test":
        tell(f"scoring {part.config.run} on the test splits")
        _put_test(record, engine, part.config)
    if forgets:
        places = range(len(engine.tasks)) if _of_tasks(part.config) else [0]
        record["language_loss"] = fmean(language_loss(engine, place, books) for place in places)
    return record


def _of_tasks(config: Config) -> bool:
    """Whether what is added to the trunk differs from task to task."""
    return config.adapters is not None and config.adapters.of != "shared"


def on_test(config: Config) -> Config:
    """The config with the test splits in place of the validation splits.

    Raises:
        ValueError: a task's validation split has a name that does not say how that of its test split is.
    """
    tasks = []
    for task in config.all_tasks:
        if not isinstance(task.validation, str) or "validation" not in task.validation:
            raise ValueError(
                f"compare: split test takes 'test' for 'validation' in the name of a split or file; that of task "
                f"'{task.name}' is {task.validation!r}"
            )
        tasks.append(replace(task, validation=task.validation.replace("validation", "test")))
    return replace(config, tasks=tuple(tasks))


def _put_test(record: Record, engine: Engine, config: Config) -> None:
    """Replaces predictions and scores by those of the test splits; the others stay as 'validation'."""
    corpus = load_corpus(on_test(config), engine.known_tokenizer)
    scored = score_engine(engine, corpus, config.evaluation.last_examples)
    predictions, tasks = predictions_of(corpus, corpus.validation, scored), {task.name: task for task in corpus.tasks}
    for name, about in record["summary"]["tasks"].items():
        made, of_task = predictions[name], scored[name]
        about["validation_metrics"] = about["metrics"]
        about |= {"metrics": of_task.metrics, "intervals": of_task.intervals}
        about["baselines"] = baseline_scores(tasks[name], made)
        record["predictions"][name] = with_values(tasks[name], made)


def book_pieces(config: Config) -> list[str]:
    """Pieces of the held-out books of the data folder, from their middles; none where it has no books."""
    data = Path(config.data) if config.data else None
    if data is None or not (data / "books").is_dir():
        return []
    texts = read_rows(BOOKS, "validation", data).columns["text"]
    each = -(-PIECES // len(texts))
    return [
        text[start : start + CHARACTERS]
        for text in texts
        for start in np.linspace(len(text) / 3, 2 * len(text) / 3, each).astype(int).tolist()
    ][:PIECES]


def loss_before(basis: Basis, books: list[str], identity: str, file: Path) -> float:
    """Mean loss of the next token of book text of a system's start, before it learns; `file` keeps it."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = f"{identity}, books {sha256(' '.join(books).encode()).hexdigest()}"
    if key not in known:
        engine = Engine.from_config(basis.config)
        engine.build(basis.corpus.tokenizer)  # adapters that have learnt nothing add nothing
        known[key] = language_loss(engine, 0, books)
        write_json(file, known)
    return known[key]


def language_loss(engine: Engine, task: int, books: list[str]) -> float:
    """Mean loss of the next token of book text, in nats, with the adapter of a task where there are any."""
    model, tokenizer, tokens = engine.model, engine.known_tokenizer, engine.config.batch.tokens
    assert isinstance(model, MultiTaskModel)
    begin = np.array(tokenizer.prefix.ids or [tokenizer.end], np.int64)
    length = min(LENGTH, tokens, model.trunk.config.max_positions)
    pieces = [np.concatenate([begin, ids])[:length] for ids, _ in tokenizer.encode(books, offsets=False)]
    found = log_probabilities(model, task, pieces, [len(begin)] * len(pieces), tokens)
    return -float(torch.cat(found).mean())
