"""What a run says before its first step: where it starts, what it reads, what learns, how long, and where it goes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from trunkline.engine.device import use_tuned
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import BiLSTM
from trunkline.engine.text.template import Frame, Marks
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Encoded
from trunkline.training.estimate import DEVICES, UTILISATION, matrix_rate
from trunkline.training.flops import training_flops
from trunkline.training.pages.units import duration, quantity
from trunkline.training.run.optimizer import in_words

if TYPE_CHECKING:
    from trunkline.training.run.run import Run

BATCHES = 4  # that the arithmetic of a step is averaged over


def introduction(run: "Run") -> Iterator[str]:
    """Line by line; costs a few batches and a few products."""
    yield _start(run)
    yield from _formats(run)
    yield from in_words(run.model, run.optimizer, run.config.optimizer)
    for train, validation in zip(run.corpus.train, run.corpus.validation, strict=True):
        yield _task(train, validation)
    yield _length(run)
    if tuned := use_tuned(run.engine.device):
        yield tuned
    if run.ranks.active:
        yield run.ranks.in_words()
    every = run.config.evaluation.every
    yield f"writes {run.folder}, a checkpoint every {every} steps; Ctrl-C stops it, --resume goes on from there"


def _start(run: "Run") -> str:
    config, model = run.config, run.model
    size = f"{quantity(sum(parameter.numel() for parameter in model.parameters()))} parameters"
    entries = f"a vocabulary of {run.corpus.tokenizer.vocab_size:,}"
    if isinstance(model, BiLSTM):
        return f"starts from scratch: a Bi-LSTM, {size}, {entries}"
    trunk = model.trunk.config
    start = f"from '{config.init}'" if config.init else "from a trunk that is given" if run.starts else "from scratch"
    sees = "causal" if trunk.causal else "bidirectional"
    return f"starts {start}: {trunk.num_layers} {sees} blocks of width {trunk.hidden_size}, {size}, {entries}"


def _formats(run: "Run") -> Iterator[str]:
    """How the texts of the tasks are laid out, each format once."""
    tokenizer, causal = run.corpus.tokenizer, run.corpus.train[0].causal
    formats: dict[str, list[str]] = {}
    for task in run.corpus.tasks:
        head = HEADS[task.head]
        if head.writes:
            end = tokenizer.inner.id_to_token(tokenizer.end)
            shown = f"{_shown(tokenizer.prompt_frame(), tokenizer, task.text)} {task.label} {end}"
        else:
            shown = _shown(tokenizer.frame(len(task.text), causal), tokenizer, task.text)
        formats.setdefault(shown, []).append(task.name)
    for shown, names in formats.items():
        yield f"reads {', '.join(names)} as: {shown}"


def _shown(frame: Frame, tokenizer: Tokenizer, columns: tuple[str, ...]) -> str:
    """Columns with the marks around them."""

    def marks(these: Marks) -> list[str]:
        return [str(tokenizer.inner.id_to_token(token)) for token in these.ids]

    between = [marks(these) for these in frame.marks]
    parts = [*between[0]]
    for column, after in zip(columns, between[1:], strict=True):
        parts += [f"{{{column}}}", *after]
    return " ".join(parts)


def _task(train: Encoded, validation: Encoded) -> str:
    left = ", ".join(train.counts.in_words())
    return (
        f"{train.task.name}: {train.task.head}, {len(train):,} examples of {train.lengths.mean():.0f} tokens to learn "
        f"from{f' ({left})' if left else ''}, {len(validation):,} to be scored on"
    )


def _length(run: "Run") -> str:
    """Steps, passes over the examples, and minutes where the device's rate is known."""
    config = run.config
    steps, tokens = config.steps - run.progress.step, config.batch.tokens * config.batch.accumulate
    passes = config.steps * tokens / sum(int(split.lengths.sum()) for split in run.corpus.train)
    text = f"{config.steps:,} steps of {tokens:,} tokens, as many as {passes:.2g} passes over the examples"
    if rate := _rate(run.engine.device):
        numbers = range(min(BATCHES, config.steps * config.batch.accumulate))
        flops = [training_flops(run.model, batch) for batch in run.packer.batches(run.mixer, numbers)]
        seconds = steps * config.batch.accumulate * sum(flops) / len(flops) / rate
        text += f"; about {duration(seconds)} of training"
    return text


def _rate(device: torch.device) -> float:
    """Operations a second that a step reaches, at a guess; 0: not known."""
    if device.type == "cpu":
        return UTILISATION["cpu"] * matrix_rate(0.05)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((UTILISATION["cuda"] * peak * 1e12 for known, (peak, _) in DEVICES.items() if known in name), 0.0)
    return 0.0
