"""The trunk that a config.json describes, and the config.json that describes a trunk; the tables are in families.py."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from types import NoneType
from typing import Any

from trunkline.engine.checks import LONGEST, raise_all, short
from trunkline.engine.foreign.families import FAMILIES, Family, family_of
from trunkline.engine.network.trunk import TrunkConfig


def trunk_config(settings: Mapping[str, Any]) -> TrunkConfig:
    """The trunk that a config.json describes.

    Raises:
        ValueError: another family, or an option that the trunk lacks; names all of them.
    """
    family = family_of(settings)
    raise_all(list(_mistyped(family, settings)))
    if uncovered := "; ".join(_uncovered(family, settings)):
        raise ValueError(f"model_type '{settings['model_type']}' with options that are not covered: {uncovered}")
    values = {ours: settings.get(key, default) for ours, (key, default) in family.fields.items()}
    values["activation"] = family.activations[values["activation"]]
    if family.offset:
        values["position_offset"] = settings.get("pad_token_id", 1) + 1
        values["max_positions"] -= values["position_offset"]
    if family.local is not None:
        kinds = _kinds(settings, family)
        values["window"] = settings.get("local_attention", 128) // 2 - family.local if _LOCAL in kinds else 0
        values["global_every"] = _global_every(kinds)
        values["rope_theta_local"] = float(_rope(settings, _LOCAL)["rope_theta"])
        values["last_layer"] = bool(family.last_module(settings))
        writes = (settings.get("architectures") or [""])[0].endswith(("MaskedLM", "CausalLM"))
        values["vocabulary_bias"] = writes and settings.get("decoder_bias", True)
    if family.fixed.get("positions") == "rotary":
        rope = _rope(settings, "full_attention" if family.local is not None else "")
        values["rope_theta"] = float(rope["rope_theta"])
        if rope["rope_type"] != "default":
            values["rope_factor"] = float(rope["factor"])
        if rope["rope_type"] == "llama3":
            values["rope_low_frequency"] = float(rope["low_freq_factor"])
            values["rope_high_frequency"] = float(rope["high_freq_factor"])
            positions = rope.get("original_max_position_embeddings", values["max_positions"])  # as transformers does
            values["rope_original_positions"] = positions
    return TrunkConfig(**family.fixed, **values)


_NUMBER, _OBJECT = (int, float), (dict, NoneType)
_KINDS: dict[str, tuple[type, ...]] = {  # keys of config.json that decide what a trunk is, besides a family's fields
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), _NUMBER),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), (bool, NoneType)),
    "sliding_window": (int, NoneType),
    "layer_types": (list, NoneType),
    **dict.fromkeys(("global_rope_theta", "local_rope_theta"), _NUMBER),
    **dict.fromkeys(("global_attn_every_n_layers", "local_attention"), (int,)),
    "decoder_bias": (bool,),
    "architectures": (list, NoneType),
}
_ROPE_KINDS = {
    **dict.fromkeys(("rope_type", "type"), (str,)),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"), _NUMBER),
    "original_max_position_embeddings": (int,),
}


def _mistyped(family: Family, settings: Mapping[str, Any]) -> Iterator[str]:
    """Values that are not what their keys are for: what is read from outside may hold anything."""
    wholes = {field.name for field in fields(TrunkConfig) if field.type in (int, int | None)}
    optional = {field.name for field in fields(TrunkConfig) if field.default is None}
    kinds = {**_KINDS, "pad_token_id": (int,) if family.offset else (int, NoneType)}
    for ours, (key, default) in family.fields.items():
        kinds[key] = (int,) if ours in wholes else _NUMBER if isinstance(default, float) else (type(default),)
        kinds[key] += (NoneType,) if ours in optional else ()
    given = [(key, settings[key], kind) for key, kind in kinds.items() if key in settings]
    ropes = [settings.get("rope_parameters") or settings.get("rope_scaling")]
    if family.local is not None and isinstance(ropes[0], dict):  # a rotation for every kind of layer
        ropes = list(ropes[0].values())
        given += [("rope_parameters", rope, _OBJECT) for rope in ropes]
    for rope in ropes:
        if isinstance(rope, dict):
            given += [(f"rope {key}", rope[key], kind) for key, kind in _ROPE_KINDS.items() if key in rope]
    for key, value, kind in given:
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            wanted = " or ".join({"NoneType": "null", "str": "text"}.get(one.__name__, one.__name__) for one in kind)
            yield f"{key}: expected {wanted}, got {short(value)}"
    for key in ("layer_types", "architectures"):
        names = settings.get(key)
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            yield f"{key}: expected texts, got {short(names)}"


_LOCAL = "sliding_attention"
_THETAS = {"full_attention": ("global_rope_theta", 160000.0), _LOCAL: ("local_rope_theta", 10000.0)}


def _rope(settings: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """The rotary settings as transformers 5 writes them, which has them in one place; older releases had two.

    `kind`: of layers that have settings of their own.
    """
    key, default = _THETAS.get(kind, ("rope_theta", 10000.0))
    given = settings.get("rope_parameters") or {}
    given = (given.get(kind) if kind else given) or settings.get("rope_scaling") or {}
    return {"rope_theta": settings.get(key, default), "rope_type": given.get("type", "default"), **given}


def _kinds(settings: Mapping[str, Any], family: Family) -> list[str]:
    """The kind of every layer, ModernBERT's."""
    layers, every = settings.get(*family.fields["num_layers"]), settings.get("global_attn_every_n_layers", 3)
    return settings.get("layer_types") or _layer_types(layers, every)


def _layer_types(layers: int, global_every: int) -> list[str]:
    return [_LOCAL if layer % global_every else "full_attention" for layer in range(layers)]


def _global_every(kinds: list[str]) -> int:
    """How far the layers that are not local lie apart."""
    return next((layer for layer in range(1, len(kinds)) if kinds[layer] != _LOCAL), len(kinds))


def _uncovered(family: Family, settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in {**family.only, "quantization_config": None}.items():
        if settings.get(key, value) != value:
            yield f"{key} {short(settings[key])}, other than {value!r}"
    key, default = family.fields["activation"]
    if (activation := settings.get(key, default)) not in family.activations:
        yield f"{key} {short(activation)}, other than {', '.join(family.activations)}"
    if family.fixed.get("positions") != "rotary":
        return
    if settings.get("mlp_bias", False) != settings.get("attention_bias", False):
        yield "biases in attention or in the MLP alone (attention_bias, mlp_bias)"
    if family.local is not None:
        yield from _uncovered_layers(_kinds(settings, family), settings)
        return
    key, default = family.fields["max_positions"]
    always = family.name == "Mistral"  # elsewhere a switch turns the window on
    window = settings.get("sliding_window", 4096) if always or settings.get("use_sliding_window") else None
    kinds = set(settings.get("layer_types") or (["sliding_attention"] if window else []))
    if "sliding_attention" in kinds and window and window < settings.get(key, default):
        yield f"sliding_window {window}"
    if others := kinds - {"full_attention", "sliding_attention"}:
        yield f"layer_types {', '.join(sorted(others))[:LONGEST]}"
    rope = _rope(settings)
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if missing := [key for key in needed.get(rope["rope_type"], ()) if key not in rope]:
        yield f"rope_type {rope['rope_type']!r} without {', '.join(missing)}"
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        yield f"rope_type {short(rope['rope_type'])}, other than default, linear, llama3"
    if (part := rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))) != 1:
        yield f"partial_rotary_factor {part}"


def _uncovered_layers(kinds: list[str], settings: Mapping[str, Any]) -> Iterator[str]:
    if kinds != _layer_types(len(kinds), _global_every(kinds)):
        yield f"layer_types {', '.join(kinds)[:LONGEST]}, other than local ones between some that are evenly apart"
    for kind in _THETAS:
        if (rope_type := _rope(settings, kind)["rope_type"]) != "default":
            yield f"rope_type {short(rope_type)} of {kind}, other than default"


def settings_of(config: TrunkConfig, model_type: str) -> dict[str, Any]:
    """What config.json says of a trunk that has the shape of this family."""
    family, whole = FAMILIES[model_type], _in_full(config)
    made = {"model_type": model_type, **family.only, **family.written}
    made |= {key: getattr(whole, ours) for ours, (key, _) in family.fields.items()}
    theirs = {ours: theirs for theirs, ours in reversed(list(family.activations.items()))}
    made[family.fields["activation"][0]] = theirs.get(config.activation, config.activation)
    made |= {key: made[other] for key, other in family.copies.items()}
    if family.offset:
        made["max_position_embeddings"] += config.position_offset
        made["pad_token_id"] = config.position_offset - 1
    if family.local is not None:
        made["layer_types"] = _layer_types(config.num_layers, config.global_every if config.window else 1)
        made["local_attention"] = 2 * (config.window + family.local)
        thetas = {"full_attention": config.rope_theta, _LOCAL: config.rope_theta_local or config.rope_theta}
        made["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        }
    elif family.fixed.get("positions") == "rotary":
        rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
        if config.rope_factor != 1:
            rope |= {"rope_type": "linear", "factor": config.rope_factor}
        if config.rope_factor != 1 and config.rope_original_positions:
            rope |= {"rope_type": "llama3", "original_max_position_embeddings": config.rope_original_positions}
            rope |= {"low_freq_factor": config.rope_low_frequency, "high_freq_factor": config.rope_high_frequency}
        made["rope_parameters"] = rope
    return made


def matching_family(config: TrunkConfig) -> str:
    """The model_type whose checkpoints can have this shape.

    Raises:
        ValueError: there is none; says what the nearest one lacks.
    """
    lacking = {model_type: list(_lacking(family, config)) for model_type, family in FAMILIES.items()}
    nearest = min(lacking, key=lambda model_type: len(lacking[model_type]))
    if lacking[nearest]:
        raise ValueError(
            f"none of {', '.join(FAMILIES)} has this trunk's shape; "
            f"the nearest, {nearest}, lacks {', '.join(lacking[nearest])}"
        )
    return nearest


def _lacking(family: Family, config: TrunkConfig) -> Iterator[str]:
    """The fields of a trunk that no config.json of the family can give."""
    whole = _in_full(config)
    plain = {**asdict(TrunkConfig()), "num_kv_heads": config.num_heads, "qkv_bias": config.bias}
    wanted = {**plain, "head_dim": config.hidden_size / config.num_heads, **family.fixed}
    for name in (f.name for f in fields(TrunkConfig)):
        value = getattr(whole, name)
        if name == "activation":
            covered = value in family.activations.values()
        elif name == "position_offset":
            covered = bool(value) == family.offset
        elif name == "last_layer":
            covered = not value or bool(family.last and family.causal_model)
        elif family.local is None and name in ("rope_theta_local", "global_every"):  # of no matter without a window
            covered = True
        elif name == "rope_factor":
            covered = family.local is None or value == 1
        elif name in ("window", "global_every", "rope_theta_local") and family.local is not None:
            covered = True
        else:  # without rotary positions, what they are like is of no matter
            covered = name in family.fields or name.startswith(("dropout", "rope_")) or value == wanted[name]
        if not covered:
            yield f"{name} {value!r}"


def _in_full(config: TrunkConfig) -> TrunkConfig:
    """With what its empty fields stand for."""
    return replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        intermediate_size=config.mlp_width,
        qkv_bias=config.bias if config.qkv_bias is None else config.qkv_bias,
    )
