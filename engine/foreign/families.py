"""How Hugging Face's model families tell the shape of a trunk, and what they call its tensors.

One table a family, read from left to right to load a checkpoint and from right to left to save one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trunkline.engine.checks import short


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
    poolers: tuple[str, ...] = ()
    """Layers any of which is a pooler: its place inside the trunk, or outside of it in a model with a head."""
    new_pooler: bool = False
    """Its classifiers make a pooler of their own where a checkpoint has none."""
    inputs_first: bool = False
    """Weights of linear layers are (in, out)."""
    offset: bool = False
    """Its positions begin after pad_token_id, RoBERTa's kind."""
    local: int | None = None
    """Its layers are local between some that are not, ModernBERT's kind: a token sees this much less than half of
    local_attention. None: no layer is."""
    last: Mapping[str, str] = field(default_factory=dict)
    """What a class's name ends with -> the module outside of the trunk that is its last layer and norm."""

    def sources(self, parameter: str, settings: Mapping[str, Any], prefix: str = "") -> list[str]:
        """The tensors that make up a parameter of the trunk, in a model of these settings."""
        module, _, kind = parameter.rpartition(".")
        if module in ("last_layer", "last_norm"):
            return [f"{self.last_module(settings)}.{'dense' if module == 'last_layer' else 'norm'}.{kind}"]
        layer = "".join(filter(str.isdigit, module))
        sources = self.tensors[re.sub(r"\d+", "*", module)]
        return [f"{prefix}{source.replace('*', layer)}.{kind}" for source in sources]

    def last_module(self, settings: Mapping[str, Any]) -> str:
        """The module that is the trunk's last layer and norm; empty: there is none."""
        (name, *_) = settings.get("architectures") or [""]
        return next((module for ending, module in self.last.items() if name.endswith(ending)), "")

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


_BERT = {
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
}
_BERT_TENSORS = {
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
}
_ENCODER: dict[str, Any] = {
    "causal_model": "",
    "activations": _GELU,
    "tensors": _BERT_TENSORS,
    "fixed": {"norm_position": "post", "embedding_norm": True, "causal": False},
    "only": {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    "written": {"attention_probs_dropout_prob": 0.0},
}
_MODERN = {
    "vocab_size": ("vocab_size", 50368),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 22),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 1152),
    "max_positions": ("max_position_embeddings", 8192),
    "norm_eps": ("norm_eps", 1e-5),
    "norm_bias": ("norm_bias", False),
    "bias": ("attention_bias", False),
    "activation": ("hidden_activation", "gelu"),
    "dropout": ("mlp_dropout", 0.0),
    "tie_vocabulary": ("tie_word_embeddings", True),
}
_MODERN_FIXED = {"positions": "rotary", "embedding_norm": True, "first_norm": False}
_MODERN_TENSORS = {
    "tokens": ("embeddings.tok_embeddings",),
    "embedding_norm": ("embeddings.norm",),
    "blocks.*.attention_norm": ("layers.*.attn_norm",),
    "blocks.*.attention_out": ("layers.*.attn.Wo",),
    "blocks.*.mlp_norm": ("layers.*.mlp_norm",),
    "blocks.*.mlp_in": ("layers.*.mlp.Wi",),
    "blocks.*.mlp_out": ("layers.*.mlp.Wo",),
    "final_norm": ("final_norm",),
}


def _roberta(name: str, vocab_size: int) -> Family:
    """A family of the RoBERTa kind: BERT's shape, with positions that begin after that of padding."""
    return Family(
        name,
        prefix="roberta.",
        output="lm_head.decoder.weight",
        fields={**_BERT, "vocab_size": ("vocab_size", vocab_size)},
        output_biases=("lm_head.bias", "lm_head.decoder.bias"),
        unused=r"embeddings\.(position_ids|token_type_ids)",
        poolers=("pooler.dense", "classifier.dense"),
        new_pooler=True,
        offset=True,
        **_ENCODER,
    )


def _modernbert(name: str, qkv: tuple[str, ...], **settings: Any) -> Family:
    """ModernBERT and Ettin: rotary positions, a gated MLP, two local layers between those that are not."""
    return Family(
        name,
        prefix="model.",
        output="decoder.weight",
        fields=_MODERN,
        activations={"gelu": "geglu", "silu": "swiglu"},
        tensors={**_MODERN_TENSORS, "blocks.*.qkv": tuple(f"layers.*.attn.{x}" for x in qkv)},
        only={"classifier_activation": "gelu", "classifier_bias": False},
        copies={"mlp_bias": "attention_bias", "embedding_dropout": "mlp_dropout"},
        output_biases=("decoder.bias",),
        **settings,
    )


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
        prefix="bert.",
        output="cls.predictions.decoder.weight",
        fields=_BERT,
        poolers=("pooler.dense",),
        output_biases=("cls.predictions.bias", "cls.predictions.decoder.bias"),
        unused=r"embeddings\.position_ids",
        **_ENCODER,
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
    "roberta": _roberta("Roberta", 50265),
    "xlm-roberta": _roberta("XLMRoberta", 30522),
    "camembert": _roberta("Camembert", 30522),
    "modernbert": _modernbert(
        "ModernBert",
        ("Wqkv",),
        causal_model="",
        fixed={**_MODERN_FIXED, "causal": False},
        local=0,
        written={"cls_token_id": None, "sep_token_id": None},
        last={"MaskedLM": "head", "Classification": "head", "Answering": "head", "MultipleChoice": "head"},
    ),
    "modernbert-decoder": _modernbert(
        "ModernBertDecoder",
        ("q_proj", "k_proj", "v_proj"),
        causal_model="ModernBertDecoderForCausalLM",
        fixed=_MODERN_FIXED,
        local=1,
        written={"decoder_bias": False, "pad_token_id": 0, "bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
        last={"CausalLM": "lm_head", "Classification": "head"},
    ),
}


def family_of(settings: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: it is none of these.
    """
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {short(kind)} is not covered; covered are {', '.join(FAMILIES)}. trunkline.patch(model) puts "
            "our attention into any other model of transformers, which then trains in a loop of its own"
        )
    return FAMILIES[kind]
