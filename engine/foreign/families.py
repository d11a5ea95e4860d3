"""How Hugging Face's model families tell the shape of a trunk, and what they call its tensors.

One table a family, read from left to right to load a checkpoint and from right to left to save one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from trunkline.engine.network.trunk import TrunkConfig


@dataclass(frozen=True)
class Family:
    """How one kind of checkpoint tells what a trunk is."""

    name: str
    """What its classes begin with."""
    causal_model: str
    """The class with a vocabulary head; empty: none of use to a trunk."""
    prefix: str
    """Of the trunk's tensors in a model with a head."""
    output: str
    """The tensor that predicts tokens, (V, D)."""
    fields: Mapping[str, tuple[str, Any]]
    """Field of `TrunkConfig` -> key of config.json and the default where it lacks."""
    activations: Mapping[str, str]
    """Value of the key for the activation -> ours."""
    tensors: Mapping[str, tuple[str, ...]]
    """Module of the trunk -> modules whose tensors, one after another, are its; * is the layer."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrunkConfig` that no checkpoint of the family has otherwise."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Key of config.json -> its default, the only value that the trunk covers."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Key of config.json -> its value for a trunk of ours, where that is not its default."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Key of config.json -> the key that it agrees with for a trunk of ours."""
    output_biases: tuple[str, ...] = ()
    """Tensors of a head with an element for each entry of the vocabulary."""
    unused: str = "$^"
    """Tensors inside the trunk's modules that are no weights: masks and tables that older releases saved."""
    inputs_first: bool = False
    """Weights of linear layers are (in, out)."""

    def sources(self, parameter: str) -> list[str]:
        """The tensors that make up a parameter of the trunk."""
        module, _, kind = parameter.rpartition(".")
        layer = "".join(filter(str.isdigit, module))
        return [f"{source.replace('*', layer)}.{kind}" for source in self.tensors[re.sub(r"\d+", "*", module)]]

    def transposed(self, parameter: str) -> bool:
        return self.inputs_first and parameter.endswith(("qkv.weight", "_out.weight", "mlp_in.weight"))


_DECODER = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "intermediate_size": ("intermediate_size", 11008),
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "activation": ("hidden_act", "silu"),
    "tie_vocabulary": ("tie_word_embeddings", False),
}
_GATED = {"positions": "rotary", "norm": "rms", "bias": False}
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_DECODER_TENSORS = {
    "tokens": ("embed_tokens",),
    "blocks.*.attention_norm": ("layers.*.input_layernorm",),
    "blocks.*.qkv": tuple(f"layers.*.self_attn.{x}_proj" for x in "qkv"),
    "blocks.*.query_norm": ("layers.*.self_attn.q_norm",),
    "blocks.*.key_norm": ("layers.*.self_attn.k_norm",),
    "blocks.*.attention_out": ("layers.*.self_attn.o_proj",),
    "blocks.*.mlp_norm": ("layers.*.post_attention_layernorm",),
    "blocks.*.mlp_in": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
    "blocks.*.mlp_out": ("layers.*.mlp.down_proj",),
    "final_norm": ("norm",),
}


def _decoder(name: str, fields: Mapping[str, tuple[str, Any]], **settings: Any) -> Family:
    """A family of the Llama kind: rotary positions, RMSNorm, a gated MLP."""
    return Family(
        name,
        f"{name}ForCausalLM",
        prefix="model.",
        output="lm_head.weight",
        fields={**_DECODER, **fields},
        activations={"silu": "swiglu", "swish": "swiglu"},
        tensors=_DECODER_TENSORS,
        unused=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        **settings,
    )


_QWEN = {"vocab_size": ("vocab_size", 151936), "intermediate_size": ("intermediate_size", 22016)}
_QWEN |= {"num_kv_heads": ("num_key_value_heads", 32), "max_positions": ("max_position_embeddings", 32768)}
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2",
        "GPT2LMHeadModel",
        prefix="transformer.",
        output="lm_head.weight",
        fields={
            "vocab_size": ("vocab_size", 50257),
            "hidden_size": ("n_embd", 768),
            "num_layers": ("n_layer", 12),
            "num_heads": ("n_head", 12),
            "intermediate_size": ("n_inner", None),
            "max_positions": ("n_positions", 1024),
            "norm_eps": ("layer_norm_epsilon", 1e-5),
            "activation": ("activation_function", "gelu_new"),
            "dropout": ("resid_pdrop", 0.1),
            "tie_vocabulary": ("tie_word_embeddings", True),
        },
        activations=_GELU,
        tensors={
            "tokens": ("wte",),
            "positions": ("wpe",),
            "blocks.*.attention_norm": ("h.*.ln_1",),
            "blocks.*.qkv": ("h.*.attn.c_attn",),
            "blocks.*.attention_out": ("h.*.attn.c_proj",),
            "blocks.*.mlp_norm": ("h.*.ln_2",),
            "blocks.*.mlp_in": ("h.*.mlp.c_fc",),
            "blocks.*.mlp_out": ("h.*.mlp.c_proj",),
            "final_norm": ("ln_f",),
        },
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        written={"attn_pdrop": 0.0},
        copies={"embd_pdrop": "resid_pdrop"},
        unused=r"h\.\d+\.attn\.(masked_)?bias",
        inputs_first=True,
    ),
    "bert": Family(
        "Bert",
        "",
        prefix="bert.",
        output="cls.predictions.decoder.weight",
        fields={
            "vocab_size": ("vocab_size", 30522),
            "hidden_size": ("hidden_size", 768),
            "num_layers": ("num_hidden_layers", 12),
            "num_heads": ("num_attention_heads", 12),
            "intermediate_size": ("intermediate_size", 3072),
            "max_positions": ("max_position_embeddings", 512),
            "norm_eps": ("layer_norm_eps", 1e-12),
            "activation": ("hidden_act", "gelu"),
            "token_types": ("type_vocab_size", 2),
            "dropout": ("hidden_dropout_prob", 0.1),
            "tie_vocabulary": ("tie_word_embeddings", True),
        },
        activations=_GELU,
        tensors={
            "tokens": ("embeddings.word_embeddings",),
            "positions": ("embeddings.position_embeddings",),
            "token_types": ("embeddings.token_type_embeddings",),
            "embedding_norm": ("embeddings.LayerNorm",),
            "blocks.*.qkv": tuple(f"encoder.layer.*.attention.self.{x}" for x in ("query", "key", "value")),
            "blocks.*.attention_out": ("encoder.layer.*.attention.output.dense",),
            "blocks.*.attention_norm": ("encoder.layer.*.attention.output.LayerNorm",),
            "blocks.*.mlp_in": ("encoder.layer.*.intermediate.dense",),
            "blocks.*.mlp_out": ("encoder.layer.*.output.dense",),
            "blocks.*.mlp_norm": ("encoder.layer.*.output.LayerNorm",),
        },
        fixed={"norm_position": "post", "embedding_norm": True, "causal": False},
        only={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
        written={"attention_probs_dropout_prob": 0.0},
        output_biases=("cls.predictions.bias", "cls.predictions.decoder.bias"),
        unused=r"embeddings\.position_ids",
    ),
    "llama": _decoder(
        "Llama",
        {"bias": ("attention_bias", False)},
        fixed={"positions": "rotary", "norm": "rms"},
        copies={"mlp_bias": "attention_bias"},
    ),
    "qwen2": _decoder("Qwen2", _QWEN, fixed={**_GATED, "qkv_bias": True}),
    "qwen3": _decoder(
        "Qwen3",
        {**_QWEN, "head_dim": ("head_dim", 128)},
        fixed={**_GATED, "qk_norm": True},
        only={"attention_bias": False},
    ),
    "mistral": _decoder(
        "Mistral",
        {
            "num_kv_heads": ("num_key_value_heads", 8),
            "intermediate_size": ("intermediate_size", 14336),
            "max_positions": ("max_position_embeddings", 131072),
        },
        fixed=_GATED,
        written={"sliding_window": None},
    ),
}


def family_of(settings: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: it is none of these.
    """
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not covered; covered are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def trunk_config(settings: Mapping[str, Any]) -> TrunkConfig:
    """The trunk that a config.json describes.

    Raises:
        ValueError: another family, or an option that the trunk lacks; names all of them.
    """
    family = family_of(settings)
    if uncovered := "; ".join(_uncovered(family, settings)):
        raise ValueError(f"model_type '{settings['model_type']}' with options that are not covered: {uncovered}")
    values = {ours: settings.get(key, default) for ours, (key, default) in family.fields.items()}
    values["activation"] = family.activations[values["activation"]]
    if family.fixed.get("positions") == "rotary":
        rope = _rope(settings)
        values["rope_theta"] = float(rope["rope_theta"])
        if rope["rope_type"] != "default":
            values["rope_factor"] = float(rope["factor"])
        if rope["rope_type"] == "llama3":
            values["rope_low_frequency"] = float(rope["low_freq_factor"])
            values["rope_high_frequency"] = float(rope["high_freq_factor"])
            values["rope_original_positions"] = rope["original_max_position_embeddings"]
    return TrunkConfig(**family.fixed, **values)


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings as transformers 5 writes them, which has them in one place; older releases had two."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = settings.get("rope_theta", 10000.0)
    return {"rope_theta": theta, "rope_type": given.get("type", "default"), **given}


def _uncovered(family: Family, settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in {**family.only, "quantization_config": None}.items():
        if settings.get(key, value) != value:
            yield f"{key} {settings[key]!r}, other than {value!r}"
    key, default = family.fields["activation"]
    if (activation := settings.get(key, default)) not in family.activations:
        yield f"{key} {activation!r}, other than {', '.join(family.activations)}"
    if family.fixed.get("positions") != "rotary":
        return
    if settings.get("mlp_bias", False) != settings.get("attention_bias", False):
        yield "biases in attention or in the MLP alone (attention_bias, mlp_bias)"
    key, default = family.fields["max_positions"]
    always = family.name == "Mistral"  # elsewhere a switch turns the window on
    window = settings.get("sliding_window", 4096) if always or settings.get("use_sliding_window") else None
    kinds = set(settings.get("layer_types") or (["sliding_attention"] if window else []))
    if "sliding_attention" in kinds and window and window < settings.get(key, default):
        yield f"sliding_window {window}"
    if others := kinds - {"full_attention", "sliding_attention"}:
        yield f"layer_types {', '.join(sorted(others))}"
    rope = _rope(settings)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        yield f"rope_type {rope['rope_type']!r}, other than default, linear, llama3"
    if (part := rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))) != 1:
        yield f"partial_rotary_factor {part}"


def settings_of(config: TrunkConfig, model_type: str) -> dict[str, Any]:
    """What config.json says of a trunk that has the shape of this family."""
    family, whole = FAMILIES[model_type], _in_full(config)
    made = {"model_type": model_type, **family.only, **family.written}
    made |= {key: getattr(whole, ours) for ours, (key, _) in family.fields.items()}
    theirs = {ours: theirs for theirs, ours in reversed(list(family.activations.items()))}
    made[family.fields["activation"][0]] = theirs.get(config.activation, config.activation)
    made |= {key: made[other] for key, other in family.copies.items()}
    if family.fixed.get("positions") == "rotary":
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
