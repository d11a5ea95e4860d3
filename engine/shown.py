"""How an engine shows itself in a notebook: its trunk, its tasks, their sizes and scores."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

CLASSES = 6  # names that are listed


def engine_html(engine: "Engine") -> str:
    """A line on the trunk, and a row for every task."""
    known = engine.summary.get("tasks", {})
    titles = "".join(f"<th>{title}</th>" for title in ("task", "predicts", "from", "trained on", "scored on", "scores"))
    rows = "".join(_row(task, known.get(task.name, {})) for task in engine.tasks)
    return f"<div>{escape(_trunk(engine))}</div><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>"


def _trunk(engine: "Engine") -> str:
    config = engine.config
    shape = f"{config.trunk.num_layers} blocks of width {config.trunk.hidden_size}"
    kind = "Bi-LSTM" if config.architecture == "bilstm" else "trunk"
    if engine._model is None:
        return f"{kind} of {shape}, not trained yet: fit() trains it"
    count = sum(parameter.numel() for parameter in engine.model.parameters())
    return f"{kind} of {shape}, {count / 1e6:.1f} M parameters, on {engine.device}"


def _row(task: Any, about: Mapping[str, Any]) -> str:
    classes = ", ".join(task.labels[:CLASSES]) + (" …" if len(task.labels) > CLASSES else "")
    predicts = f"{task.head}: {classes}" if classes else task.head
    scores = ", ".join(f"{name} {value:.3f}" for name, value in about.get("metrics", {}).items() if name != "loss")
    sizes = [about.get(f"{split}_examples") for split in ("train", "validation")]
    cells = [
        task.name,
        predicts,
        " + ".join(task.text),
        *("" if size is None else f"{size:,}" for size in sizes),
        scores,
    ]
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def with_metrics(summary: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The summary of a run with other scores, by task."""
    known = summary.get("tasks", {})
    return {**summary, "tasks": {name: {**known.get(name, {}), "metrics": own} for name, own in metrics.items()}}
