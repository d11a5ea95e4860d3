"""Scores a model on the validation splits: loss and metrics of every task, and what it predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import Model
from trunkline.engine.network.generate import Search, prompts_at_once
from trunkline.engine.network.packing import batches_of, pack
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.corpus import Corpus, load_corpus
from trunkline.training.data.encoded import Encoded
from trunkline.training.distributed.ranks import ONE, Ranks
from trunkline.training.scoring.metrics import first_score, metric_names, score, score_task

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


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
    ranks: Ranks = ONE,
) -> dict[str, Scored]:
    """Scores every task.

    Several ranks take a batch each in turn. What they find is put together in the order of the batches, so that every
    rank has the same bits, and those of one rank.

    Args:
        validation: the splits, in the order of the model's tasks.
        tokens: budget of a packed batch.
        examples: of each task, evenly spaced over the split; 0: all.
        texts: of those, how many texts are generated and scored; None: all. With 0, such a task has a loss only.
        ranks: that share the work, and all call this.
    """
    model.eval()
    # FSDP2 keeps what it gathers first for the steps that follow, where a tensor of inference mode is of no use
    with torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode():
        return {
            split.task.name: _evaluate_task(model, tokenizer, split, task, tokens, search, examples, texts, ranks)
            for task, split in enumerate(validation)
        }


def evaluate_engine(engine: "Engine", examples: int = 0, ranks: Ranks = ONE) -> dict[str, dict[str, float]]:
    """See `Engine.evaluate`."""
    with ranks.first_of_host_goes_before():  # the others find the data in the cache
        corpus = load_corpus(engine.config, engine.known_tokenizer)
    return {name: task.metrics for name, task in score_engine(engine, corpus, examples, ranks).items()}


def score_engine(engine: "Engine", corpus: Corpus, examples: int, ranks: Ranks = ONE) -> dict[str, Scored]:
    """An engine on the validation splits of a corpus; see `evaluate`."""
    config = engine.config
    with engine.autocast():
        return evaluate(
            engine.model,
            corpus.tokenizer,
            corpus.validation,
            tokens=config.batch.tokens,
            search=config.search,
            examples=examples,
            ranks=ranks,
        )


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
    ranks: Ranks,
) -> Scored:
    chosen, head = spaced(len(split), examples), HEADS[split.task.head]

    def score_batch(places: Sequence[int]) -> tuple[float, float, list[tuple[int, Any, Tensor]]]:
        """Its loss and weight, and of every example what is predicted from which logits."""
        members = [chosen[place] for place in places]
        batch = pack([split.example(i, task) for i in members], len(model.tasks)).to(model.device)
        sums, logits = model.score(batch, task)  # (R, C)
        said = []
        if head.group != "vocabulary":
            ordered = [members[place] for place in batch.order]
            rows = [len(split.example(i, task).rows) for i in ordered]
            for i, own in zip(ordered, logits.float().cpu().split(rows), strict=True):
                said.append((i, head.answer(model.predict(own, task), split.piece(i), tokenizer), own))
        return float(sums.loss[task]), float(sums.weight[task]), said

    scored = ranks.spread(score_batch, batches_of([split.lengths[i] for i in chosen], tokens))
    loss, weight = sum(loss for loss, _, _ in scored), sum(weight for _, weight, _ in scored)
    predicted = {i: answer for *_, said in scored for i, answer, _ in said}
    logits_of = {i: logits for *_, said in scored for i, _, logits in said}
    mean, counted = loss / weight, len(chosen)
    if not head.labelled:
        return Scored({"loss": mean, **score(metric_names(split.task), [mean], [int(weight)])}, [], [], counted=counted)
    if head.writes:
        count = len(chosen) if texts is None else texts
        chosen = [chosen[place] for place in spaced(len(chosen), count)] if count else []
        # texts end at different lengths, and with a model in slices every token exchanges: all ranks write all of them
        together = ONE if ranks.shards else ranks
        predicted = _texts(model, tokenizer, split, task, chosen, tokens, search, together)
    predictions = [predicted[i] for i in chosen]
    if not chosen:
        return Scored({"loss": mean}, [], [], counted=counted)
    metrics, intervals = score_task(split.task, predictions, [split.reference(i) for i in chosen])
    of_chosen = [logits_of[i] for i in chosen if i in logits_of]
    return Scored({"loss": mean, **metrics}, chosen, predictions, intervals, counted, of_chosen)


def _texts(
    model: Model,
    tokenizer: Tokenizer,
    split: Encoded,
    task: int,
    chosen: Sequence[int],
    tokens: int,
    search: Search,
    ranks: Ranks,
) -> dict[int, str]:
    """Texts generated for the prompts of these examples."""

    def write(places: Sequence[int]) -> list[tuple[int, str]]:
        members = [chosen[place] for place in places]
        made = model.generate([split.prompt_of(i) for i in members], task, tokenizer.ends, search)
        return list(zip(members, map(tokenizer.decode, made), strict=True))

    written = ranks.spread(write, prompts_at_once([len(split.prompt_of(i)) for i in chosen], search, tokens))
    return {i: text for together in written for i, text in together}


def spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices, evenly spaced; all if `wanted` is 0 or there are no more."""
    if wanted == 0 or wanted >= count:
        return list(range(count))
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()
