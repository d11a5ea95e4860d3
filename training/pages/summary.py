"""What is left of a run: summary.json, predictions.json and samples.json."""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.kernels.dispatch import REPLACED
from trunkline.training.data.corpus import Corpus
from trunkline.training.data.encoded import Encoded
from trunkline.training.environment import command, environment
from trunkline.training.pages.report import SAMPLES
from trunkline.training.run.progress import Progress
from trunkline.training.scoring.calibration import Calibration
from trunkline.training.scoring.evaluation import Scored, spaced
from trunkline.training.scoring.metrics import metric_names, score_task

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


def summarise(
    engine: "Engine",
    corpus: Corpus,
    progress: Progress,
    final: dict[str, Scored],
    calibration: dict[str, Calibration],
) -> dict[str, Any]:
    """Writes summary.json, predictions.json and samples.json into the run folder and returns the summary."""
    run = Path(engine.config.run)
    predictions = predictions_of(corpus, corpus.validation, final)
    tasks = {
        split.task.name: _task_summary(train, split, progress, final[split.task.name], predictions[split.task.name])
        | {"calibration": asdict(calibration[split.task.name]) if split.task.name in calibration else None}
        for train, split in zip(corpus.train, corpus.validation, strict=True)
    }
    summary = {
        "name": run.name,
        "command": command(),
        "device": str(engine.device),
        "steps": progress.step,
        "steps_left_out": progress.left_out,
        "tokens": progress.tokens,
        "real_tokens": progress.real_tokens,
        "training_flops": progress.flops,
        "tokens_per_second": progress.real_tokens / progress.seconds,
        "padding_waste": 1 - progress.real_tokens / progress.tokens,
        "training_seconds": progress.seconds,
        "wall_time_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "uncompiled_batches": progress.uncompiled,
        "replaced_kernels": dict(REPLACED),
        "peak_memory_bytes": peak_memory(engine.device),
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "best_step": progress.best_step,
        "tasks": tasks,
        "environment": environment(),
    }
    samples = {
        split.task.name: _samples(corpus, split, final[split.task.name])
        for split in corpus.validation
        if final[split.task.name].examples
    }
    # the summary last: a run that has one has the others
    for name, content in (("predictions", predictions), ("samples", samples), ("summary", summary)):
        (run / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary


def predictions_of(
    corpus: Corpus, splits: Sequence[Encoded], scored: Mapping[str, Scored]
) -> dict[str, dict[str, Any]]:
    """By task: the scored examples by their places in the split, what the model and what the trivial predictions say of
    them, and what is right."""
    made = {}
    for train, split in zip(corpus.train, splits, strict=True):
        of_task, head = scored[split.task.name], HEADS[split.task.head]
        references = [split.reference(i) for i in of_task.examples]
        documents = [corpus.tokenizer.decode(split.prompt_of(i)) for i in of_task.examples] if head.learns_words else []
        made[split.task.name] = {
            "examples": of_task.examples,
            "predictions": of_task.predictions,
            "references": references,
            "baselines": head.trivial([train.reference(i) for i in range(len(train))], documents, references),
        }
    return made


def baseline_scores(task: Task, predictions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of the trivial predictions, by name; `predictions` is of one task, from `predictions_of`."""
    references = predictions["references"]
    return {name: score_task(task, made, references)._asdict() for name, made in predictions["baselines"].items()}


def _task_summary(
    train: Encoded, validation: Encoded, progress: Progress, final: Scored, predictions: dict[str, Any]
) -> dict[str, Any]:
    task = train.task
    baselines = baseline_scores(task, predictions)
    return {
        "head": task.head,
        "metric": metric_names(task)[0],
        "metrics": final.metrics,
        "intervals": final.intervals,
        "references": _references(validation, final),
        "baseline": {"name": next(iter(baselines)), **next(iter(baselines.values()))} if baselines else None,
        "baselines": baselines,
        "first_loss": progress.first_loss[task.name],
        "last_loss": final.metrics["loss"],
        "train_examples": len(train),
        "validation_examples": len(validation),
        "examples_seen": progress.examples.get(task.name, 0),
        "dropped": train.counts.dropped,
        "truncated": train.counts.truncated,
        "validation_dropped": validation.counts.dropped,
        "validation_truncated": validation.counts.truncated,
    }


def _references(validation: Encoded, final: Scored) -> str | None:
    """What of several references for a document counts, in words; None where no document has several."""
    own = [validation.reference(i) for i in final.examples] if validation.references else []
    most = max((1 if isinstance(reference, str) else len(reference) for reference in own), default=1)
    return f"{validation.task.references} of up to {most} references" if most > 1 else None


def _samples(corpus: Corpus, split: Encoded, scored: Scored) -> list[dict[str, Any]]:
    """Some validation examples with what was predicted, evenly spaced."""
    return [
        {
            "input": corpus.tokenizer.decode(split.prompt_of(scored.examples[place])),
            "reference": _in_words(corpus, split, scored.examples[place], split.reference(scored.examples[place])),
            "prediction": _in_words(corpus, split, scored.examples[place], scored.predictions[place]),
        }
        for place in spaced(len(scored.examples), SAMPLES)
    ]


def _in_words(corpus: Corpus, split: Encoded, i: int, value: Any) -> str:
    """A label or prediction of example `i` as a reader wants it."""
    return HEADS[split.task.head].in_words(split.task, value, split.piece(i), corpus.tokenizer)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
