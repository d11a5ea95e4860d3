"""Keeps what runs of one recipe with several seeds have learnt as a result of this device.

trunkline train training/configs/finetune-encoder.yaml init=FOLDER data=DIR seed=0 run=runs/encoder-0
python benchmarks/learning/recipes.py runs/encoder-*

Runs of another recipe, by the name of the config, stand beside it. What was kept of other seeds stays.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml

from trunkline.benchmarks.record import record, recorded

NAME = "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    for run in parser.parse_args().runs:
        keep(run)


def keep(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    recipe = Path(next(word for word in summary["command"].split() if word.endswith(".yaml"))).stem
    where = summary["environment"]
    recipes = recorded(NAME, where).get("recipes", {})
    seeds = recipes.setdefault(recipe, {})
    most = config["evaluation"]["last_examples"] or math.inf
    seeds[str(config["seed"])] = {
        "scores": {name: _scores(task) for name, task in summary["tasks"].items()},
        "examples": {name: min(most, task["validation_examples"]) for name, task in summary["tasks"].items()},
        "threads": where["threads"],
        **{name: summary[name] for name in ("steps", "real_tokens", "training_seconds", "peak_memory_bytes")},
    }
    recipes[recipe] = dict(sorted(seeds.items()))
    record(NAME, {"recipes": dict(sorted(recipes.items()))}, where)


def _scores(task: dict[str, Any]) -> dict[str, float]:
    return {name: score for name, score in task["metrics"].items() if name != "loss"}


if __name__ == "__main__":
    main()
