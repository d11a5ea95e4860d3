"""Runs of one config with changed settings and several seeds, and their scores, kept as they come."""

import tempfile
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from trunkline.benchmarks.record import record, recorded
from trunkline.engine.config import Config
from trunkline.engine.engine import Engine
from trunkline.training.environment import environment


def scores_of(config: Config, seed: int) -> dict[str, Any]:
    """The first metric of every task after training, and what it took; the run itself is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        summary = Engine.from_config(replace(config, seed=seed, run=f"{folder}/run")).fit()
    tasks = summary["tasks"].items()
    return {
        "scores": {name: task["metrics"][task["metric"]] for name, task in tasks},
        "metrics": {name: task["metric"] for name, task in tasks},
        "calibration": {name: own["error"] for name, task in tasks if (own := task["calibration"])},
        "uncalibrated": {name: own["error_before"] for name, task in tasks if (own := task["calibration"])},
        "seconds": summary["training_seconds"],
        "real_tokens": summary["real_tokens"],
    }


def keep(name: str, command: str, order: Collection[str], change: str, seed: int, measured: dict[str, Any]) -> None:
    """Adds one run to results/<device>/<name>.json; others may have come in the meantime.

    Args:
        command: that measures all of them.
        order: of the changes in the table.
    """
    around = environment()
    changes = recorded(name, around).get("changes", {})
    changes.setdefault(change, {})[str(seed)] = measured
    ordered = {known: dict(sorted(changes[known].items())) for known in order if known in changes}
    record(name, {"command": command, "changes": ordered}, around)
