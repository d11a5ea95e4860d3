"""Scores a model on the validation splits: loss and metrics of every task, and what it predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import Model
from trunkline.engine.network.generate import Search, prompts_at_once
from trunkline.engine.network.packing import batches_of, pack
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Encoded
from trunkline.training.scoring.metrics import first_score, metric_names, score, score_task


@dataclass(frozen=True)
class Scored:
    """One task's scores, and the predictions they come from."""

    metrics: dict[str, float]  # 'loss', the mean over labelled rows, and the task's metrics
    examples: list[int]  # of the validation split that were predicted
    predictions: list[Any]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of ROUGE: 95 %, over the documents
    counted: int = 0  # examples that the loss is of; the scores of texts may be of fewer
    logits: list[Tensor] = field(default_factory=list)  # (r, C) of the examples, where heads choose


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    validation: Sequence[Encoded],
    *,
    tokens: int,
    search: Search,
    examples: int = 0,
    texts: int | None = None,
) -> dict[str, Scored]:
    """Scores every task.

    Args:
        validation: the splits, in the order of the model's tasks.
        tokens: budget of a packed batch.
        examples: of each task, evenly spaced over the split; 0: all.
        texts: of those, how many texts are generated and scored; None: all. With 0, such a task has a loss only.
    """
    model.eval()
    with torch.inference_mode():
        return {
            split.task.name: _evaluate_task(model, tokenizer, split, task, tokens, search, examples, texts)
            for task, split in enumerate(validation)
        }


def mean_score(tasks: Sequence[Task], scored: Mapping[str, Scored]) -> float:
    """What checkpoints are compared by: the mean of the tasks' first metrics, or less the loss where there is none."""
    return fmean(first_score(task, scored[task.name].metrics) for task in tasks)


def _evaluate_task(
    model: Model,
    tokenizer: Tokenizer,
    split: Encoded,
    task: int,
    tokens: int,
    search: Search,
    examples: int,
    texts: int | None,
) -> Scored:
    chosen, head = spaced(len(split), examples), HEADS[split.task.head]
    loss, weight = 0.0, 0.0
    predicted: dict[int, Any] = {}
    logits_of: dict[int, Tensor] = {}
    for places in batches_of([split.lengths[i] for i in chosen], tokens):
        members = [chosen[place] for place in places]
        batch = pack([split.example(i, task) for i in members], len(model.tasks)).to(model.device)
        sums, logits = model.score(batch, task)  # (R, C)
        loss += float(sums.loss[task])
        weight += float(sums.weight[task])
        if head.group != "vocabulary":
            ordered = [members[place] for place in batch.order]
            rows = [len(split.example(i, task).rows) for i in ordered]
            for i, own in zip(ordered, logits.float().cpu().split(rows), strict=True):
                predicted[i] = head.answer(model.predict(own, task), split.piece(i), tokenizer)
                logits_of[i] = own
    mean, counted = loss / weight, len(chosen)
    if not head.labelled:
        return Scored({"loss": mean, **score(metric_names(split.task), [mean], [int(weight)])}, [], [], counted=counted)
    if head.writes:
        count = len(chosen) if texts is None else texts
        chosen = [chosen[place] for place in spaced(len(chosen), count)] if count else []
        predicted = _texts(model, tokenizer, split, task, chosen, tokens, search)
    predictions = [predicted[i] for i in chosen]
    if not chosen:
        return Scored({"loss": mean}, [], [], counted=counted)
    metrics, intervals = score_task(split.task, predictions, [split.reference(i) for i in chosen])
    of_chosen = [logits_of[i] for i in chosen if i in logits_of]
    return Scored({"loss": mean, **metrics}, chosen, predictions, intervals, counted, of_chosen)


def _texts(
    model: Model, tokenizer: Tokenizer, split: Encoded, task: int, chosen: Sequence[int], tokens: int, search: Search
) -> dict[int, str]:
    """Texts generated for the prompts of these examples."""
    texts: dict[int, str] = {}
    for places in prompts_at_once([len(split.prompt_of(i)) for i in chosen], search, tokens):
        members = [chosen[place] for place in places]
        made = model.generate([split.prompt_of(i) for i in members], task, tokenizer.ends, search)
        texts.update(zip(members, map(tokenizer.decode, made), strict=True))
    return texts


def spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices, evenly spaced; all if `wanted` is 0 or there are no more."""
    if wanted == 0 or wanted >= count:
        return list(range(count))
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()
