"""Several labels beside a plain Hugging Face loop, and the calibration of probabilities.

    python benchmarks/learning/answers.py DATA CHECKPOINT [--seeds 0 1 2] [--steps 384]

DATA is laid out like the hub. One run learns SST-2 and `meaning`: STS-B's pairs, labelled with each of related,
similar, close and same that their similarity, 1 to 4 or more of 5, reaches; so a pair has none to four labels. The loop
is that of from_checkpoint.py, on the same tokens, with binary cross-entropy. What was measured before is kept.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from trunkline.benchmarks.learning.from_checkpoint import CONFIG, peer
from trunkline.benchmarks.learning.seeds import keep, scores_of
from trunkline.benchmarks.record import recorded
from trunkline.engine.tasks.task import Task
from trunkline.training.config_file import load_config
from trunkline.training.environment import environment

NAME = "answers"
LABELS = ("related", "similar", "close", "same")
TOKENS = 640  # of a step: about 32 of these short texts, as in the loop
ORDER = OURS, PEER = ("Trunkline", "Hugging Face, same tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder laid out like the hub")
    parser.add_argument("checkpoint", help="of a pretrained encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=384)
    options = parser.parse_args()
    command = f"python benchmarks/learning/answers.py DATA CHECKPOINT --steps {options.steps}"
    with tempfile.TemporaryDirectory() as folder:
        files = {split: labelled(options.data, split, Path(folder)) for split in ("train", "validation")}
        meaning = Task("meaning", "multi-label", ("sentence1", "sentence2"), "labels", LABELS, **files)
        length = [f"steps={options.steps}", f"evaluation.every={options.steps}", f"batch.tokens={TOKENS}"]
        config = load_config(CONFIG, [f"data={options.data}", f"init={options.checkpoint}", *length])
        config = replace(config, tasks=["sst2", meaning])
        for seed in options.seeds:
            known = recorded(NAME, environment()).get("changes", {})
            ours = known.get(OURS, {}).get(str(seed)) or scores_of(config, seed)
            keep(NAME, command, ORDER, OURS, seed, ours)
            if str(seed) not in known.get(PEER, {}):
                found = peer(config, options.checkpoint, seed, int(ours["real_tokens"]), examples=0)
                keep(NAME, command, ORDER, PEER, seed, found)


def labelled(data: Path, split: str, folder: Path) -> str:
    """STS-B's pairs with a list of labels, as a Parquet file."""
    table = pq.read_table(next((data / "glue" / "stsb").glob(f"{split}-*.parquet")))
    labels = [[*LABELS[: int(label)]] for label in table["label"].to_pylist()]
    path = folder / f"meaning-{split}.parquet"
    pq.write_table(table.select(["sentence1", "sentence2"]).append_column("labels", [labels]), path)
    return str(path)


if __name__ == "__main__":
    main()
