"""The systems of step.py: ways to make training steps, all as batches, a loss and an optimizer.

trunkline, compiled, CUDA graph     packed batches of all tasks: as they are, in one graph, in a CUDA graph
padded, grouped, packed             three ways of making batches for a Hugging Face model, see hugging_face.py
packed, compiled; packed, Liger     the last with its trunk compiled, or (GPU) with Liger's vocabulary loss
9 heads, 300 heads                  packed batches of generated texts with so many classification tasks
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig, preset

if TYPE_CHECKING:
    from trunkline.engine.config import Config
    from trunkline.training.data.corpus import Corpus

MAX_LENGTH, VOCABULARY, EXAMPLES = 512, 8192, 2000  # longest example, entries of the tokenizer, examples of a task
TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "qqp", "qnli", "mnli", "dialogsum")
STEPS = 100_000  # more than anybody waits for
FITTED_TO = 32  # batches to which a compiled graph is fitted
PASS = 256  # batches of one task each that have the tasks in nearly the proportions of the mix


@dataclass(frozen=True)
class Shape:
    """What is trained: a trunk, and tokens a step."""

    trunk: TrunkConfig
    tokens: int


_GPT2 = {"positions": "learned", "activation": "gelu_tanh"}
SHAPES = {
    "tiny": Shape(preset("tiny", vocab_size=VOCABULARY, **_GPT2), 2048),
    "small": Shape(preset("small"), 32768),
    "llama-1b": Shape(
        TrunkConfig(
            vocab_size=128256,
            hidden_size=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            intermediate_size=8192,
            max_positions=4096,
            positions="rotary",
            rope_theta=500000.0,
            norm="rms",
            activation="swiglu",
            bias=False,
        ),
        4 * 4096,
    ),
}


@dataclass
class Amount:
    """What a batch holds, added up over steps."""

    tokens: int = 0  # that carry an example
    padding: int = 0
    pairs: float = 0.0  # a token and one that it sees
    row_pairs: float = 0.0  # of these, the pairs of labelled tokens
    rows: int = 0  # labelled tokens
    targets: int = 0  # of these, such that predict a token

    def __iadd__(self, other: "Amount") -> "Amount":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def operations(self, trunk: TrunkConfig) -> float:
        """Of the products that forward and backward cannot do without: in the last block labelled tokens are enough."""
        from trunkline.training.flops import BACKWARD, trunk_flops

        return (1 + BACKWARD) * trunk_flops(trunk, self.tokens, self.rows, self.targets, self.pairs, self.row_pairs)


@dataclass(frozen=True)
class System:
    """A model in training."""

    model: nn.Module
    batches: Iterator[tuple[Any, Amount]]
    loss: Callable[[Any], Tensor]
    keeps_gradients: bool = False  # as a CUDA graph needs it

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), 3e-4, fused=True)


def make(name: str, shape: Shape, data: Path | None, device: torch.device) -> System:
    """The system of that name."""
    torch.manual_seed(0)
    if name in ("9 heads", "300 heads"):
        return _heads(int(name.split()[0]), shape, device)
    way, _, kind = name.partition(", ")
    if way == "trunkline":
        return _trunkline(kind, shape, data, device)
    if data is None:
        return _llama(kind, shape, device)
    return _hugging_face(way, kind, shape, data, device)


def _ours(model: MultiTaskModel, kind: str, next_batch: Callable[[], PackedBatch], device: torch.device) -> System:
    keep_freed_memory()
    model, shapes = model.to(device), None
    forward: Callable[[PackedBatch], Any] = model
    if kind:
        shapes = FixedShapes.of([next_batch() for _ in range(FITTED_TO)], model.groups)
        forward = CompiledModel(model, shapes, cuda_graphs=kind == "CUDA graph")

    def batches() -> Iterator[tuple[PackedBatch, Amount]]:
        while True:
            batch = next_batch()
            amount = _amount_of(batch, model)
            yield (shapes.pad(batch) if shapes else batch).to(device), amount

    def loss(batch: PackedBatch) -> Tensor:
        sums = forward(batch)
        return (sums.loss / sums.weight.clamp(min=1)).sum()

    if isinstance(forward, CompiledModel):
        with autocast(device):
            forward.warm_up(next_batch().to(device))
    return System(model, batches(), loss, keeps_gradients=kind == "CUDA graph")


def _amount_of(batch: PackedBatch, model: MultiTaskModel) -> Amount:
    from trunkline.training.flops import seen_pairs

    pairs, row_pairs = seen_pairs(batch, model.trunk.config.causal)
    return Amount(
        tokens=batch.real_tokens,
        padding=len(batch.tokens) - batch.real_tokens,
        pairs=pairs,
        row_pairs=row_pairs,
        rows=len(batch.rows.token),
        targets=sum(batch.rows.counts[model.num_small + model.num_spans :]),
    )


def _trunkline(kind: str, shape: Shape, data: Path | None, device: torch.device) -> System:
    """On the eight GLUE tasks and DialogSum; without data, on long texts of random tokens."""
    from trunkline.engine.tasks.task import Task
    from trunkline.training.data.batches import Packer
    from trunkline.training.data.mixing import Mixer

    if data is None:
        model = MultiTaskModel(Trunk(shape.trunk), [Task("text", "language-model", ("text",))])
        return _ours(model, kind, lambda: pack(_texts(shape), 1, shape.tokens), device)
    config = configured(shape, data)
    corpus = read(config)
    mixer = Mixer([split.lengths for split in corpus.train], config.mixing, [], shape.tokens, steps=STEPS, seed=0)
    packer, numbers = Packer(corpus.train, config), iter(range(STEPS))
    model = MultiTaskModel(Trunk(_with_room(shape, corpus)), corpus.tasks)
    return _ours(model, kind, lambda: packer.pack(mixer.batch(next(numbers)), config.batch.tokens), device)


def _heads(count: int, shape: Shape, device: torch.device) -> System:
    """`count` tasks of two classes, all on the same examples."""
    from trunkline.engine.tasks.task import Task

    tasks = [Task(f"task-{t}", "classify", ("text",), "label", ("no", "yes")) for t in range(count)]
    rng = np.random.default_rng(0)

    def batch() -> PackedBatch:
        lengths = rng.integers(8, 96, shape.tokens // 10)
        lengths = lengths[lengths.cumsum() <= shape.tokens]
        examples = [
            Example(i % count, rng.integers(0, VOCABULARY, n), np.array([n - 1]), rng.integers(0, 2, 1))
            for i, n in enumerate(lengths, int(rng.integers(count)))
        ]
        return pack(examples, count, shape.tokens)

    return _ours(MultiTaskModel(Trunk(shape.trunk), tasks), "", batch, device)


def _texts(shape: Shape) -> list[Example]:
    """Texts as long as the trunk takes."""
    L = shape.trunk.max_positions
    texts = np.random.default_rng().integers(0, shape.trunk.vocab_size, (shape.tokens // L, L))
    return [Example(0, text, np.arange(L - 1), text[1:]) for text in texts]


def _hugging_face(way: str, kind: str, shape: Shape, data: Path, device: torch.device) -> System:
    from trunkline.benchmarks.systems.hugging_face import HuggingFaceModel
    from trunkline.benchmarks.systems.hugging_face import batches as made
    from trunkline.training.data.mixing import shares

    config = configured(shape, data)
    corpus = read(config)
    splits = corpus.train
    model = HuggingFaceModel(_with_room(shape, corpus), splits).to(device)
    if kind == "compiled":
        model.trunk.compile()
    if kind == "Liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        model.vocabulary_loss = LigerFusedLinearCrossEntropyLoss()
    probabilities = shares(config.mixing, [len(split) for split in splits], [], 0.0).tolist()

    def batches() -> Iterator[tuple[Any, Amount]]:
        several = list(islice(made(way, splits, probabilities, shape.tokens, seed=0), PASS))
        for members, one_row in cycle(several if way == "packed" else _spread(several)):
            lengths = np.array([splits[t].lengths[i] for t, i in members])
            padding = 0 if one_row else int(lengths.max() * len(lengths) - lengths.sum())
            written = [splits[t].task.head == "generate" for t, _ in members]
            asked = [
                n - splits[t].label_of(i)[0] if w else 1 for (t, i), n, w in zip(members, lengths, written, strict=True)
            ]
            amount = Amount(
                tokens=int(lengths.sum()),
                padding=padding,
                pairs=_seen(lengths, lengths),
                row_pairs=_seen(lengths, np.array(asked)),
                rows=int(sum(asked)),
                targets=int(sum(n for n, w in zip(asked, written, strict=True) if w)),
            )
            yield (members, one_row), amount

    return System(model, batches(), lambda batch: model(batch, device))


def _seen(lengths: np.ndarray, last: np.ndarray) -> float:
    """What the last so many tokens of texts of these lengths see: themselves and all before them."""
    before = lengths - last
    return float((lengths * (lengths + 1) - before * (before + 1)).sum()) / 2


def _spread(batches: Sequence[tuple[list[tuple[int, int]], bool]]) -> list[tuple[list[tuple[int, int]], bool]]:
    """Batches of one task each, every task's evenly over the whole, so that any few in a row have nearly the mix."""
    of_task: dict[int, list[Any]] = {}
    for batch in batches:
        of_task.setdefault(batch[0][0][0], []).append(batch)
    placed = [((i + 0.5) / len(own), batch) for own in of_task.values() for i, batch in enumerate(own)]
    return [batch for _, batch in sorted(placed, key=lambda pair: pair[0])]


def _llama(kind: str, shape: Shape, device: torch.device) -> System:
    if kind == "Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = Trunk(shape.trunk).to_hugging_face().to(device)
    model.config.use_cache = False
    if kind == "compiled":
        model.compile()

    def batches() -> Iterator[tuple[Tensor, Amount]]:
        while True:
            tokens = torch.from_numpy(np.stack([text.tokens for text in _texts(shape)]))
            texts, length = tokens.shape
            targets = texts * (length - 1)
            pairs, last = texts * length * (length + 1) / 2, texts * length  # the last token of a text has no label
            amount = Amount(tokens.numel(), 0, pairs, pairs - last, targets, targets)
            yield tokens.to(device, non_blocking=True), amount

    return System(model, batches(), lambda tokens: model(input_ids=tokens, labels=tokens).loss)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def configured(shape: Shape, data: Path) -> "Config":
    from trunkline.engine.config import Config
    from trunkline.engine.settings import Batch

    batch = Batch(shape.tokens, max_length=MAX_LENGTH)
    return Config(tasks=TASKS, data=str(data), trunk=shape.trunk, vocab_size=VOCABULARY, batch=batch)


def read(config: "Config") -> "Corpus":
    """The corpus, with the first examples of every task only."""
    from trunkline.training.data.corpus import load_corpus

    corpus = load_corpus(config)
    return replace(corpus, train=tuple(_first(split, EXAMPLES) for split in corpus.train))


def _first(split: Any, count: int) -> Any:
    return replace(split, bounds=split.bounds[: count + 1], label_bounds=split.label_bounds[: count + 1])


def _with_room(shape: Shape, corpus: "Corpus") -> TrunkConfig:
    return replace(shape.trunk, vocab_size=max(shape.trunk.vocab_size, corpus.tokenizer.vocab_size))
