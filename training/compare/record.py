"""What is kept of a finished part of a comparison: one JSON file, from which every table, curve and test is made.

The file needs neither the run's folder nor its machine: parts that were made elsewhere, on another day, count here when
their files are put into the same folder, as long as they were made with the same settings, starts and data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from trunkline.engine import checkpoint
from trunkline.engine.tasks.task import Task
from trunkline.training.compare.systems import Basis, Part
from trunkline.training.run.folder import digest_of, settings_that_count
from trunkline.training.scoring.metrics import metric_names, rouge_by_document

Record = dict[str, Any]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
WARM_UP = "warm-up"  # the part that is no system by itself
COSTS = ("steps", "real_tokens", "training_flops", "training_seconds", "wall_time_seconds")


@dataclass(frozen=True)
class Records:
    """The folder of the records of a comparison."""

    folder: Path

    def path(self, system: str, seed: int, part: Part, settings: Mapping[str, Any]) -> Path:
        return self.folder / f"{system}-seed-{seed}-{part.name}-{settings['split']}.json"

    def of(self, system: str, seed: int, part: Part, settings: Mapping[str, Any]) -> Record | None:
        """The record of a part, if there is one.

        Raises:
            ValueError: it is damaged, or of other settings than these.
        """
        path = self.path(system, seed, part, settings)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            checkpoint.check_same(record["settings"], settings)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no record of this comparison, name another kept=: {error}") from error
        return record

    def put(self, system: str, seed: int, part: Part, record: Record) -> None:
        write_json(self.path(system, seed, part, record["settings"]), record)


def write_json(path: Path, content: Record) -> None:
    """Whole or not at all, so that a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def settings_of(part: Part, basis: Basis, identity: str, split: str) -> dict[str, Any]:
    """What must be the same for a record to count: the run's settings, its start and the data that it is scored on."""
    settings = settings_that_count(part.config) | {"init": identity, "split": split}
    scored = {of_task.task.name: digest_of(of_task) for of_task in basis.corpus.validation}
    settings["validation"] = {name: scored[name] for name in settings["tasks"] if name in scored}
    return json.loads(json.dumps(settings))


def record_of(part: Part, settings: Mapping[str, Any]) -> Record:
    """The record of a finished run, from its folder."""
    run, tasks = Path(part.config.run), {task.name: task for task in part.config.all_tasks}
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    file = run / "predictions.json"  # which runs from before do not have
    predictions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    metrics = {name: task["metric"] for name, task in summary["tasks"].items()}
    return {
        "settings": settings,
        "summary": summary,
        "predictions": {name: with_values(tasks[name], of_task) for name, of_task in predictions.items()},
        "curves": curves(run / "metrics.jsonl", metrics),
    }


def with_values(task: Task, of_task: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions as they are kept: of texts, which may not be anybody's to hand on, the score of each instead.

    'values' has these by the name of what they are of, the model's under ''; 'references' is the SHA-256 of theirs.
    """
    metric = metric_names(task)[0]
    if metric not in ROUGE or not of_task["examples"]:
        return {**of_task, "values": {}}
    references = of_task["references"]
    values = {
        name: [round(value, 6) for value in rouge_by_document(made, references, task.references)[metric]]
        for name, made in {"": of_task["predictions"], **of_task["baselines"]}.items()
    }
    digest = sha256(json.dumps(references).encode()).hexdigest()
    untold: dict[str, list[Any]] = {name: [] for name in of_task["baselines"]}
    return {**of_task, "predictions": [], "baselines": untold, "references": digest, "values": values}


def curves(log: Path, metrics: Mapping[str, str]) -> dict[str, dict[str, list[list[float]]]]:
    """From metrics.jsonl, by task: [examples seen, training loss], and [real tokens, seconds, score] of evaluations."""
    events: dict[tuple[str, int], dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        events[event["event"], event["step"]] = event  # of a step that was made twice the later one
    made: dict[str, dict[str, list[list[float]]]] = {name: {"loss": [], "score": []} for name in metrics}
    seen, tokens = dict.fromkeys(metrics, 0), {0: 0}
    for (kind, step), event in sorted(events.items(), key=lambda item: (item[0][1], item[0][0] == "evaluation")):
        if kind == "step":
            tokens[step] = event["real_tokens"]
            for name in metrics:
                seen[name] += event["examples"].get(name, 0)
                if name in event["loss"]:
                    made[name]["loss"].append([float(seen[name]), event["loss"][name]])
        elif kind == "evaluation" and step in tokens:
            for name, metric in metrics.items():
                if metric in event["metrics"].get(name, {}):
                    made[name]["score"].append([tokens[step], event["seconds"], event["metrics"][name][metric]])
    return made


def learnt(parts: Mapping[str, Record]) -> list[Record]:
    """Those of a system's parts that answer."""
    return [record for name, record in parts.items() if name != WARM_UP]


def of_task(parts: Mapping[str, Record], task: str) -> Record | None:
    """The record of the part in which a task is learnt."""
    return next((record for record in learnt(parts) if task in record["summary"]["tasks"]), None)
