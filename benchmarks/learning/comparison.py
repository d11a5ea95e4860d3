"""Keeps what `trunkline compare` found as a result of this device.

trunkline compare training/configs/compare-cpu.yaml data=DIR
python benchmarks/learning/comparison.py runs/compare-cpu

One from pretrained starts (compare-pretrained.yaml) is a result of its own beside that from scratch.
"""

import argparse
import json
from pathlib import Path

from trunkline.benchmarks.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a comparison")
    results = json.loads((parser.parse_args().run / "comparison.json").read_text(encoding="utf-8"))
    name = "comparison" if results["budget"] == "steps" else "comparison_pretrained"
    record(name, results, results.pop("environment"))


if __name__ == "__main__":
    main()
