"""The systems of a comparison from pretrained starts: what each is, as the runs it takes.

    multitask         a causal checkpoint, all tasks
    single-task       the same checkpoint, one model a task
    multitask-small   a smaller one, which may be the same cut to some of its blocks, all tasks
    bert              a bidirectional checkpoint, all tasks; its summaries are extracted
    bilstm-attention  a Bi-LSTM with additive attention, from word vectors where there are any, all tasks

Each brings its own tokenizer: a budget in tokens is one of the places in batches, which all fill to a few per cent.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trunkline.engine.config import TRAINED, Config, config_from
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.settings import Mixing
from trunkline.engine.tasks.task import Task
from trunkline.training.compare.record import WARM_UP
from trunkline.training.compare.starts.start import Found, Start
from trunkline.training.compare.systems import LSTM_LAYERS, Basis, Part, masked_text, multitask, single_task
from trunkline.training.run.optimizer import FROM_CHECKPOINT
from trunkline.training.run.optimizer import HEADS as HEAD_RATE


def config_of(system: str, config: Config, start: Start, found: Found) -> Config:
    """The settings of a system's runs: those of the comparison, with its start.

    Raises:
        ValueError: a start that does not fit the system: a bidirectional trunk that is to write, say.
    """
    settings: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(Config)}
    settings |= {"projection": start.projection, "prompt_weight": start.prompt_weight, "adapters": start.adapters}
    settings |= {name: given for name in ("optimizer", "batch") if (given := getattr(start, name)) is not None}
    try:
        if system == "bilstm-attention":
            if start.init:
                raise ValueError("a Bi-LSTM starts from `vectors`; init is for a trunk")
            shape = replace(config.trunk, hidden_size=start.hidden_size, num_layers=LSTM_LAYERS, num_heads=1)
            settings |= {"trunk": shape, "architecture": "bilstm", "vectors": found.vectors}
            settings["mixing"] = replace(config.mixing, patience=None)  # of a Bi-LSTM no head is held still
            return config_from(settings)
        if not start.init:
            raise ValueError("init is missing: it starts from a checkpoint")
        settings |= {"trunk": {}, "init": found.source, **{name: getattr(Config, name) for name in TRAINED}}
        if system == "bert":
            settings["tasks"] = tuple(map(extracted, config.all_tasks))
        if system == "single-task" and start.adapters is not None:
            settings["adapters"] = replace(start.adapters, of="task")
        made = config_from(settings)
        if system == "bert" and made.trunk.causal:
            raise ValueError(f"it reads in both directions, and the trunk of '{start.init}' is causal")
        if start.warm_up and start.adapters is None and made.optimizer.learning_rate == "auto":
            # a warm-up hands on a trunk that is still that of the checkpoint, at the rates of one
            rates = replace(made.optimizer, learning_rate=FROM_CHECKPOINT, head_learning_rate=HEAD_RATE)
            made = replace(made, optimizer=rates)
        return made
    except ValueError as error:
        raise ValueError(f"compare: start.{system}: {str(error).removeprefix('config: ')}") from error


def extracted(task: Task) -> Task:
    """The task as a trunk can learn it that does not write."""
    return replace(task, head="extract") if task.head == "generate" else task


def parts_of(system: str, basis: Basis, folder: Path, seed: int) -> list[Part]:
    """The runs of one system with one seed."""
    if system == "single-task":
        return single_task(basis, folder, seed)
    steps = round(basis.warm_up * basis.config.steps)
    if not steps:
        return multitask(basis, folder, seed)
    config = basis.config
    tasks = [*next_words(config.all_tasks)] if config.trunk.causal else [*map(masked_text, config.all_tasks)]
    first = basis.run(
        folder / WARM_UP,
        seed,
        tasks=tuple(tasks),
        steps=steps,
        mixing=Mixing(),
        weights={},
        class_weights={},
        adapters=None,
        projection="",
        prompt_weight=0.0,
    )
    then = basis.run(folder / "all", seed, steps=config.steps - steps, init=first.run)
    return [Part(WARM_UP, first), Part("all", then)]


def next_words(tasks: list[Task]) -> Iterator[Task]:
    """A language model of every column with text: of what is read, and of the summaries that are to be written."""
    for task in tasks:
        for column in (*task.text, *([task.label] if HEADS[task.head].learns_words else [])):
            name = f"{task.name}-{''.join(c if c.isalnum() else '-' for c in column.lower())}"
            changes: dict[str, Any] = {
                "name": name,
                "head": "language-model",
                "text": (column,),
                "label": "",
                "labels": (),
            }
            yield replace(task, **changes, metrics=(), start="", unlabelled="drop", too_long="truncate")
