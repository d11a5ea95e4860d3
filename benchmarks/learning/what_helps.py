"""What changes of its settings do for the multi-task system of a comparison where others are ahead of it.

    trunkline train training/configs/pretrain.yaml data=DIR run=BOOKS vocab_size=4096 batch.tokens=1024 \\
        batch.max_length=320
    python benchmarks/learning/what_helps.py DIR --books BOOKS [CHANGE ...] [--seeds 0 1 2]

Every change is made to training/configs/compare-cpu.yaml by itself and trained with every seed. What was measured
before is kept, so that some changes, or some seeds, can be run at a time. The run BOOKS, a trunk and its tokenizer, is
what the change 'pretrained' starts from; it has seen its text besides the budget of the comparison.
"""

import argparse

from trunkline.benchmarks.learning.seeds import keep, scores_of
from trunkline.benchmarks.record import ROOT
from trunkline.training.compare.comparison import load_comparison
from trunkline.training.compare.systems import ordinary

NAME, COMMAND = "what_helps", "python benchmarks/learning/what_helps.py DATA --books BOOKS"
CONFIG = ROOT / "training" / "configs" / "compare-cpu.yaml"
CHANGES = {
    "as it is": [],
    "larger shares of SST-2 and QQP": [
        "mixing={method: fixed, shares: {sst2: 0.5, qqp: 0.42, mrpc: 0.03, rte: 0.02, dialogsum: 0.03}}"
    ],
    "balancing by uncertainty": ["balancing=uncertainty"],
    "a projection per task": ["projection=gelu"],
    "pretrained": ["init=BOOKS"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder laid out like the hub")
    parser.add_argument("changes", nargs="*", metavar="CHANGE", help="; ".join(CHANGES))
    parser.add_argument("--books", default="", help="run folder of the pretrained trunk")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    chosen = options.changes or list(CHANGES)
    if strangers := set(chosen) - set(CHANGES):
        parser.error(f"no change '{strangers.pop()}'; there are {', '.join(CHANGES)}")
    if "pretrained" in chosen and not options.books:
        parser.error("the change 'pretrained' needs --books RUN")

    for name in chosen:
        for seed in options.seeds:
            overrides = [override.replace("BOOKS", options.books) for override in CHANGES[name]]
            config = ordinary(load_comparison(CONFIG, [f"data={options.data}", *overrides]))
            keep(NAME, COMMAND, CHANGES, name, seed, scores_of(config, seed))


if __name__ == "__main__":
    main()
