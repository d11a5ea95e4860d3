"""The systems of a comparison: what each of them trains, of which size, on which part of the budget.

    multitask          the trunk with all tasks
    single-task        the same trunk, one model a task
    multitask-small    a trunk of half the width and depth, all tasks
    bert               a bidirectional trunk of BERT's shape, warmed up on masked words, all tasks
    bilstm-attention   a Bi-LSTM with additive attention and a copying decoder, all tasks

All see the same text through the same tokenizer, with the same marks (`exact_match`), in batches of the same size, and
as many of them in all:

- single-task divides the steps among its tasks as the tokens of the mix are divided, so each of its models sees as many
  examples of its task as the multi-task model does, and all of them together as many tokens;
- bert spends a share of the steps, `warm_up`, on guessing masked tokens of the tasks' own text, summaries included.

A bidirectional encoder cannot write. bert's summaries are extracted: it marks the sentences of the document that come
nearest to the summary (engine/heads/extract.py) and gives back as many of the likeliest as their probabilities add
up to, of equals the first. A decoder on top would have to learn to write from the few summaries alone, with most of the
parameters left to the encoder; picking sentences is what such an encoder can do, and what lead-1 and lead-3 do without
one. Its summaries are the document's words, which ROUGE rewards: they are to be read beside the leads.

The sizes of bert and bilstm-attention are set by their width so that parameters, or operations of training a token,
come as near to multitask's as whole heads allow. A trunk to start from (`init`) is for multitask and single-task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from trunkline.engine.config import Config, with_vocabulary
from trunkline.engine.engine import make_model
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.trunk import TrunkConfig
from trunkline.engine.settings import Mixing
from trunkline.engine.tasks.task import Task
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import Corpus, load_corpus
from trunkline.training.data.mixing import WINDOW, shares
from trunkline.training.flops import training_flops

Match = Literal["parameters", "flops"]
FIRST = "multitask"  # the system that the others are matched to, and held against
LSTM_LAYERS = 2
LARGEST = 1 << 14  # width that is tried


@dataclass(frozen=True)
class Part:
    """One run of a system: all it needs, or one of several that follow one another."""

    name: str
    config: Config


@dataclass(frozen=True)
class Basis:
    """What the systems of a comparison have in common."""

    config: Config  # of the multi-task system; its tokenizer is a folder
    corpus: Corpus
    match: Match
    warm_up: float

    def run(self, folder: Path, seed: int, **changes: object) -> Config:
        return replace(self.config, run=str(folder), seed=seed, **changes)  # type: ignore[arg-type]


def multitask(basis: Basis, folder: Path, seed: int) -> list[Part]:
    """The trunk with all tasks."""
    return [Part("all", basis.run(folder / "all", seed))]


def single_task(basis: Basis, folder: Path, seed: int) -> list[Part]:
    """The same trunk, one model a task; each sees as much of its task as the multi-task model does."""
    names = [task.name for task in basis.corpus.tasks]
    own = {task.name: given for task, given in zip(basis.config.all_tasks, basis.config.tasks, strict=True)}
    return [
        Part(
            name,
            basis.run(
                folder / name,
                seed,
                tasks=(own[name],),
                steps=steps,
                mixing=Mixing(),
                weights={},
                class_weights={key: value for key, value in basis.config.class_weights.items() if key == name},
            ),
        )
        for name, steps in zip(names, steps_of(basis.config, basis.corpus), strict=True)
    ]


def multitask_small(basis: Basis, folder: Path, seed: int) -> list[Part]:
    """A trunk of half the width and depth, all tasks."""
    return [Part("all", basis.run(folder / "all", seed, trunk=half(basis.config.trunk), init=""))]


def bert(basis: Basis, folder: Path, seed: int) -> list[Part]:
    """A bidirectional trunk with first-token pooling, warmed up on masked words; its summaries are extracted."""
    return _bert(basis, folder, seed, matched(basis, _bert, basis.config.trunk.num_heads))


def _bert(basis: Basis, folder: Path, seed: int, width: int) -> list[Part]:
    config = basis.config
    trunk = TrunkConfig(
        hidden_size=width,
        num_layers=config.trunk.num_layers,
        num_heads=config.trunk.num_heads,
        max_positions=config.batch.max_length + config.search.max_new_tokens,
        norm_position="post",
        norm_eps=1e-12,
        embedding_norm=True,
        causal=False,
        token_types=2,
        dropout=config.trunk.dropout,
        exact_match=config.trunk.exact_match,
    )
    warm_up = round(basis.warm_up * config.steps)
    changes = {"trunk": trunk, "prompt_weight": 0.0}
    tasks = tuple(replace(task, head="extract") if task.head == "generate" else task for task in config.all_tasks)
    if not warm_up:
        return [Part("all", basis.run(folder / "all", seed, tasks=tasks, init="", **changes))]
    masked = {"tasks": tuple(map(masked_text, config.all_tasks)), "weights": {}, "class_weights": {}}
    first = basis.run(folder / "warm-up", seed, **masked, steps=warm_up, init="", **changes)
    then = basis.run(folder / "all", seed, tasks=tasks, steps=config.steps - warm_up, init=first.run, **changes)
    return [Part("warm-up", first), Part("all", then)]


def bilstm_attention(basis: Basis, folder: Path, seed: int) -> list[Part]:
    """A Bi-LSTM with additive attention for every task, and a decoder that copies for summaries."""
    return _bilstm(basis, folder, seed, matched(basis, _bilstm, 2))


def _bilstm(basis: Basis, folder: Path, seed: int, width: int) -> list[Part]:
    given = basis.config.trunk
    trunk = TrunkConfig(
        hidden_size=width,
        num_heads=1,
        num_layers=LSTM_LAYERS,
        max_positions=given.max_positions,
        dropout=given.dropout,
        exact_match=given.exact_match,
    )
    changes = {"trunk": trunk, "architecture": "bilstm", "init": "", "projection": "", "prompt_weight": 0.0}
    changes["mixing"] = replace(basis.config.mixing, patience=None)  # of a Bi-LSTM no head is held still
    return [Part("all", basis.run(folder / "all", seed, **changes))]


SYSTEMS: dict[str, Callable[[Basis, Path, int], list[Part]]] = {
    "multitask": multitask,
    "single-task": single_task,
    "multitask-small": multitask_small,
    "bert": bert,
    "bilstm-attention": bilstm_attention,
}


def ordinary(config: Config) -> Config:
    """The fields that every run has, of a config that may have more."""
    return Config(**{field.name: getattr(config, field.name) for field in fields(Config)})


def steps_of(config: Config, corpus: Corpus) -> list[int]:
    """Steps of every task's own model: the run's steps in proportion to the tasks' tokens in the mix, at least one."""
    sizes = [len(split) for split in corpus.train]
    fixed = [config.mixing.shares.get(task.name, 0.0) for task in corpus.tasks]
    lengths = np.array([split.lengths.mean() for split in corpus.train])
    tokens = np.mean([shares(config.mixing, sizes, fixed, p) * lengths for p in np.linspace(0, 1, 101)], axis=0)
    bounds = np.round(config.steps * np.cumsum([0, *tokens]) / tokens.sum())
    return np.diff(bounds).astype(int).clip(1).tolist()


def half(trunk: TrunkConfig) -> TrunkConfig:
    """Half the width and depth, in heads of the same width where their number is even."""
    heads = max(1, trunk.num_heads // 2)
    kv_heads = trunk.num_kv_heads and max(1, trunk.num_kv_heads // 2)
    return replace(
        trunk,
        hidden_size=max(2, trunk.hidden_size // 2 // (2 * heads) * 2) * heads,
        num_layers=max(1, trunk.num_layers // 2),
        num_heads=heads,
        num_kv_heads=kv_heads if kv_heads and heads % kv_heads == 0 else None,
        intermediate_size=trunk.intermediate_size and trunk.intermediate_size // 2,
    )


def masked_text(task: Task) -> Task:
    """The task of guessing masked tokens in what a task's model reads, and of summaries in what it writes."""
    text = (*task.text, task.label) if HEADS[task.head].learns_words else task.text
    return replace(
        task, head="masked-language-model", text=text, label="", labels=(), metrics=(), start="", unlabelled="drop"
    )


def parameters(config: Config) -> int:
    """Of the model that a config describes, whose trunk knows its vocabulary."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(config).parameters())


def flops_per_token(parts: Sequence[Part], corpus_of: Callable[[Config], Corpus]) -> float:
    """Operations of training for a token, from the first window of batches of every part."""
    total, tokens = 0.0, 0.0
    for part in parts:
        corpus = corpus_of(part.config)
        with torch.device("meta"):
            model = make_model(with_vocabulary(part.config, corpus.tokenizer))
        mixer = make_mixer(part.config, corpus)
        count = min(WINDOW, part.config.steps)
        batches = Packer(corpus.train, part.config).batches(mixer, range(count))
        total += part.config.steps / count * sum(training_flops(model, batch) for batch in batches)
        tokens += part.config.steps / count * sum(batch.real_tokens for batch in batches)
    return total / tokens


def matched(basis: Basis, system: Callable[[Basis, Path, int, int], list[Part]], multiple: int) -> int:
    """The width, a multiple of `multiple`, that brings a system nearest to the multi-task one in size."""
    known: dict[tuple, Corpus] = {}

    def corpus_of(config: Config) -> Corpus:
        key = (config.tasks, config.trunk.causal)
        if key not in known:
            known[key] = load_corpus(config, basis.corpus.tokenizer)
        return known[key]

    def size(parts: list[Part]) -> float:
        if basis.match == "flops":
            return flops_per_token(parts, corpus_of)
        return parameters(with_vocabulary(parts[-1].config, basis.corpus.tokenizer))

    wanted = size(multitask(basis, Path(), 0))
    low, high = 1, LARGEST // multiple  # the size at `low` stays below what is wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(system(basis, Path(), 0, middle * multiple)) < wanted else (low, middle)
    return multiple * min((low, high), key=lambda n: abs(size(system(basis, Path(), 0, n * multiple)) - wanted))
