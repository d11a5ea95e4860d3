"""The model card of a finished run: what it does, how well, from which data, and what it cannot do."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trunkline.engine.config import Config, restore_config
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.yaml_file import read_yaml, write_yaml
from trunkline.training.pages.report import page_of
from trunkline.training.pages.units import duration, quantity
from trunkline.training.scoring.metrics import higher_is_better

PIPELINES = {  # of heads, as the hub calls them
    "classify": "text-classification",
    "regress": "text-classification",
    "tag": "token-classification",
    "span": "question-answering",
    "generate": "summarization",
    "extract": "summarization",
    "language-model": "text-generation",
    "masked-language-model": "fill-mask",
}
CLASSES = 8  # names that the table lists


def card(run: Path, repo: str = "", licence: str = "") -> str:
    """The text of README.md, in Markdown with the hub's front matter.

    Args:
        run: folder of a finished run.
        repo: id on the hub that the example loads; empty: the run's folder.
        licence: of the model, as the hub names it (apache-2.0, cc-by-4.0 ...); empty: not stated.

    Raises:
        ValueError: no finished run is there.
    """
    summary, config = read_run(run)
    tasks = [(task, summary["tasks"][task.name]) for task in config.all_tasks]
    return page_of(
        "card.md.jinja",
        front=write_yaml(_front_matter(tasks, summary, config, licence)),
        name=repo.rpartition("/")[2] or summary["name"],
        kind="Bi-LSTM" if config.architecture == "bilstm" else "transformer",
        start=f"from `{_named(config.init)}`" if config.init else "from scratch",
        repo=repo or run.as_posix(),
        usage=list(_usage([task for task, _ in tasks])),
        tasks=[_row(task, about) for task, about in tasks],
        training=list(_training(summary, config)),
        data=[_data(task) for task, _ in tasks],
        limits=list(_limits(tasks, config)),
    )


def read_run(run: Path) -> tuple[dict[str, Any], Config]:
    """Summary and config of a finished run.

    Raises:
        ValueError: there is none, or a file of it is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no folder of a run: it has no config.yaml")
    if not (run / "summary.json").is_file() or not (run / "model").is_dir():
        raise ValueError(f"the run {run} is not finished: it has no summary.json yet; go on with it (--resume)")
    try:
        summary = json.loads((run / "summary.json").read_bytes())
        return summary, restore_config(read_yaml((run / "config.yaml").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the run {run} is damaged, or of another release: {error}") from error


def _named(source: str) -> str:
    """A checkpoint by its id, or by the last part of its folder: where it lay is nobody's business."""
    return Path(source).name if Path(source).is_absolute() else source


def _front_matter(
    tasks: list[tuple[Task, dict[str, Any]]], summary: Mapping[str, Any], config: Config, licence: str
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "trunkline"}
    if licence:
        front["license"] = licence
    front["pipeline_tag"] = PIPELINES.get(tasks[0][0].head, "text-classification")
    front["tags"] = ["trunkline", *(["multi-task"] if len(tasks) > 1 else [])]
    if hub := list(dict.fromkeys(task.hub for task, _ in tasks if task.hub)):
        front["datasets"] = hub
    if config.init and not Path(config.init).is_absolute():
        front["base_model"] = config.init
    results = [
        {
            "task": {"type": PIPELINES.get(task.head, "text-classification"), "name": task.name},
            "dataset": {
                "type": task.hub or task.name,
                "name": " ".join(filter(None, (task.hub or task.name, task.subset))),
                "split": str(task.validation) if task.hub else "validation",
            },
            "metrics": [{"type": name, "value": value} for name, value in about["metrics"].items() if name != "loss"]
            or [{"type": "loss", "value": about["metrics"]["loss"]}],
        }
        for task, about in tasks
    ]
    front["model-index"] = [{"name": summary["name"], "results": results}]
    return front


def _usage(tasks: list[Task]) -> Iterator[str]:
    for task in tasks:
        head = HEADS[task.head]
        if head.writes:
            yield f'engine.generate(["{task.text[0]} ..."], task="{task.name}")'
        elif head.labelled:
            texts = ", ".join(f'"{column} ..."' for column in task.text)
            yield f'engine.predict([{texts if len(task.text) == 1 else f"({texts})"}], tasks=["{task.name}"])'


def _row(task: Task, about: Mapping[str, Any]) -> dict[str, str]:
    names = ", ".join(task.labels[:CLASSES]) + (
        f" and {len(task.labels) - CLASSES} more" if task.labels[CLASSES:] else ""
    )
    metric, baseline = about["metric"], about["baseline"]
    cells = {
        "name": task.name,
        "predicts": f"{task.head}: {names}" if names else task.head,
        "reads": " + ".join(task.text),
        "metric": metric,
        "score": f"{about['metrics'][metric]:.3f}",
        "baseline": f"{baseline['metrics'][metric]:.3f} ({baseline['name']})" if baseline else "–",
        "trained": f"{about['train_examples']:,}",
        "scored": f"{about['validation_examples']:,}",
    }
    return {name: " ".join(cell.replace("|", "\\|").split()) for name, cell in cells.items()}


def _training(summary: Mapping[str, Any], config: Config) -> Iterator[str]:
    yield f"`{summary['command']}`"
    where = summary["environment"]
    amounts = [f"{summary['steps']:,} steps", f"{quantity(summary['real_tokens'])} tokens"]
    amounts += [f"{quantity(summary['parameters'])} parameters", duration(summary["wall_time_seconds"])]
    yield f"{', '.join(amounts)} on {where['gpu'] or where['processor']}"
    yield f"tasks are mixed by `{config.mixing.method}` and weighed by `{config.balancing.method}`; seed {config.seed}"
    yield f"trunkline {where['trunkline']}, torch {where['torch']}, Python {where['python']}"


def _data(task: Task) -> str:
    if task.generated:
        return f"{task.name}: generated"
    if task.hub:
        return f"{task.name}: [{task.hub}](https://huggingface.co/datasets/{task.hub}) {task.subset}".rstrip()
    held_out = f", {task.validation:.1%} of its rows held out" if isinstance(task.validation, float) else ""
    return f"{task.name}: `{Path(task.train).name}`{held_out}"


def _limits(tasks: list[tuple[Task, dict[str, Any]]], config: Config) -> Iterator[str]:
    for task, about in tasks:
        metric, baseline = about["metric"], about["baseline"]
        if baseline:
            score, trivial = about["metrics"][metric], baseline["metrics"][metric]
            if not (score > trivial if higher_is_better(metric) else score < trivial):
                yield f"{task.name} is no better than {baseline['name']}: it has learnt nothing that is of use"
        if about["validation_examples"] < 200:
            yield f"{task.name} is scored on {about['validation_examples']:,} rows only: some points are chance"
    yield f"texts are cut after {config.batch.max_length:,} tokens"
    if not config.init:
        yield "it starts from scratch: of language it knows what the training rows have"
    yield "it answers what resembles its training rows; for other sources, languages and times nothing was measured"
