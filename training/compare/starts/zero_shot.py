"""What a causal checkpoint says of the tasks without training: class names scored as continuations, texts written.

Source: Brown et al., Language Models are Few-Shot Learners, arXiv:2005.14165, section 2.4: of class names the one with
the highest mean log-probability of its tokens. A task of numbers has no names, and is left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trunkline.engine.config import Config
from trunkline.engine.console import tell
from trunkline.engine.engine import Engine
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.generate import prompts_at_once
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.compare.record import Record, with_values, write_json
from trunkline.training.compare.starts.language import log_probabilities
from trunkline.training.compare.systems import Basis
from trunkline.training.data.sources import read_rows
from trunkline.training.run.folder import digest_of
from trunkline.training.scoring.evaluation import spaced
from trunkline.training.scoring.metrics import score_task

HOLE = re.compile(r"\{([^{}]*)\}")


def names_of(task: Task) -> list[str]:
    """The columns that a prompt can have: as the task names them, of several for one the first."""
    return [column.partition("|")[0] for column in task.text]


def asks(prompt: str, columns: list[str]) -> bool:
    """Whether a prompt has columns in braces, and no other ones."""
    holes = HOLE.findall(prompt)
    return bool(holes) and set(holes) <= set(columns)


def ask_untrained(
    basis: Basis, prompts: Mapping[str, str], identity: str, split_name: str, kept: Path
) -> dict[str, Record]:
    """By task, predictions and scores of the checkpoint on the examples that the systems are scored on.

    Each is kept in a file of `kept`, which counts as long as all that it depends on is the same. One that fails has
    'error' instead.
    """
    engine: Engine | None = None
    entries: dict[str, Record] = {}
    for place, split in enumerate(basis.corpus.validation):
        task = split.task
        if task.name not in prompts or not (task.labels or HEADS[task.head].writes):
            continue
        examples = spaced(len(split), basis.config.evaluation.last_examples)
        settings = {
            "prompt": prompts[task.name],
            "init": identity,
            "validation": digest_of(split),
            "examples": len(examples),
            "search": asdict(basis.config.search),
        }
        file = kept / f"zero-shot-{task.name}-{split_name}.json"
        if file.is_file() and (entry := json.loads(file.read_text(encoding="utf-8")))["settings"] == settings:
            entries[task.name] = entry
            continue
        tell(f"zero-shot: {task.name}, {len(examples)} examples")
        try:
            engine = engine or _engine(basis)
            predictions = _answers(engine, basis, place, examples, prompts[task.name])
        except (ValueError, RuntimeError) as error:
            tell(f"zero-shot: {task.name} failed: {error}")
            entries[task.name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        references = [split.reference(i) for i in examples]
        entry = {"examples": examples, "predictions": predictions, "references": references, "baselines": {}}
        metrics = score_task(task, predictions, references).metrics
        entries[task.name] = with_values(task, entry) | {"metrics": metrics, "settings": settings}
        write_json(file, entries[task.name])
    return entries


def _engine(basis: Basis) -> Engine:
    """The checkpoint as it is: adapters that have learnt nothing add nothing."""
    engine = Engine.from_config(replace(basis.config, seed=0))
    engine.build(basis.corpus.tokenizer)
    return engine


def _answers(engine: Engine, basis: Basis, place: int, examples: Sequence[int], prompt: str) -> list[Any]:
    """What the checkpoint says of examples of one task: places of classes, or texts."""
    config, tokenizer, task = basis.config, basis.corpus.tokenizer, basis.corpus.tasks[place]
    data = Path(config.data) if config.data else None
    rows = read_rows(task, "validation", data, Path(config.base), config.seed)
    if len(rows) != len(basis.corpus.validation[place]):
        raise ValueError(f"{len(rows)} rows, of which {len(basis.corpus.validation[place])} are examples")
    columns = dict(zip(names_of(task), task.text, strict=True))

    def filled(row: int) -> str:
        return HOLE.sub(lambda hole: text_of(rows.columns[columns[hole[1]]][row]).strip(), prompt)

    prefix = np.array(tokenizer.prefix.ids, np.int64)
    asked = [np.concatenate([prefix, ids]) for ids, _ in tokenizer.encode([filled(i) for i in examples], offsets=False)]
    model = engine.model
    assert isinstance(model, MultiTaskModel)
    if not task.labels:
        return _texts(model, tokenizer, place, asked, config)
    names = [name.replace("_", " ") for name in task.labels]
    endings = [ids for ids, _ in tokenizer.encode([f" {name}" for name in names], offsets=False)]
    texts = [np.concatenate([start, end]) for start in asked for end in endings]
    firsts = [len(start) for start in asked for _ in endings]
    scores = [float(of.mean()) for of in log_probabilities(model, place, texts, firsts, config.batch.tokens)]
    return [int(np.argmax(scores[i : i + len(names)])) for i in range(0, len(scores), len(names))]


def _texts(
    model: MultiTaskModel, tokenizer: Tokenizer, place: int, asked: Sequence[np.ndarray], config: Config
) -> list[str]:
    """Up to the first line break: what follows a summary is the next text that the checkpoint has thought of."""
    written: dict[int, str] = {}
    model.eval()
    with torch.inference_mode():
        for places in prompts_at_once([len(start) for start in asked], config.search, config.batch.tokens):
            made = model.generate([asked[i] for i in places], place, tokenizer.ends, config.search)
            written |= {i: tokenizer.decode(ids).strip() for i, ids in zip(places, made, strict=True)}
    return [written[i].partition("\n")[0] for i in range(len(asked))]
