"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors; and which layers they are on.

Only JSON and safetensors are read. What the families call the layers is in families.py.

D width in, C width out, K rank
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trunkline.engine.checks import short
from trunkline.engine.foreign.families import family_of
from trunkline.engine.foreign.pretrained import parts_of, read_json
from trunkline.engine.foreign.shapes import matching_family, settings_of
from trunkline.engine.network.adapters import AdaptedLayer, Adapters, Part
from trunkline.engine.network.trunk import Trunk

SETTINGS, WEIGHTS, MADE_FOR = "adapter_config.json", "adapter_model.safetensors", "adapter_origin.json"
PREFIX = "base_model.model."


def adaptable(trunk: Trunk) -> dict[str, tuple[int, list[Part]]]:
    """Every linear layer of a trunk's blocks: its width in, and its parts, as its family calls them."""
    settings = trunk.origin.settings if trunk.origin is not None else _settings_like(trunk)
    found = {}
    for name, layer in trunk.named_modules():
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            weight = f"{name}.weight"
            sources = family_of(settings).sources(weight, settings) if settings else [weight]
            parts, end = [], 0
            for source, part in zip(sources, parts_of(trunk.config, weight, layer.weight, len(sources)), strict=True):
                begin, end = end, end + len(part)
                parts.append(Part(source.removesuffix(".weight"), begin, end))
            found[name] = layer.in_features, parts
    return found


def _settings_like(trunk: Trunk) -> dict[str, Any]:
    """Of a checkpoint with this shape; empty where no family has it."""
    try:
        return settings_of(trunk.config, matching_family(trunk.config))
    except ValueError:
        return {}


def chosen_layers(trunk: Trunk, names: str | Sequence[str]) -> dict[str, tuple[int, list[Part]]]:
    """Of `adaptable`, what `Adapters.layers` names.

    Raises:
        ValueError: a name that matches nothing; names the nearest one.
    """
    layers = adaptable(trunk)
    if names == "all":
        return layers
    wanted: dict[str, set[Part]] = {layer: set() for layer in layers}
    for name in names:
        found = False
        for layer, (_, parts) in layers.items():
            matching = {part for part in parts if _is_named(name, layer, part)}
            wanted[layer] |= matching
            found = found or bool(matching)
        if not found:
            known = {end for layer, (_, parts) in layers.items() for end in _names(layer, parts)}
            nearest = get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"adapters.layers: the trunk has no '{name}'; did you mean '{nearest}'? There are "
                f"{', '.join(sorted(known))}, and blocks.0 to blocks.{len(trunk.blocks) - 1}"
            )
    chosen = {
        layer: (width, [part for part in parts if part in wanted[layer]]) for layer, (width, parts) in layers.items()
    }
    return {layer: (width, parts) for layer, (width, parts) in chosen.items() if parts}


def _is_named(name: str, layer: str, part: Part) -> bool:
    _, number, own = layer.split(".")
    if span := re.fullmatch(r"blocks\.(\d+)-(\d+)", name):
        return int(span[1]) <= int(number) <= int(span[2])
    return name in (own, layer, f"blocks.{number}") or f".{part.name}".endswith(f".{name}")


def _names(layer: str, parts: Sequence[Part]) -> Iterator[str]:
    yield layer.rpartition(".")[2]
    yield from (part.name.rpartition(".")[2] for part in parts)


@dataclass(frozen=True)
class LowRank:
    """An adapter of one part of a layer, as PEFT has it."""

    a: Tensor  # (K, D)
    b: Tensor  # (C, K)
    scale: float


def save_adapter(
    folder: Path, adapters: Adapters, adapter: int, trunk: Trunk, *, base: str, digest: str, writes: bool
) -> Path:
    """Writes one adapter as PEFT does, and beside it which trunk it is for and the hash of its file.

    Args:
        base: name or folder of the checkpoint.
        digest: of the checkpoint.
        writes: whether the task writes text.
    """
    layers = adaptable(trunk)
    prefix = trunk.origin.prefix if trunk.origin is not None else ""
    settings = trunk.origin.settings if trunk.origin is not None else _settings_like(trunk)
    tensors, names = {}, []
    for name in layers:
        if (layer := adapters.layer(name)) is not None:
            for p, part in enumerate(layer.parts):
                down, up = (w[adapter].detach() for w in layer.of_part(p))
                key = f"{PREFIX}{prefix}{part.name}"
                tensors[f"{key}.lora_A.weight"] = down.T.contiguous().cpu()
                tensors[f"{key}.lora_B.weight"] = up.T.contiguous().cpu()
                names.append(part.name)
    first: AdaptedLayer = next(iter(adapters.layers.values()))  # type: ignore[assignment]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if writes else None,
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.rslora,
        "target_modules": names,
        "fan_in_fan_out": bool(settings) and family_of(settings).inputs_first,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, {"format": "pt"})
    partial.replace(folder / WEIGHTS)
    origin = {"trunk": digest, "sha256": _sha256(folder / WEIGHTS)}
    for file, value in ((SETTINGS, content), (MADE_FOR, origin)):
        (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return folder


def read_adapter(
    source: str | Path, layers: Mapping[str, tuple[int, Sequence[Part]]], digest: str
) -> dict[str, LowRank]:
    """The adapter in a folder that PEFT or `save_adapter` wrote, by the names of its parts.

    Args:
        layers: of the trunk that it is to be put on: `adaptable`.
        digest: of the checkpoint of that trunk; empty: not known.

    Raises:
        ValueError: it is damaged, uses what is not covered, or is of another trunk; names the file and what is wrong.
    """
    folder = Path(source).expanduser()
    for file in (SETTINGS, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"adapter {folder}: {file} is missing")
    settings = read_json(folder / SETTINGS)
    try:
        _check_settings(settings)
        if (folder / MADE_FOR).is_file():
            _check_origin(folder, digest)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{WEIGHTS} is damaged: {error}") from error
        return dict(_low_ranks(settings, tensors, layers))
    except ValueError as error:
        raise ValueError(f"adapter {folder}: {error}") from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {short(settings.get('peft_type'))} is not covered; LORA is")
    refused = {"use_dora": False, "modules_to_save": None, "bias": "none", "lora_bias": False, "use_qalora": False}
    refused |= {"trainable_token_indices": None, "target_parameters": None, "layer_replication": None}
    for key, value in refused.items():
        if (given := settings.get(key)) not in (value, None, [], {}):
            raise ValueError(f"{key}: {short(given)} is not covered; an adapter must have {value!r}")
    for key in ("r", "lora_alpha"):
        if isinstance(settings.get(key), bool) or not isinstance(settings.get(key), int | float) or settings[key] <= 0:
            raise ValueError(f"{key}: expected a number above 0, got {short(settings.get(key))}")
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise ValueError(f"{key}: {short(settings[key])} is not covered; all layers must have one rank and alpha")


def _check_origin(folder: Path, digest: str) -> None:
    origin = read_json(folder / MADE_FOR)
    if (found := _sha256(folder / WEIGHTS)) != origin.get("sha256"):
        raise ValueError(f"{WEIGHTS} is damaged: {MADE_FOR} says SHA-256 {short(origin.get('sha256'))}, got {found}")
    if digest and origin.get("trunk") not in ("", digest):
        raise ValueError(f"it is of another trunk: of SHA-256 {short(origin.get('trunk'))}, and this one is {digest}")


def _low_ranks(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, Sequence[Part]]]
) -> Iterator[tuple[str, LowRank]]:
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    known = {part.name: (width, part.end - part.first) for width, parts in layers.values() for part in parts}
    for key in sorted(tensors):
        if not (match := re.fullmatch(r"(.*)\.lora_(A|B)\.weight", key)):
            raise ValueError(f"{WEIGHTS}: '{key}' is no A or B of a LoRA adapter")
        module = match[1].removeprefix(PREFIX)
        name = next((name for name in known if f".{module}".endswith(f".{name}")), None)
        if name is None:
            near = get_close_matches(module, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"target '{module}' is none of the trunk's adaptable layers; the nearest is '{near}'")
        if match[2] == "B":
            continue
        if (other := f"{match[1]}.lora_B.weight") not in tensors:
            raise ValueError(f"{WEIGHTS}: '{other}' is missing")
        a, b = tensors[key], tensors[other]
        width, columns = known[name]
        if list(a.shape) != [rank, width] or list(b.shape) != [columns, rank]:
            raise ValueError(
                f"it is of another trunk: '{module}' has A {list(a.shape)} and B {list(b.shape)}, expected "
                f"{[rank, width]} and {[columns, rank]}"
            )
        yield name, LowRank(a, b, scale)


@torch.no_grad()
def put_adapter(adapters: Adapters, adapter: int, given: Mapping[str, LowRank]) -> None:
    """Gives one of the adapters these weights; a smaller rank is filled up with zeros, a layer that lacks adds nothing.

    Raises:
        ValueError: a layer that has no adapters here, or a larger rank.
    """
    left = dict(given)
    for layer in adapters.layers.values():
        assert isinstance(layer, AdaptedLayer)
        for p, part in enumerate(layer.parts):
            down, up = (w[adapter] for w in layer.of_part(p))  # (D, K) and (K, C)
            up.zero_()
            if (own := left.pop(part.name, None)) is None:
                continue
            rank = len(own.a)
            if rank > layer.rank:
                raise ValueError(f"adapter of rank {rank} does not fit adapters.rank {layer.rank}: make it as large")
            down[:, :rank] = own.a.T.to(down)
            up[:rank] = own.b.T.to(up) * (own.scale / layer.scale)
    if left:
        raise ValueError(f"adapter on '{next(iter(left))}', which is none of adapters.layers here")


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()
