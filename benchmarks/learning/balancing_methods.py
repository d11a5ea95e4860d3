"""The demo learnt with every balancing method: the scores of its tasks beside those with fixed weights.

    python benchmarks/learning/balancing_methods.py [METHOD ...] [--steps N]

Without names all eleven, `fixed` first. With the demo's own steps a method takes about three minutes on two cores; what
was measured before with as many steps is kept, so that a part of the methods can be run at a time.
"""

import argparse
import tempfile
from statistics import fmean
from typing import Any, get_args

from trunkline.benchmarks.record import ROOT, record, recorded
from trunkline.engine.engine import Engine
from trunkline.engine.settings import BalancingMethod
from trunkline.training.config_file import load_config
from trunkline.training.environment import environment

NAME = "balancing_methods"
DEMO = ROOT / "training" / "configs" / "demo.yaml"
KEPT = ("metrics", "first_loss", "last_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(get_args(BalancingMethod)))
    parser.add_argument(
        "--steps", type=int, default=load_config(DEMO).steps, help="default: %(default)s, those of the demo"
    )
    options = parser.parse_args()
    if strangers := set(options.methods) - set(get_args(BalancingMethod)):
        parser.error(f"no method {', '.join(strangers)}; there are {', '.join(get_args(BalancingMethod))}")

    for method in options.methods or get_args(BalancingMethod):
        keep(method, options.steps, learn(method, options.steps))
    print_table(recorded(NAME, environment())["methods"])


def keep(method: str, steps: int, measured: dict[str, Any]) -> None:
    """Adds one method to the results with as many steps; others may have come in the meantime."""
    around = environment()
    before = recorded(NAME, around)
    methods = {**(before["methods"] if before.get("steps") == steps else {}), method: measured}
    ordered = {name: methods[name] for name in get_args(BalancingMethod) if name in methods}
    command = f"python benchmarks/learning/balancing_methods.py --steps {steps}"
    record(NAME, {"command": command, "steps": steps, "methods": ordered}, around)


def learn(method: str, steps: int) -> dict[str, Any]:
    """What the summary of the demo run says of its tasks, and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"balancing={method}", f"steps={steps}", f"run={folder}/run", f"evaluation.every={steps}"]
        summary = Engine.from_config(load_config(DEMO, overrides)).fit()
    tasks = {name: {key: task[key] for key in KEPT} for name, task in summary["tasks"].items()}
    return {
        "mean_score": fmean(task["metrics"][task["metric"]] for task in summary["tasks"].values()),
        "metric": {name: task["metric"] for name, task in summary["tasks"].items()},
        "baseline": {name: task["baseline"]["metrics"][task["metric"]] for name, task in summary["tasks"].items()},
        "tasks": tasks,
        "seconds": summary["training_seconds"],
    }


def print_table(measured: dict[str, Any]) -> None:
    metric = next(iter(measured.values()))["metric"]
    print(f"{'method':16} {'mean':>6} {'seconds':>8}  " + "  ".join(f"{n}: {m}, loss" for n, m in metric.items()))
    for method, of in measured.items():
        scores = [f"{of['tasks'][n]['metrics'][m]:.3f}, {of['tasks'][n]['last_loss']:.3f}" for n, m in metric.items()]
        print(f"{method:16} {of['mean_score']:6.3f} {of['seconds']:8.0f}  {'  '.join(scores)}")


if __name__ == "__main__":
    main()
