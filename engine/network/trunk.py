"""The shared trunk: a transformer over a packed stream of tokens.

One config covers the GPT-2, Llama / Qwen and BERT shapes. The trunk knows nothing of tasks; `attend`, a function
(layer, q, k, v, rows, whole) -> output of those rows, decides what a token sees: a packed batch in training, a
key/value cache in generation.

T tokens, D width, H query heads, G key/value heads, E head width, R rows asked for
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trunkline.engine.network.packing import PackPlan
from trunkline.engine.network.trunk_config import PRESETS as PRESETS
from trunkline.engine.network.trunk_config import TrunkConfig as TrunkConfig
from trunkline.engine.network.trunk_config import preset as preset
from trunkline.kernels.attention.attention import attention
from trunkline.kernels.products import Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trunkline.engine.foreign.pretrained import Origin

# `whole` is the tensor of which q, k and v are the heads, in this order; None where they are of several
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
# what adapters make of a linear layer: of its name, input, output, and of whether these are of the labelled rows alone
Adapt = Callable[[str, Tensor, Tensor, bool], Tensor]
Checkpointing = Literal["none", "block", "selective"]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as the config says: in float32, and out as it came in."""

    def __init__(self, config: TrunkConfig, width: int | None = None, kind: str | None = None):
        super().__init__()
        width, self.eps = width or config.hidden_size, config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        layer = (kind or config.norm) == "layer"
        self.bias = nn.Parameter(torch.zeros(width)) if layer and config.norm_bias else None
        self.is_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if self.is_layer:
            y = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)  # autocast makes it float32
        else:
            y = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return y.to(x.dtype)


def occurred_before(tokens: Tensor, positions: Tensor) -> Tensor:
    """(T,) bool: whether the same token stands before it in its sequence, which begins where the position is 0."""
    sequence = (positions == 0).cumsum(0)
    keys, order = (sequence * (tokens.max() + 1) + tokens).sort(stable=True)
    again = torch.cat([keys.new_zeros(1, dtype=torch.bool), keys[1:] == keys[:-1]])
    return torch.empty_like(again).index_copy_(0, order, again)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on (T, heads, E), the halves of a head as pairs; angles are cos and sin, (T, E / 2) each."""
    cos, sin = (part[:, None].to(x.dtype) for part in angles)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation, x / 2 * (1 + tanh u) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # the same in code that Inductor makes for CPUs, where a sigmoid takes half the time of a tanh
    return x * torch.sigmoid(x * math.sqrt(8 / math.pi) * (1 + 0.044715 * x * x))


class Block(nn.Module):
    """Attention and MLP with their residual connections.

    With `rows`, everything after the projection to queries, keys and values is computed for those tokens only: in the
    last block, where nothing but the labelled rows is used, that saves most of the block's arithmetic.
    """

    def __init__(self, config: TrunkConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, H, G, E = config.hidden_size, config.num_heads, config.kv_heads, config.head_width
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        gate = 2 if config.gates else 1
        self.attention_norm = Norm(config) if layer or config.first_norm else nn.Identity()
        self.qkv = Linear(D, (H + 2 * G) * E, bias=qkv_bias)  # queries, keys, values
        self.attention_out = Linear(H * E, D, bias=config.bias)
        self.mlp_norm = Norm(config)
        self.mlp_in = Linear(D, gate * config.mlp_width, bias=config.bias)  # gate, then value
        self.mlp_out = Linear(config.mlp_width, D, bias=config.bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, E, "rms"), Norm(config, E, "rms")
        self.dropout = nn.Dropout(config.dropout)

    def linear(self, name: str, x: Tensor, adapt: Adapt | None, on_rows: bool) -> Tensor:
        """One of the block's linear layers, with its adapters where there are any."""
        y = getattr(self, name)(x)
        return y if adapt is None else adapt(f"blocks.{self.layer}.{name}", x, y, on_rows)

    def attend(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        attend: Attend,
        rows: Tensor | None,
        adapt: Adapt | None,
    ) -> Tensor:
        H, G, E = self.config.num_heads, self.config.kv_heads, self.config.head_width
        qkv = self.linear("qkv", x, adapt, on_rows=False).unflatten(1, (H + 2 * G, E))
        if angles is None and not self.config.qk_norm:
            q, k, v = qkv.split([H, G, G], 1)
            return attend(self.layer, q, k, v, rows, qkv).flatten(1)
        qk, v = qkv.split([H + G, G], 1)
        if self.config.qk_norm:
            qk = torch.cat([self.query_norm(qk[:, :H]), self.key_norm(qk[:, H:])], 1).to(v.dtype)
        if angles is not None:
            qk = rotate(qk, angles)
        q, k = qk.split([H, G], 1)
        return attend(self.layer, q, k, v, rows, None).flatten(1)  # (T, H * E), or (R, H * E)

    def mlp(self, x: Tensor, adapt: Adapt | None, on_rows: bool) -> Tensor:
        hidden = self.linear("mlp_in", x, adapt, on_rows)
        if self.config.gates:
            gate, value = hidden.chunk(2, -1)
            hidden = (F.silu if self.config.activation == "swiglu" else F.gelu)(gate) * value
        else:
            hidden = gelu_tanh(hidden) if self.config.activation == "gelu_tanh" else F.gelu(hidden)
        return self.linear("mlp_out", hidden, adapt, on_rows)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        attend: Attend,
        rows: Tensor | None = None,
        adapt: Adapt | None = None,
    ) -> Tensor:
        pre, on_rows = self.config.norm_position == "pre", rows is not None
        attended = self.attend(self.attention_norm(x) if pre else x, angles, attend, rows, adapt)
        x = x if rows is None else x[rows]
        x = x + self.dropout(self.linear("attention_out", attended, adapt, on_rows))
        if pre:
            return x + self.dropout(self.mlp(self.mlp_norm(x), adapt, on_rows))
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.dropout(self.mlp(x, adapt, on_rows)))


class Trunk(nn.Module):
    """The shared feature extractor.

    Args:
        config: a `TrunkConfig`, or the name of a preset: 'tiny', 'small', 'medium', 'bert-base'.

    Raises:
        ValueError: an unknown preset.
    """

    checkpointing: Checkpointing = "none"  # what a block keeps for its backward pass
    vocabulary: Tensor | None  # (V, D) what a checkpoint predicts tokens with, where that is not the embedding
    vocabulary_bias: Tensor | None  # (V,) of a config that says there is one
    pooler: tuple[Tensor, Tensor] | None  # (D, D) and (D,) of tanh(x W^T + b), where a checkpoint has it
    origin: "Origin | None"  # what else the Hugging Face checkpoint held that this trunk comes from
    waiting: dict[str, Callable[[], Tensor]]  # how weights that are still on the meta device are read from their file

    def __init__(self, config: TrunkConfig | str = "tiny"):
        super().__init__()
        self.vocabulary = self.vocabulary_bias = self.pooler = self.origin = (
            None  # none is trained here: not among the parameters
        )
        self.waiting = {}
        self.config = config = preset(config) if isinstance(config, str) else config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions + config.position_offset, config.hidden_size)
        if config.token_types:
            self.token_types = nn.Embedding(config.token_types, config.hidden_size)
        if config.exact_match:
            self.match = nn.Parameter(0.02 * torch.randn(config.hidden_size))
        if config.embedding_norm:
            self.embedding_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout)
        blocks = [Block(config, layer) for layer in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        if config.norm_position == "pre":
            self.final_norm = Norm(config)
        if config.last_layer:
            self.last_layer, self.last_norm = (
                Linear(config.hidden_size, config.hidden_size, bias=False),
                Norm(config),
            )
        self.apply(_initialise)
        with torch.no_grad():  # GPT-2: the residual stream keeps its variance over the layers
            for block in blocks:
                for linear in (block.attention_out, block.mlp_out):
                    linear.weight.mul_((2 * config.num_layers) ** -0.5)

    def embed(
        self, tokens: Tensor, positions: Tensor, repeated: Tensor | None = None, types: Tensor | None = None
    ) -> Tensor:
        x = self.tokens(tokens)
        if self.config.positions == "learned":
            x = x + self.positions(positions + self.config.position_offset)
        if self.config.token_types:
            x = x + (self.token_types.weight[0] if types is None else self.token_types(types.int()))
        if self.config.exact_match:
            repeated = occurred_before(tokens, positions) if repeated is None else repeated
            x = x + repeated[:, None] * self.match
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream: in float32 it would be most of the traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.dropout(x)

    def angles(self, positions: Tensor, theta: float | None = None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of rotary positions, (T, E / 2) each; `theta`: None: `rope_theta`."""
        if self.config.positions == "learned":
            return None
        half = torch.arange(0, self.config.head_width, 2, device=positions.device, dtype=torch.float32)
        frequency = 1 / (theta or self.config.rope_theta) ** (
            half / self.config.head_width
        )  # rounded as Hugging Face does
        if (factor := self.config.rope_factor) != 1:
            fits = self.config.rope_original_positions * frequency / (2 * math.pi)  # times a wavelength does
            low, high = self.config.rope_low_frequency, self.config.rope_high_frequency
            kept = ((fits - low) / (high - low)).clamp(0, 1)
            frequency = (1 - kept) * frequency / factor + kept * frequency
        angle = positions[:, None].float() * frequency  # (T, E / 2)
        return angle.cos(), angle.sin()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        plan: PackPlan | Attend,
        rows: Tensor | None = None,
        repeated: Tensor | None = None,
        types: Tensor | None = None,
        adapt: Adapt | None = None,
    ) -> Tensor:
        """Hidden states of a packed stream.

        Args:
            tokens: (T,) int64, below `vocab_size`.
            positions: (T,) int, offset of each token inside its own sequence, below `max_positions`.
            plan: where the sequences lie; or an `attend` function that decides itself what each token sees.
            rows: (R,) int64, the tokens whose hidden states are wanted; None: all.
            repeated: (T,) bool, the tokens that occurred before in their sequence, which `exact_match` marks; None: as
                the stream shows it.
            types: (T,) uint8, token types, below `token_types`; None: 0. A trunk without any does not look at them.
            adapt: what adapters make of each linear layer: of its name, input and output, and of whether these are of
                `rows` alone, a new output. `Adapters.of_batch` gives it.

        Returns:
            (R, D), or (T, D) without `rows`; after the final norm.
        """
        x, everywhere = self.embed(tokens, positions, repeated, types), self.angles(positions)
        local = self.angles(positions, self.config.rope_theta_local) if self.config.window else None
        attend = partial(_packed, self.config, plan) if isinstance(plan, PackPlan) else plan
        for layer, block in enumerate(self.blocks):
            angles = everywhere if self.config.window_of(layer) is None else local
            of_block = (x, angles, attend, rows if block is self.blocks[-1] else None, adapt)
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                x = block(*of_block)
            else:
                x = checkpoint(block, *of_block, use_reentrant=False, **_CONTEXTS[self.checkpointing])
        x = self.final_norm(x) if self.config.norm_position == "pre" else x
        return self.last_norm(F.gelu(self.last_layer(x))) if self.config.last_layer else x

    def grow_vocabulary(self, vocab_size: int) -> None:
        """Adds entries up to `vocab_size`, near the mean of those there are; a vocabulary that is larger stays."""
        added = vocab_size - self.config.vocab_size
        if added <= 0:
            return
        self.config = replace(self.config, vocab_size=vocab_size)
        self.tokens.num_embeddings = vocab_size
        self.tokens.weight = nn.Parameter(_with_entries(self.tokens.weight.detach(), added))
        if self.vocabulary is not None:
            self.vocabulary = _with_entries(self.vocabulary, added)
        if self.vocabulary_bias is not None:
            self.vocabulary_bias = F.pad(self.vocabulary_bias, (0, added))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dropout: float | None = None, dtype: torch.dtype | None = None
    ) -> "Trunk":
        """The trunk of a Hugging Face checkpoint, or of an engine of ours.

        Covers GPT-2, BERT, RoBERTa, XLM-R, CamemBERT, ModernBERT and Ettin (encoder and decoder), Llama (SmolLM2 is
        one), Mistral, Qwen2 and Qwen3; reads safetensors and JSON only and runs no code of the
        checkpoint. What the trunk has no use for (heads, BERT's pooler) is kept as it is for `to_hugging_face`. An
        output embedding that is not tied to the input's is kept in `vocabulary`, and the pooler in `pooler`, too:
        `MultiTaskModel` starts from them.

        Args:
            source: a folder with config.json and model.safetensors, or with model.safetensors.index.json and the files
                it names; a saved engine or finished run; or an id on the Hugging Face hub.
            dropout: in place of the checkpoint's.
            dtype: of the weights; None: the checkpoint's.

        Returns:
            The trunk, in evaluation mode, on the CPU.

        Raises:
            ValueError: nothing to load, a damaged file, or an architecture or option that the trunk lacks; names it.
        """
        from trunkline.engine.foreign.pretrained import load

        return load(str(source), dropout, dtype)

    def to_hugging_face(self, vocabulary: Tensor | None = None) -> "PreTrainedModel":
        """A transformers model with a copy of the weights: of the class that the trunk's checkpoint names, with all its
        other tensors; for a trunk of ours the one with a vocabulary head where there is one, else the bare one.

        Args:
            vocabulary: (V, D) of a trunk whose vocabulary is not tied; None: the checkpoint's.

        Raises:
            ValueError: no covered architecture has this shape; says what stands against the nearest one.
        """
        from trunkline.engine.foreign.pretrained import to_hugging_face

        return to_hugging_face(self, vocabulary)

    def save_pretrained(self, folder: str | Path, vocabulary: Tensor | None = None) -> Path:
        """Writes config.json and model.safetensors as transformers does; it need not be installed. As `to_hugging_face`
        otherwise."""
        from trunkline.engine.foreign.pretrained import save

        return save(self, Path(folder), vocabulary)


def _packed(
    config: TrunkConfig,
    plan: PackPlan,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    whole: Tensor | None,
) -> Tensor:
    """Attention of one layer in a packed batch."""
    return attention(q, k, v, plan, causal=config.causal, window=config.window_of(layer), rows=rows, whole=whole)


def _with_entries(weight: Tensor, added: int) -> Tensor:
    """(V, D) -> (V + added, D)"""
    entries = weight.float().mean(0) + 0.02 * torch.randn(added, weight.shape[1], device=weight.device)
    return torch.cat([weight, entries.to(weight.dtype)])


def _worth_keeping(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of a block's forward pass the products and attention, nearly all of its time; the rest is done again."""
    ops = torch.ops
    products = (ops.aten.mm.default, ops.aten.addmm.default, ops.trunkline.product.default)
    kept = (*products, ops.trunkline.attention_forward.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS: dict[str, dict[str, Any]] = {  # what `checkpoint` is told
    "block": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, _worth_keeping)},
}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
