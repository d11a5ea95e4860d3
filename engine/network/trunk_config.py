"""The shape of a trunk: one config covers those of GPT-2, Llama / Qwen and BERT."""

from dataclasses import dataclass
from typing import Any, Literal

from trunkline.engine.checks import above, at_least, check, from_to_below

_WIDTH = at_least(1, 2**20)
_RANGES = {
    "vocab_size": at_least(1, 2**24),
    **dict.fromkeys(("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"), _WIDTH),
    "num_layers": at_least(1, 4096),
    "max_positions": at_least(1, 2**24),
    "rope_theta": above(0),
    "rope_factor": above(0),
    "rope_low_frequency": above(0),
    "rope_high_frequency": above(0),
    "rope_original_positions": at_least(0),
    "rope_theta_local": at_least(0),
    **dict.fromkeys(("window", "position_offset"), at_least(0)),
    "global_every": at_least(1),
    "norm_eps": at_least(0, 1),
    "token_types": at_least(0, 2**20),
    "dropout": from_to_below(0, 1),
}


@dataclass(frozen=True)
class TrunkConfig:
    """Shape of a trunk.

    Raises:
        ValueError: the fields contradict one another.
    """

    vocab_size: int = 8192
    """Entries of the vocabulary; a run sets it from its tokenizer."""
    hidden_size: int = 256
    """D, the width of the residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """H, query heads."""
    num_kv_heads: int | None = None
    """G, key/value heads; None: as many as query heads."""
    head_dim: int | None = None
    """E, width of a head; None: hidden_size / num_heads."""
    intermediate_size: int | None = None
    """Width inside the MLP; None: 4 x hidden_size."""
    max_positions: int = 1024
    """Longest sequence, in tokens."""
    positions: Literal["learned", "rotary"] = "learned"
    """Where a token's place comes from: a learned vector added to the input, or a rotation of queries and keys."""
    position_offset: int = 0
    """Rows of the table of learned positions before that of the first token (RoBERTa 2)."""
    window: int = 0
    """Local layers see so many tokens before and, without `causal`, after their own; 0: no layer is local."""
    global_every: int = 3
    """With a window, layers 0, n, 2 n ... see the whole sequence, and those between are local (ModernBERT)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_theta_local: float | None = None
    """The same of local layers; None: as `rope_theta`."""
    rope_factor: float = 1.0
    """Makes long rotary wavelengths this much longer: those that fit less than `rope_low_frequency` times into
    `rope_original_positions` wholly, more than `rope_high_frequency` times not at all, others partly (Llama 3)."""
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_positions: int = 0
    """Longest sequence before `rope_factor`; 0: it applies to all wavelengths alike (linear scaling)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    norm_bias: bool = True
    """Biases on LayerNorms."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)), with one more norm at the end (GPT-2, Llama). post: norm(x + f(x)) (BERT)."""
    embedding_norm: bool = False
    """A norm right after the embeddings (BERT)."""
    first_norm: bool = True
    """A norm before the attention of the first block, too; ModernBERT's embeddings have one already."""
    last_layer: bool = False
    """gelu(x W) and one more norm after the last (ModernBERT's models with a head)."""
    activation: Literal["gelu", "gelu_tanh", "swiglu", "geglu"] = "gelu"
    """Of the MLP; gelu_tanh is GPT-2's approximation, swiglu and geglu gate (Llama, ModernBERT)."""
    bias: bool = True
    """Biases on all linear layers."""
    qkv_bias: bool | None = None
    """Biases on the query, key and value projections; None: as `bias`."""
    qk_norm: bool = False
    """RMSNorm on every head's queries and keys (Qwen3)."""
    causal: bool = True
    """A token sees what stands before it (decoder) or everything (encoder)."""
    token_types: int = 0
    """Segment embeddings: which text of a pair a token is of (BERT)."""
    dropout: float = 0.0
    """Probability of zeroing the embeddings' and each sublayer's output in training."""
    exact_match: bool = False
    """A learned vector marks every token that occurred before in its sequence. What two texts share is then to be seen
    in the input, and need not be found by comparing all tokens, which takes far more text than most tasks have (after
    DrQA's feature, arXiv:1704.00051)."""
    tie_vocabulary: bool = True
    """The vocabulary head uses the embedding matrix."""
    vocabulary_bias: bool = False
    """The vocabulary head has a bias, which a checkpoint brings and training leaves alone (ModernBERT)."""

    def __post_init__(self):
        check(self, "trunk.", **_RANGES)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"trunk: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"trunk: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"trunk: rotary positions need an even head width, got {self.head_width}")
        if not self.rope_low_frequency < self.rope_high_frequency:
            raise ValueError(
                f"trunk: rope_low_frequency {self.rope_low_frequency} must be below "
                f"rope_high_frequency {self.rope_high_frequency}"
            )

    def window_of(self, layer: int) -> tuple[int, int] | None:
        """How many tokens before and after its own a token of this layer sees; None: all there are."""
        if not self.window or layer % self.global_every == 0:
            return None
        return self.window, 0 if self.causal else self.window

    @property
    def gates(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size


_GPT2 = {"vocab_size": 50257, "max_positions": 1024, "activation": "gelu_tanh"}
PRESETS: dict[str, dict] = {
    "tiny": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "max_positions": 1024, "positions": "rotary"},
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, **_GPT2},
    "medium": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, **_GPT2},
    "bert-base": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "max_positions": 512,
        "norm_position": "post",
        "norm_eps": 1e-12,
        "embedding_norm": True,
        "causal": False,
        "token_types": 2,
    },
}


def preset(name: str, **changes: Any) -> TrunkConfig:
    """The config of a preset, with some of its fields changed."""
    if name not in PRESETS:
        raise ValueError(f"trunk: unknown preset '{name}'; there are {', '.join(PRESETS)}")
    return TrunkConfig(**{**PRESETS[name], **changes})
