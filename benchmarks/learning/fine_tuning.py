"""What each default of fine-tuning a checkpoint is worth: every one put back, by itself, to what it could be instead.

    python benchmarks/learning/fine_tuning.py DATA CHECKPOINT [CHANGE ...] [--seeds 0 1 2] [--steps 320]

DATA is laid out like the hub, CHECKPOINT is a pretrained encoder. Every change is made to
training/configs/finetune-encoder.yaml by itself and trained with every seed. What was measured before is kept, so that
some changes, or some seeds, can be run at a time.
"""

import argparse
from unittest.mock import patch

from trunkline.benchmarks.learning.seeds import keep, scores_of
from trunkline.benchmarks.record import ROOT
from trunkline.engine.network.model import MultiTaskModel
from trunkline.training.config_file import load_config

NAME = "fine_tuning"
CONFIG = ROOT / "training" / "configs" / "finetune-encoder.yaml"
LABEL_UNITS = "regressions in the labels' own units"
CHANGES = {
    "the defaults": [],
    "every task counts alike, not every example": ["counting=tasks"],
    LABEL_UNITS: [],
    "both": ["counting=tasks"],
    "a clip of 50, not 1": ["optimizer.clip=50"],
    "AdamW's beta2 0.999, not 0.98": ["optimizer.beta2=0.999"],
    "heads at the trunk's rate": ["optimizer.head_learning_rate=1.0e-4"],
    "a rate of 5e-5, not 1e-4": ["optimizer.learning_rate=5.0e-5"],
    "a rate of 2e-4, not 1e-4": ["optimizer.learning_rate=2.0e-4"],
    "layers' rates fall by 0.9": ["optimizer.layer_decay=0.9"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder laid out like the hub")
    parser.add_argument("checkpoint", help="of a pretrained encoder")
    parser.add_argument("changes", nargs="*", metavar="CHANGE", help="; ".join(CHANGES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=320)
    options = parser.parse_args()
    chosen = options.changes or list(CHANGES)
    if strangers := set(chosen) - set(CHANGES):
        parser.error(f"no change '{strangers.pop()}'; there are {', '.join(CHANGES)}")

    command = f"python benchmarks/learning/fine_tuning.py DATA CHECKPOINT --steps {options.steps}"
    length = [f"steps={options.steps}", f"evaluation.every={options.steps}", "evaluation.last_examples=800"]
    for seed in options.seeds:
        for change in chosen:
            values = [f"data={options.data}", f"init={options.checkpoint}", *length, *CHANGES[change]]
            with patch.object(MultiTaskModel, "set_units", *_nothing(change in (LABEL_UNITS, "both"))):
                measured = scores_of(load_config(CONFIG, values), seed)
            keep(NAME, command, CHANGES, change, seed, measured)


def _nothing(wanted: bool) -> tuple:
    """What `patch.object` puts in the place of `set_units`."""
    return (lambda *_: None,) if wanted else (MultiTaskModel.set_units,)


if __name__ == "__main__":
    main()
