"""What a folder holds of an engine: what `Engine.save` wrote, a run, finished or not, or a checkpoint of one.

Nothing in it is believed before it is checked, and nothing outside of it is read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trunkline.engine import checkpoint
from trunkline.engine.config import Config, restore_config
from trunkline.engine.console import warn
from trunkline.engine.foreign.pretrained import SETTINGS, WEIGHTS, read_json
from trunkline.engine.network.model import FITTED, MultiTaskModel
from trunkline.engine.text.tokenizer import BESIDE, FILE, Tokenizer
from trunkline.engine.yaml_file import read_yaml

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name


def read_saved(folder: Path) -> tuple[Config, Tokenizer, dict[str, Tensor], Path]:
    """The settings, tokenizer and weights in a folder, and where the weights are.

    Of a run that is not finished the newest checkpoint is taken, and said so on standard error.

    Raises:
        ValueError: it holds nothing of the kind, or something that is damaged; names the file.
    """
    if not folder.is_dir():
        folder = _from_hub(folder)
    if (folder / "model" / SETTINGS).is_file():
        folder = folder / "model"
    if (folder / SETTINGS).is_file():
        try:
            config = restore_config(read_json(folder / SETTINGS))
        except ValueError as error:
            raise ValueError(f"engine: {folder / SETTINGS} is damaged, or of another release: {error}") from error
        return config, _tokenizer(folder, config), _weights(folder / WEIGHTS), folder / WEIGHTS
    return _read_checkpoint(folder)


def _from_hub(source: Path) -> Path:
    """Where the hub's copy of an engine is, which is downloaded unless it is there."""
    repo = source.as_posix()
    if not REPO.fullmatch(repo) or source.parent.is_dir():  # RUNS/name is meant to be here
        raise ValueError(f"engine: {source} is no folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=[SETTINGS, WEIGHTS, FILE, *BESIDE]))
    except ImportError as error:
        raise ValueError(
            f"engine: {source} is no folder, and the hub needs trunkline[hub], which is not installed"
        ) from error
    # offline, unknown, gated, a connection that breaks: every one is another class there
    except Exception as error:
        told = " ".join(str(error).split())
        raise ValueError(f"engine: {source} is no folder, and not to be had from the hub: {told:.300}") from error


def _read_checkpoint(folder: Path) -> tuple[Config, Tokenizer, dict[str, Tensor], Path]:
    run = folder.parent.parent if (folder / "manifest.json").is_file() else folder
    if not (run / "config.yaml").is_file():
        raise ValueError(f"engine: {folder} has no {SETTINGS}: it is neither a saved engine nor a run")
    if run == folder:
        newest = checkpoint.newest(run / "checkpoints", warn=warn)
        if newest is None:
            raise ValueError(f"engine: the run {run} is not finished, and has no checkpoint yet")
        warn(f"the run {run} is not finished: this is {newest.name}")
        folder = newest
    weights = dict(checkpoint.load(folder)[0].get("model", {}))
    try:
        config = restore_config(read_yaml((run / "config.yaml").read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"engine: {run / 'config.yaml'} is damaged, or of another release: {error}") from error
    tokenizer = _tokenizer(run, config)
    if config.architecture == "trunk":  # the file tells of the trunk before its tokenizer was known
        embedding = weights.get("trunk.tokens.weight", torch.empty(config.trunk.vocab_size, 1))
        config = replace(config, trunk=replace(config.trunk, vocab_size=len(embedding)))
    return config, tokenizer, weights, folder / "model.safetensors"


def write_saved(folder: Path, tensors: Mapping[str, Tensor], config: Config, tokenizer: Tokenizer) -> None:
    """See `Engine.save`; `tensors` as `own_tensors` gives them."""
    if (folder / WEIGHTS).exists() and not (folder / SETTINGS).exists():
        raise ValueError(f"engine: {folder} holds a checkpoint that is not ours: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    try:
        save_file(dict(tensors), partial)
    except SafetensorError as error:  # how safetensors tells of a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f"engine: {folder / WEIGHTS} is not saved: {error}") from error
    partial.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner only, whatever the umask
    partial.replace(folder / WEIGHTS)  # weights that were loaded may still lie in a file of that name
    (folder / SETTINGS).write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    tokenizer.save(folder)


def own_tensors(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """What is saved of a model: all; or of one with adapters all but what is in the checkpoint that `init` names."""
    left_out = _elsewhere(model, config)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def all_tensors(own: Mapping[str, Tensor], model: nn.Module, config: Config) -> dict[str, Tensor]:
    """With what `own_tensors` left out, from a model that has it."""
    left_out = _elsewhere(model, config)
    return {**{name: tensor for name, tensor in model.state_dict().items() if name in left_out}, **own}


def _elsewhere(model: nn.Module, config: Config) -> set[str]:
    """Names of the tensors that lie in the checkpoint which the adapters are for."""
    if config.adapters is None or not config.adapters.trunk_digest:
        return set()
    assert isinstance(model, MultiTaskModel)
    return {name for name, _ in model.frozen_by_adapters()}


class NoInitialisation(TorchFunctionMode):
    """Around the making of a model whose weights are read: none are drawn at random, which takes longer than reading
    them, and on the meta device imports half of torch's compiler."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function in (Tensor.normal_, Tensor.uniform_) or getattr(function, "__module__", "") == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **keywords)


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """
    Raises:
        ValueError: a tensor is missing, surplus, of another shape, or holds no numbers with a point.
    """
    wanted = [name for name in expected if name.rpartition(".")[2] not in FITTED]  # these earlier releases did not save
    faults = [f"{name} is missing" for name in wanted if name not in weights]
    faults += [f"{name} has no place" for name in weights if name not in expected]
    for name, tensor in weights.items():
        if name in expected and tensor.shape != expected[name].shape:
            faults.append(f"{name}: expected {list(expected[name].shape)}, got {list(tensor.shape)}")
        elif not tensor.is_floating_point():
            faults.append(f"{name} is of {tensor.dtype}")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"engine: {path} does not fit its settings: {'; '.join(faults[:4])}{more}")


def summary_beside(weights: Path) -> dict[str, Any]:
    """What summary.json of the run says that these weights are the model of; empty: they are no finished run's."""
    path = weights.parents[1] / "summary.json"
    if weights.parent.name != "model" or not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError:  # only to be shown
        return {}


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"engine: {path} is missing")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"engine: {path} is damaged: {error}") from error


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    if not (folder / FILE).is_file():
        raise ValueError(f"engine: {folder / FILE} is missing")
    return Tokenizer.load(str(folder), layout=config.layout, grows=False)  # what it lacks it never had
