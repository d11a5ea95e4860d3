"""An engine with every kind of head that answers, whose weights are large and random: made in a moment, not trained."""

from dataclasses import replace

import torch

from encoded import BYTES
from trunkline import Engine, Task, TrunkConfig
from trunkline.engine.network.generate import Search
from trunkline.engine.settings import Batch

TASKS = (
    Task("polarity", "classify", ("text",), "label", ("negative", "positive")),
    Task("topics", "multi-label", ("text",), "label", ("billing", "bug", "urgent"), threshold=0.4),
    Task("stars", "regress", ("text",), "label"),
    Task("parts", "tag", ("text",), "label", ("noun", "verb", "other")),
    Task("gist", "extract", ("text",), "label"),
    Task("follows", "classify", ("premise", "hypothesis"), "label", ("no", "maybe", "yes")),
    Task("where", "span", ("question", "context"), "label"),
    Task("retell", "generate", ("text",), "label", max_target_tokens=8),
)
TRUNK = TrunkConfig(vocab_size=BYTES.vocab_size, hidden_size=32, num_layers=2, num_heads=4, max_positions=96)


def answering_engine(trunk: TrunkConfig = TRUNK, **settings) -> Engine:
    """Of a trunk that is not causal without the task that writes."""
    tasks = TASKS if trunk.causal else TASKS[:-1]
    settings = {"batch": Batch(tokens=256, max_length=80), "search": Search(max_new_tokens=6), **settings}
    engine = Engine(replace(trunk), tasks, BYTES, device="cpu", **settings)
    randomise(engine.build(BYTES))
    return engine


def adapted_engine() -> Engine:
    """With an adapter for every task, and two tasks that write."""
    tasks = [*TASKS, replace(TASKS[-1], name="rewrite")]
    settings = {"batch": Batch(tokens=256, max_length=80), "search": Search(max_new_tokens=6)}
    engine = Engine(replace(TRUNK), tasks, BYTES, device="cpu", adapters={"rank": 4}, **settings)
    randomise(engine.build(BYTES))
    return engine


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
