"""`trunkline doctor`: what is installed, which backend runs, and whether a config's data can be used."""

import importlib.util
import os
from importlib import metadata

import numpy as np
import torch

from trunkline.engine.config import Config
from trunkline.engine.console import tell
from trunkline.engine.engine import Engine
from trunkline.engine.network.packing import Example, pack
from trunkline.kernels.attention.attention import attention, attention_reference
from trunkline.training.data.corpus import load_corpus
from trunkline.training.environment import environment
from trunkline.training.run.optimizer import freeze, in_words, make_optimizer
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
    """Prints versions, devices and optional packages, and runs one kernel against its definition.

    Raises:
        ValueError: attention gives wrong numbers on this machine.
    """
    for name, value in environment().items():
        print(f"{name:14} {value}")
    if hasattr(os, "getloadavg"):  # not on Windows
        print(f"{'load':14} {load_in_words(os.getloadavg()[0], os.cpu_count() or 1)}")
    for name, purpose in OPTIONAL.items():
        found = metadata.version(name) if importlib.util.find_spec(name) else f"not installed ({purpose})"
        print(f"{name:14} {found}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    error = _attention_error(device)
    print(f"{'attention':14} on {device}: largest error {error:.1e}")
    if not error < 1e-4:
        raise ValueError(f"attention on {device} errs by {error:.1e}, expected less than 1e-4: is torch intact?")


def load_in_words(load: float, cores: int) -> str:
    """What processes that want a core (a mean over the last minute) mean for a step on the CPU."""
    busy = f"{load:.1f} of {cores} cores"
    return f"{busy}: other programs use them too, which slows steps on the CPU" if load > 0.5 else busy


def _attention_error(device: torch.device) -> float:
    """The largest error of packed attention on three sequences, against the definition in float64."""
    plan = pack([Example(0, np.zeros(length), np.zeros(0)) for length in (40, 60, 200)], num_tasks=1).plan.to(device)
    q, k, v = torch.randn(3, 300, 4, 64, device=device)
    out = attention(q, k, v, plan, causal=True)
    exact = attention_reference(q.double(), k.double(), v.double(), plan, causal=True)
    return float((out - exact).abs().max())


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
