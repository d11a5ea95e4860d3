"""`trunkline doctor`: what is installed, which backend runs, and whether a config's data can be used."""

import importlib.util
import os
from importlib import metadata

import torch

from trunkline.engine.config import Config
from trunkline.engine.console import tell
from trunkline.engine.engine import Engine
from trunkline.training.data.corpus import load_corpus
from trunkline.training.environment import environment
from trunkline.training.run.optimizer import freeze, in_words, make_optimizer
from trunkline.training.self_test import self_test
from trunkline.training.watching.audience import Audience
from trunkline.training.watching.trackers import TRACKERS

OPTIONAL = {
    "triton": "kernels on NVIDIA GPUs",
    "datasets": "data from the Hugging Face hub",
    "transformers": "Hugging Face models",
    "rouge_score": "ROUGE",
    **dict.fromkeys(TRACKERS, "track=[...]"),
}


def check_installation() -> None:
    """Prints versions, devices and optional packages, and runs every op against its definition.

    Raises:
        ValueError: an op gives wrong numbers on this machine, and there is nothing to replace it; see `self_test`.
    """
    for name, value in environment().items():
        print(f"{name:14} {value}")
    if hasattr(os, "getloadavg"):  # not on Windows
        print(f"{'load':14} {load_in_words(os.getloadavg()[0], os.cpu_count() or 1)}")
    for name, purpose in OPTIONAL.items():
        found = metadata.version(name) if importlib.util.find_spec(name) else f"not installed ({purpose})"
        print(f"{name:14} {found}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for outcome in self_test(device, tell=print):
        print(f"{'self-test':14} {outcome}")


def load_in_words(load: float, cores: int) -> str:
    """What processes that want a core (a mean over the last minute) mean for a step on the CPU."""
    busy = f"{load:.1f} of {cores} cores"
    return f"{busy}: other programs use them too, which slows steps on the CPU" if load > 0.5 else busy


def check_data(config: Config) -> None:
    """Reads and encodes every example of a config, and prints what was found and what would learn at which rate.

    Raises:
        ValueError: something cannot be used; names task, file, row and value.
    """
    engine = Engine.from_config(config)  # what needs no data is found first
    Audience(config.track, (), tell=tell)
    corpus = load_corpus(config, tell=tell)
    model = engine.build(corpus.tokenizer)
    freeze(model, config.optimizer.freeze)
    print("\n".join(in_words(model, make_optimizer(model, config.optimizer), config.optimizer)))
    for train, validation in zip(corpus.train, corpus.validation, strict=True):
        counts = "".join(f", {count}" for count in train.counts.in_words())
        if of_validation := ", ".join(validation.counts.in_words()):
            counts += f"; of validation {of_validation}"
        print(
            f"{train.task.name:14} {len(train):>8,} train, {len(validation):>6,} validation, "
            f"{train.lengths.mean():.0f} tokens on average, {train.lengths.max()} at most{counts}"
        )
    print(f"vocabulary of {corpus.tokenizer.vocab_size:,}; the data is ready")
