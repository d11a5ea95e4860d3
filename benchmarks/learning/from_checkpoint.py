"""What a pretrained encoder learns from the same tokens, here and in a plain Hugging Face loop.

    python benchmarks/learning/from_checkpoint.py DATA CHECKPOINT [--seeds 0 1 2] [--steps 640]

DATA is laid out like the hub. Ours is training/configs/finetune-encoder.yaml for so many steps. The loop is what a user
would write: AutoModel with its pooler, dropout and a linear layer a task, batches of 32 examples of one task and of
similar length, tasks as often as ours, AdamW as PyTorch has it, rate 1e-4 with warm-up and linear decay, clip 1, until
it has seen as many tokens as ours. Both are scored on the same examples, at most --examples a task, evenly spaced over
the validation split. What was measured before is kept. How long each takes: systems/fine_tuning_pace.py.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.benchmarks.learning.seeds import keep, scores_of
from trunkline.benchmarks.record import ROOT, recorded
from trunkline.benchmarks.systems.hugging_face import batches
from trunkline.engine.config import Config
from trunkline.training.config_file import load_config
from trunkline.training.data.corpus import Corpus, load_corpus
from trunkline.training.data.encoded import Encoded
from trunkline.training.data.mixing import shares
from trunkline.training.environment import environment
from trunkline.training.scoring.evaluation import spaced
from trunkline.training.scoring.metrics import metric_names, score

NAME = "from_checkpoint"
CONFIG = ROOT / "training" / "configs" / "finetune-encoder.yaml"
ORDER = OURS, PEER = ("Trunkline", "Hugging Face, same tokens")
ROWS, RATE, WARMUP, CLIP, DROPOUT = 32, 1e-4, 0.1, 1.0, 0.1
AT_ONCE = 64  # validation examples in a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder laid out like the hub")
    parser.add_argument("checkpoint", help="of a pretrained encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--examples", type=int, default=1000, help="of each task's validation split")
    options = parser.parse_args()

    command = (
        f"python benchmarks/learning/from_checkpoint.py DATA CHECKPOINT --steps {options.steps} "
        f"--examples {options.examples}"
    )
    length = [f"steps={options.steps}", f"evaluation.every={options.steps}"]
    length += [f"evaluation.last_examples={options.examples}"]
    config = load_config(CONFIG, [f"data={options.data}", f"init={options.checkpoint}", *length])
    for seed in options.seeds:
        ours = _kept(OURS, seed) or scores_of(config, seed)
        keep(NAME, command, ORDER, OURS, seed, ours)
        if not _kept(PEER, seed):
            measured = peer(config, options.checkpoint, seed, int(ours["real_tokens"]), options.examples)
            keep(NAME, command, ORDER, PEER, seed, measured)


def _kept(name: str, seed: int) -> dict[str, Any] | None:
    return recorded(NAME, environment()).get("changes", {}).get(name, {}).get(str(seed))


class Peer(nn.Module):
    """A Hugging Face encoder with its pooler, and a linear layer for every task."""

    def __init__(self, checkpoint: str, splits: Sequence[Encoded]):
        super().__init__()
        from transformers import AutoModel

        self.trunk = AutoModel.from_pretrained(checkpoint, attn_implementation="sdpa")
        self.dropout = nn.Dropout(DROPOUT)
        width = self.trunk.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, len(split.task.labels) or 1) for split in splits)

    def forward(self, split: Encoded, task: int, members: Sequence[int]) -> Tensor:
        """Logits (examples, classes), of a regression (examples, 1)."""
        tokens = [torch.from_numpy(split.tokens_of(i).astype("int64")) for i in members]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(own) for own in tokens])[:, None]
        inputs = {"attention_mask": mask.long()}
        if split.types is not None:
            types = [
                torch.from_numpy(split.types[split.bounds[i] : split.bounds[i + 1]].astype("int64")) for i in members
            ]
            inputs["token_type_ids"] = nn.utils.rnn.pad_sequence(types, batch_first=True)
        output = self.trunk(ids, **inputs)
        pooled = output.pooler_output if output.get("pooler_output") is not None else output.last_hidden_state[:, 0]
        return self.heads[task](self.dropout(pooled))


def peer(config: Config, checkpoint: str, seed: int, tokens: int, examples: int) -> dict[str, Any]:
    """Trains the loop on so many real tokens; the first metric of every task, as `scores_of`."""
    corpus = load_corpus(config)
    torch.manual_seed(seed)
    model = Peer(checkpoint, corpus.train)
    seen = sum(train(model, corpus, config, seed, tokens))
    names = {task.name: metric_names(task)[0] for task in corpus.tasks}
    return {"scores": _scores(model, corpus, examples), "metrics": names, "real_tokens": seen}


def train(model: Peer, corpus: Corpus, config: Config, seed: int, budget: int) -> Iterator[int]:
    """The real tokens of every step."""
    sizes = [len(split) for split in corpus.train]
    given = [config.mixing.shares.get(task.name, 0.0) for task in corpus.tasks]
    wanted = shares(config.mixing, sizes, given, progress=0.0).tolist()
    stream = batches("grouped", corpus.train, wanted, 0, seed, rows=ROWS)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=RATE)
    model.train()
    seen = 0
    while seen < budget:
        done = seen / budget
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((done + 1e-3) / WARMUP, (1 - done) / (1 - WARMUP))
        (members, _) = next(stream)
        task, rows = members[0][0], [row for _, row in members]
        split = corpus.train[task]
        _loss(split, rows, model(split, task, rows)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens = int(split.lengths[rows].sum())
        seen += tokens
        yield tokens


def _loss(split: Encoded, rows: Sequence[int], logits: Tensor) -> Tensor:
    labels = torch.tensor(np.stack([split.label_of(i) for i in rows]))  # (examples, 1), of several labels (examples, C)
    if split.task.head == "multi-label":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    if split.task.head == "regress":
        return F.mse_loss(logits, labels.float())
    return F.cross_entropy(logits, labels[:, 0].long())


def _answers(split: Encoded, logits: Tensor) -> list[Any]:
    if split.task.head == "multi-label":
        return [tuple(row.nonzero().flatten().tolist()) for row in logits > 0]
    return (logits[:, 0] if split.task.head == "regress" else logits.argmax(-1)).tolist()


@torch.inference_mode()
def _scores(model: Peer, corpus: Corpus, examples: int) -> dict[str, float]:
    model.eval()
    scores = {}
    for task, split in enumerate(corpus.validation):
        chosen = spaced(len(split), examples)
        ordered = sorted(chosen, key=lambda i, split=split: split.lengths[i])
        predicted: dict[int, Any] = {}
        for first in range(0, len(ordered), AT_ONCE):
            rows = ordered[first : first + AT_ONCE]
            predicted |= zip(rows, _answers(split, model(split, task, rows)), strict=True)
        names = metric_names(split.task)
        scores[split.task.name] = score(names, [predicted[i] for i in chosen], [split.reference(i) for i in chosen])[
            names[0]
        ]
    return scores


if __name__ == "__main__":
    main()
