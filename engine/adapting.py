"""What an engine does with its adapters: made, saved for PEFT, read, merged into the trunk, and one more of a new task.

A adapters, D width in, C width out
"""

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch

from trunkline.engine import settings
from trunkline.engine.config import Config, changed
from trunkline.engine.foreign.adapter_files import adaptable, chosen_layers, put_adapter, read_adapter, save_adapter
from trunkline.engine.foreign.pretrained import digest
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.adapters import Adapters
from trunkline.engine.network.kept_heads import keep_heads
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.tasks.task import Task

TOLERANCE = 1e-4  # of what a merged trunk gives, beside the largest value of what the unmerged one does
TRIED = 128  # tokens that both are tried on


def make_adapters(config: settings.Adapters, trunk: Trunk, tasks: Sequence[str]) -> Adapters:
    """New adapters, which add nothing yet, for tasks in the order of the model.

    Raises:
        ValueError: a layer or task that there is not.
    """
    groups = config.groups(tasks)
    of_task = [place for task in tasks for place, members in enumerate(groups.values()) if task in members]
    layers = chosen_layers(trunk, config.layers)
    return Adapters(list(groups), of_task, layers, config.rank, config.alpha, config.dropout, config.rslora)


def with_digest(config: Config) -> Config:
    """The config with the digest of the trunk that `init` brings, which adapters are saved with in its place.

    Raises:
        ValueError: they were made for another trunk.
    """
    if (adapters := config.adapters) is None:
        return config
    found = digest(config.init)
    if adapters.trunk_digest not in ("", found):
        raise ValueError(
            f"engine: the adapters are for a trunk of SHA-256 {adapters.trunk_digest}, but '{config.init}' has {found}:"
            " it was changed, or is another one"
        )
    init = os.path.abspath(config.init) if os.path.isdir(config.init) else config.init
    return replace(config, init=init, adapters=replace(adapters, trunk_digest=found))


def adapters_of(model: torch.nn.Module) -> Adapters:
    """
    Raises:
        ValueError: there are none.
    """
    adapters = getattr(model, "adapters", None)
    if adapters is None:
        raise ValueError("engine: it has no adapters: its trunk learns; `adapters` of the config makes them")
    return adapters


def save_adapters(model: MultiTaskModel, config: Config, folder: Path, tasks: Sequence[int] = ()) -> Path:
    """Each adapter in a folder of its name, as PEFT writes them; of tasks, by their places, only theirs."""
    adapters = adapters_of(model)
    assert config.adapters is not None
    wanted = {adapters.places[t] for t in tasks or range(len(model.tasks))}
    for place, name in enumerate(adapters.names):
        if place not in wanted:
            continue
        own = [task for task, adapter in zip(model.tasks, adapters.places, strict=True) if adapter == place]
        save_adapter(
            folder / name,
            adapters,
            place,
            model.trunk,
            base=config.init,
            digest=config.adapters.trunk_digest,
            writes=any(HEADS[task.head].group == "vocabulary" for task in own),
        )
    return folder


def load_adapter(model: MultiTaskModel, config: Config, name: str, source: str | Path) -> None:
    """Puts the adapter that PEFT or `save_adapters` wrote in the place of one there is."""
    adapters = adapters_of(model)
    assert config.adapters is not None
    if name not in adapters.names:
        raise ValueError(f"engine: no adapter '{name}'; there are {', '.join(adapters.names)}")
    given = read_adapter(source, adaptable(model.trunk), config.adapters.trunk_digest)
    put_adapter(adapters, adapters.names.index(name), given)


def config_with(config: Config, task: Task) -> Config:
    """The config with one more task, which has an adapter of its own and alone learns from here on.

    Raises:
        ValueError: there are no adapters, or there is such a task.
    """
    if config.adapters is None:
        raise ValueError("add_task: without adapters every task learns in the trunk, which others need as it is")
    names = [other.name for other in config.all_tasks]
    of: str | dict[str, list[str]] = "task"
    if config.adapters.of != "task":
        of = {**config.adapters.groups(names), task.name: [task.name]}
    frozen = [*dict.fromkeys([*config.optimizer.freeze, *names])]
    changes = {"adapters": asdict(config.adapters) | {"of": of}, "optimizer": {"freeze": frozen}}
    return changed(config, {"tasks": (*config.tasks, task), **changes})


def keep_all(model: MultiTaskModel, other: MultiTaskModel) -> None:
    """Gives the model the heads and adapters of one with fewer tasks on the same trunk."""
    keep_heads(model, other)
    ours, theirs = adapters_of(model), adapters_of(other)
    places = [ours.names.index(name) for name in theirs.names]
    with torch.no_grad():
        for mine, given in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine[places] = given.to(mine)
        if other.num_vocabulary and not model.trunk.config.tie_vocabulary:
            model.vocabulary.copy_(other.vocabulary)


@torch.no_grad()
def merged(model: MultiTaskModel, task: int, tolerance: float = TOLERANCE) -> Trunk:
    """A copy of the trunk with a task's adapter in its weights, W + scale * (A B)^T, checked against trunk and adapter.

    Raises:
        ValueError: what they make of random tokens differs by more than the tolerance.
    """
    adapters, was_training = adapters_of(model), model.training
    adapter = adapters.places[task]
    trunk = deepcopy(model.trunk)
    for name, linear in trunk.named_modules():
        layer = adapters.layer(name) if isinstance(linear, torch.nn.Linear) else None
        if layer is not None:
            for p, part in enumerate(layer.parts):
                down, up = (w[adapter].double() for w in layer.of_part(p))
                columns = linear.weight[part.first : part.end]  # (C, D)
                columns.copy_(columns.double() + layer.scale * (down @ up).T)
    model.eval()
    error = _difference(model, trunk.eval(), task)
    model.train(was_training)
    if not error <= tolerance:
        raise ValueError(
            f"merge: merged and unmerged outputs of task '{model.tasks[task].name}' differ by {error:.1e} of the "
            f"largest value, more than {tolerance:.0e}: {trunk.tokens.weight.dtype} cannot hold what is added"
        )
    return trunk


def _difference(model: MultiTaskModel, trunk: Trunk, task: int) -> float:
    """Between what a trunk makes of random tokens, and the model's trunk with adapters: of the largest value."""
    config, device = model.trunk.config, model.device
    generator = torch.Generator().manual_seed(0)
    length = min(TRIED, config.max_positions)
    tokens = torch.randint(config.vocab_size, (length,), generator=generator).numpy()
    rows = torch.arange(length).numpy()
    batch = pack([Example(task, tokens, rows)], len(model.tasks)).to(device)
    expected = model.hidden(batch)
    found = trunk(batch.tokens, batch.positions, batch.plan, batch.rows.token)
    return float((found - expected).abs().max() / expected.abs().max())
