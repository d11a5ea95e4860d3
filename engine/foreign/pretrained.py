"""Hugging Face checkpoints as trunks, and trunks as Hugging Face checkpoints.

Only JSON and safetensors are read: nothing is unpickled, and no code of a checkpoint runs. What the families call
things is in families.py.

V vocabulary, D width, H query heads, G key/value heads, E head width
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trunkline.engine.checks import made, short
from trunkline.engine.foreign.families import Family, family_of
from trunkline.engine.foreign.shapes import matching_family, settings_of, trunk_config
from trunkline.engine.network.trunk import Trunk, TrunkConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LARGEST_JSON = 100_000_000  # bytes
SETTINGS = "engine.json"  # beside the weights of an engine of ours


@dataclass(frozen=True)
class Origin:
    """What a checkpoint held besides the trunk, for it to be written again."""

    settings: dict[str, Any]
    """Of config.json."""
    prefix: str
    """Of the names of the trunk's tensors."""
    others: dict[str, Tensor]
    """Heads, pooler and masks, as they were."""


def load(
    source: str, dropout: float | None = None, dtype: torch.dtype | None = None, blocks_later: bool = False
) -> Trunk:
    """See `Trunk.from_pretrained`; `blocks_later` leaves the weights of blocks on the meta device, and `Trunk.waiting`
    says how each is read."""
    folder = folder_of(source)
    settings, tensors = _settings(folder), _tensors(folder)
    try:
        config = _config(settings)
        if (settings.get("adapters") or {}).get("trunk_digest"):
            raise ValueError("it holds adapters and heads, and no trunk; Engine.merge makes one of a task's adapter")
        if dropout is not None:
            config = replace(config, dropout=dropout)
        if config.num_layers > len(tensors):
            raise ValueError(f"{config.num_layers} layers, but {len(tensors)} tensors")
        with torch.device("meta"):
            trunk = Trunk(config)
        if "trunk" not in settings:
            weights = _from_hugging_face(trunk, settings, tensors, blocks_later)
        else:
            ours = {name.removeprefix("trunk."): tensors[name] for name in tensors if name.startswith("trunk.")}
            weights = {name: _joined(trunk, name, [ours[name]], False, blocks_later) for name in ours}
            trunk.vocabulary = tensors.get("vocabulary")
            trunk.vocabulary_bias = tensors.get("vocabulary_bias")
        if missing := [name for name, _ in trunk.named_parameters() if name not in weights]:
            raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing[:4])}")
        for name, parameter in trunk.named_parameters():
            if not weights[name].is_floating_point():
                raise ValueError(f"{name}: expected numbers with a point, got {weights[name].dtype}")
            if (shape := weights[name].shape) != parameter.shape:
                raise ValueError(f"{name}: expected {list(parameter.shape)}, got {list(shape)}")
    except ValueError as error:
        raise ValueError(f"pretrained {folder}: {error}") from error
    trunk.load_state_dict(weights, assign=True)
    if dtype is not None and trunk.vocabulary is not None:
        trunk.vocabulary = trunk.vocabulary.to(dtype)
    return trunk.to(dtype=dtype).eval()


def shape_of(source: str) -> TrunkConfig:
    """The shape of the trunk that `load` gives, without reading its weights.

    Raises:
        ValueError: as `load`.
    """
    folder = folder_of(source)
    try:
        return _config(_settings(folder))
    except ValueError as error:
        raise ValueError(f"pretrained {folder}: {error}") from error


def family_name(source: str) -> str:
    """What the classes of transformers begin with that have such a checkpoint; of an engine of ours 'Trunkline'."""
    settings = _settings(folder_of(source))
    return "Trunkline" if "trunk" in settings else family_of(settings).name


def digest(source: str) -> str:
    """SHA-256 of the weights and settings of a checkpoint, wherever it lies."""
    folder, state = folder_of(source), sha256()
    for path in (_settings_file(folder), *_weight_files(folder)):
        with path.open("rb") as content:
            state.update(file_digest(content, "sha256").digest())
    return state.hexdigest()


def to_hugging_face(trunk: Trunk, vocabulary: Tensor | None = None) -> "PreTrainedModel":
    """See `Trunk.to_hugging_face`."""
    import transformers

    settings, tensors = _to_hugging_face(trunk, vocabulary)
    (name, *_), family = settings["architectures"], family_of(settings)
    kind = getattr(transformers, name, None) if name.startswith(family.name) else None
    if kind is None:
        raise ValueError(f"pretrained: transformers has no {family.name} model '{name}', which config.json names")
    config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    pooled = any("pooler" in tensor for tensor in tensors)
    options = {"add_pooling_layer": pooled} if family.poolers and name == f"{family.name}Model" else {}
    weight = trunk.tokens.weight
    model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=weight.dtype, **options)
    return model.to(weight.device)


def save(trunk: Trunk, folder: Path, vocabulary: Tensor | None = None) -> Path:
    """See `Trunk.save_pretrained`."""
    return write(folder, *_to_hugging_face(trunk, vocabulary))


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, {"format": "pt"})
    partial.replace(folder / WEIGHTS)  # tensors that were loaded may still lie in a file of that name
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def _from_hugging_face(
    trunk: Trunk, settings: dict[str, Any], tensors: dict[str, Tensor], blocks_later: bool
) -> dict[str, Tensor]:
    """The trunk's weights; what is left of `tensors` goes to its origin."""
    family = family_of(settings)
    tensors = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in tensors.items()  # BERT's first checkpoints come from TensorFlow
    }
    prefix = family.prefix if any(name.startswith(family.prefix) for name in tensors) else ""
    names = {name: family.sources(name, settings, prefix) for name in trunk.state_dict()}
    if missing := [source for sources in names.values() for source in sources if source not in tensors]:
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing[:4])} ...")
    weights = {}
    for name, sources in names.items():
        if whole := [source for source in sources if not tensors[source].is_floating_point()]:
            raise ValueError(f"{whole[0]}: expected numbers with a point, got {tensors[whole[0]].dtype}")
        try:
            parts, transposed = [tensors.pop(source) for source in sources], family.transposed(name)
            if transposed and parts[0].ndim != 2:
                raise ValueError(f"{', '.join(sources)}: expected a matrix, got {list(parts[0].shape)}")
            weights[name] = _joined(trunk, name, parts, transposed, blocks_later)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{', '.join(sources)} do not fit together: {str(error).splitlines()[0]}") from error
    inside = tuple(f"{prefix}{module}." for module in {sources[0].split(".")[0] for sources in family.tensors.values()})
    if unknown := [
        name
        for name in tensors
        if name.startswith(inside) and not re.fullmatch(family.unused, name.removeprefix(prefix))
    ]:
        raise ValueError(f"{len(unknown)} tensors have no place in a trunk: {', '.join(unknown[:4])} ...")
    output = tensors.pop(family.output, None)
    if not trunk.config.tie_vocabulary:
        trunk.vocabulary = output
    elif output is not None and not torch.equal(output, weights["tokens.weight"]):
        raise ValueError(f"{family.output} differs from the embedding, which config.json says it is tied to")
    trunk.origin = Origin(settings, prefix, tensors)
    trunk.vocabulary_bias = tensors[family.output_biases[0]].clone() if trunk.config.vocabulary_bias else None
    trunk.pooler = _pooler(family, prefix, tensors, trunk.config.hidden_size)
    return weights


def _joined(trunk: Trunk, name: str, parts: list[Tensor], transposed: bool, blocks_later: bool) -> Tensor:
    """A weight of what lies in a file that is mapped, one below the other: a copy, or for later its shape."""

    def join(parts: list[Tensor]) -> Tensor:
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        return weight.T if transposed else weight

    if blocks_later and name.startswith("blocks."):
        trunk.waiting[name] = partial(join, parts)  # of one part a view of the file: a slice is read alone
        return join([part.to("meta") for part in parts]).contiguous()
    weight = join(parts)
    return weight.contiguous() if len(parts) > 1 else weight.clone(memory_format=torch.contiguous_format)


def _pooler(family: Family, prefix: str, tensors: dict[str, Tensor], width: int) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a checkpoint's pooler."""
    for layer in (place + name for name in family.poolers for place in {prefix, ""}):
        if f"{layer}.weight" in tensors:
            return tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
    return (0.02 * torch.randn(width, width), torch.zeros(width)) if family.new_pooler else None


def _to_hugging_face(trunk: Trunk, vocabulary: Tensor | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a checkpoint with this trunk; none of them shares memory with it."""
    config, origin = trunk.config, trunk.origin
    if vocabulary is not None and config.tie_vocabulary:
        raise ValueError("pretrained: this trunk's vocabulary is tied to its embedding: it takes no other")
    vocabulary = trunk.vocabulary if vocabulary is None else vocabulary
    if origin is None:
        settings = settings_of(config, matching_family(config))
        family = family_of(settings)
        headed = family.causal_model and (config.tie_vocabulary or vocabulary is not None)
        headed = headed and config.last_layer == bool(family.last)
        settings["architectures"] = [family.causal_model if headed else f"{family.name}Model"]
        others_business = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the tokenizer's
        settings = {**others_business, **settings}
        prefix, others = family.prefix if headed else "", {}
    else:
        family, prefix = family_of(origin.settings), origin.prefix
        model_type = origin.settings["model_type"]
        before = settings_of(trunk_config(origin.settings), model_type)
        changed = {key: x for key, x in settings_of(config, model_type).items() if x != before[key]}
        settings = {**origin.settings, **changed}
        settings.setdefault("architectures", [f"{family.name}Model"])
        others = dict(origin.others)
        for name in others.keys() & set(family.output_biases):
            others[name] = F.pad(others[name], (0, config.vocab_size - len(others[name])))
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = str(trunk.tokens.weight.dtype)[len("torch.") :]
    tensors = {name: tensor.clone() for name, tensor in others.items()}
    tensors |= trunk_tensors(trunk, family, settings, prefix)
    if vocabulary is not None:
        tensors[family.output] = vocabulary.detach().clone()
    return settings, tensors


def trunk_tensors(trunk: Trunk, family: Family, settings: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Copies of a trunk's parameters under the names that a model of this family and these settings has for them."""
    tensors = {}
    for name, weight in trunk.state_dict().items():
        sources = family.sources(name, settings, prefix)
        for source, part in zip(sources, parts_of(trunk.config, name, weight, len(sources)), strict=True):
            tensors[source] = (
                part.T.clone(memory_format=torch.contiguous_format) if family.transposed(name) else part.clone()
            )
    return tensors


def parts_of(config: TrunkConfig, name: str, weight: Tensor, count: int) -> tuple[Tensor, ...]:
    """A parameter, or the queries, keys and values, or gate and value, that are one in the trunk."""
    if count == 1:
        return (weight,)
    if ".qkv." in name:
        return weight.split([heads * config.head_width for heads in (config.num_heads, *[config.kv_heads] * 2)])
    return weight.chunk(count)


def folder_of(source: str) -> Path:
    """Where the files of a checkpoint are: here, or in the hub's cache, which may take a download."""
    folder = Path(source).expanduser()
    if (folder / "model" / SETTINGS).is_file():
        return folder / "model"  # of a finished run
    if folder.is_dir():
        return folder
    here = f"a local folder with {CONFIG} and {WEIGHTS} serves as well"
    try:
        from huggingface_hub import snapshot_download

        wanted = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors", "tokenizer.json"]
        return Path(snapshot_download(source, allow_patterns=wanted))
    except ImportError as error:
        raise ValueError(
            f"pretrained {str(source)!r} is no folder, and the hub needs trunkline[hub], which is not installed; {here}"
        ) from error
    except (OSError, ValueError) as error:  # offline, unknown, gated; no hub id at all
        raise ValueError(
            f"pretrained {str(source)!r} is no folder, and not to be had from the hub: {error}; {here}"
        ) from error


def _settings_file(folder: Path) -> Path:
    for name in (SETTINGS, CONFIG):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"pretrained {folder}: neither {CONFIG}, of a checkpoint, nor {SETTINGS}, of a finished run")


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(_settings_file(folder))


def _config(settings: dict[str, Any]) -> TrunkConfig:
    if "trunk" not in settings:
        return trunk_config(settings)
    if not isinstance(settings["trunk"], dict):
        raise ValueError(f"trunk: expected keys and values, got {short(settings['trunk'])}")
    return made(TrunkConfig, settings["trunk"], "trunk")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [_inside(folder, name) for name in sorted(set(_weight_map(folder).values()))]
    pickled = [path.name for path in sorted(folder.glob("*.bin"))]
    told = (
        f"; {', '.join(pickled)} would have to be unpickled, which can run any code: save it as safetensors"
        if pickled
        else ""
    )
    raise ValueError(f"pretrained {folder}: neither {WEIGHTS} nor {INDEX}{told}")


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"pretrained: {path} is missing or damaged: {error}") from error
    if (folder / INDEX).is_file() and (lost := sorted(_weight_map(folder).keys() - tensors.keys())):
        raise ValueError(f"pretrained {folder}: {INDEX} lists {', '.join(lost[:4])}, which its files lack")
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """Names of tensors -> names of files."""
    given = read_json(folder / INDEX).get("weight_map")
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()) or not given:
        raise ValueError(f"pretrained {folder}: {INDEX} has no weight_map from tensors to files")
    return given


def _inside(folder: Path, name: str) -> Path:
    """A file that is named in a folder, which it must be in; no device or pipe, which may never end."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(
            f"pretrained {folder}: {INDEX} names {short(name)}, which is no .safetensors file in its folder"
        )
    if not (folder / name).is_file():
        raise ValueError(f"pretrained: {folder / name} is missing or damaged: {INDEX} names it, but it is no file")
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object; names the file.
    """
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, far more than settings take")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # the former also where it is not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {short(content)}")
    return content
