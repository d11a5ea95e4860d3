"""Our attention inside a Hugging Face model, and out again.

    patch(model):  mask function ->  attention_mask  ->  every layer  ->  attention function  ->  kernels
                   once a forward    an int32 tensor                      plan, made once a forward

Hugging Face asks a mask function for the mask and hands what it returns to every layer. Ours returns no matrix, but
where the tokens of each row lie, as a tensor of shape

    (B, left + 2, right + 2, n)     n = 3: of each row, first token and end, in self-attention; and K
                                    n = 5: of each row, first query, end of queries, first key, end of keys; and K
                                    n = 1: B = tokens of a packed stream; 1 where a sequence starts

that is expanded in the middle, so it is tiny. The window (left, right), -1 for no bound, stands in the *shape*: a
kernel is compiled for it, so a compiled graph must know it as a number, and of a tensor it knows nothing but its shape.
It has four dimensions because generation makes masks for compiled steps in advance, and Hugging Face takes what has
four dimensions for finished; int32, because no other mask is. A plain tensor also survives what a class of ours would
not: moves between devices, checkpointing, graphs.

A mask of any other kind is computed as the matrix it is by PyTorch's attention, and counted.

B rows, Q query slots a row, K key slots a row, H query heads, G key/value heads, D head width
Source: transformers/masking_utils.py, integrations/sdpa_attention.py (5.12 to 5.24).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trunkline.engine.foreign.drop_in import attention_counts, count_call, heads_second
from trunkline.engine.foreign.plans import (
    boundaries_of_starts,
    bounds_of,
    once_a_batch,
    padded_plan,
    stream_plan,
    whole_rows_plan,
)
from trunkline.kernels.attention.pack_plan import PackPlan

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "trunkline"  # of our attention in Hugging Face's configurations
PATCHED = "_trunkline_patch"  # attribute of a patched model; copies of the model, by copy or pickle, have their own
RIGHT = (
    "patch: the logits of the last token alone are asked for, as generate() does, but in some rows that is padding: "
    "pad on the left (tokenizer.padding_side = 'left')"
)
GAPS = "attention_mask: in a compiled graph the tokens of a row must lie side by side, without gaps"
LENGTHS = "attention_mask: it must be as long as the keys"

# What modeling code passes on to the attention function and does not change its result.
_HARMLESS = set(
    """position_ids cache_position use_cache return_dict output_hidden_states output_router_logits logits_to_keep
    num_items_in_batch max_length_q max_length_k layer_idx seq_idx""".split()
)
# Encoders without cross-attention: their bidirectional masks are always of queries and keys that are the same tokens.
_ENCODERS = set("bert camembert distilbert electra modernbert roberta xlm-roberta".split())


def patch(model: "PreTrainedModel") -> "PreTrainedModel":
    """Puts our attention into a Hugging Face model; `unpatch` takes it out again.

    The weights are not touched, and only this model changes (and any that shares its configuration object). Logits,
    gradients and generated ids stay the same up to rounding; what comes out at padding is of no use, before and after.
    A deep copy of a patched model, or a pickled one, is a patched model of its own.
    Without padding, with padding on one or both sides, packed (by `cu_seq_lens_q` or position ids), with a window, with
    dynamic and static caches and in compiled graphs the work is done by our kernels. A mask of another kind, or one
    with gaps between the tokens of a row, is left to PyTorch with one warning, and counted in `attention_counts`.

    Cost: the plan is made once a forward from the mask. Looking for gaps in a mask waits for the device, as Hugging
    Face's own does; reading packed boundaries does so, too. Keys of a cache that are not laid out by token are copied.

    Args:
        model: any model whose layers take their attention from Hugging Face's `AttentionInterface`.

    Returns:
        The same model.

    Raises:
        ValueError: a model, or a part of it, that has an attention of its own (GPT-Neo, and GPT-J before transformers
            5.24); a call of the patched model with `output_attentions=True`, with arguments for attention that our
            kernels do not know (`position_bias`, `s_aux`), to generate from rows that are padded on the right, or, in a
            compiled graph, a mask with gaps (a RuntimeError of the device).
        RuntimeError: the first call of the patched model did not come to our attention.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"patch: expected a Hugging Face PreTrainedModel, got {type(model).__name__}")
    if hasattr(model, PATCHED):
        return model
    _register()
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    # a model that was made with the configuration of a patched one has our name there: it gets Hugging Face's default
    before = [(part.config, part.config._attn_implementation.replace(NAME, "sdpa")) for part in parts]
    model.set_attn_implementation(NAME)
    others = sorted({type(part).__name__ for part in parts if part.config._attn_implementation != NAME})
    if others:
        _restore(before)
        raise ValueError(
            f"patch: {', '.join(others)} does not take its attention from Hugging Face's AttentionInterface, "
            "so it cannot be replaced; the model is as it was"
        )
    hooks = [
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward),
    ]
    setattr(model, PATCHED, _Patch(before, hooks, calls=_calls()))
    return model


def unpatch(model: "PreTrainedModel") -> "PreTrainedModel":
    """Takes our attention out of a model again: every part of it gets back the attention it had.

    Raises:
        ValueError: the model is not patched.
    """
    patched = getattr(model, PATCHED, None)
    if patched is None:
        made = getattr(getattr(model, "config", None), "_attn_implementation", "") == NAME
        why = ": it was made with the configuration of a patched one; patch it first" if made else ""
        raise ValueError(f"unpatch: this {type(model).__name__} is not patched{why}")
    delattr(model, PATCHED)
    _restore(patched.before)
    for hook in patched.hooks:
        hook.remove()
    return model


@dataclass
class _Patch:
    """What `unpatch` needs, and whether our attention has been called since."""

    before: list[tuple["PretrainedConfig", str]]
    hooks: list["RemovableHandle"]
    calls: int  # of all models, when this one was patched
    called: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, perhaps in a process where nothing has been patched yet."""
        self.__dict__.update(state)
        _register()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _restore(before: list[tuple["PretrainedConfig", str]]) -> None:
    for config, implementation in before:  # outer parts first: setting theirs also sets that of the parts inside
        config._attn_implementation = implementation


def _calls() -> int:
    return sum(count for name, count in attention_counts().items() if name.startswith("patch"))


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError("patch: our kernels have no attention weights for output_attentions=True; unpatch the model")
    encoded = getattr(model.config, "is_encoder_decoder", False)  # then the mask is the encoder's
    if kwargs.get("logits_to_keep") == 1 and not encoded:
        padded = _ends_in_padding(**kwargs)
        if padded is not None and torch.compiler.is_compiling():
            torch._assert_async(~padded, RIGHT)
        elif padded is not None and padded:
            raise ValueError(RIGHT)


def _ends_in_padding(
    attention_mask: Any = None, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any
) -> Tensor | None:
    """Whether the last token of a row is padding, by a mask of the user's or one of `_mask`, for layers of one kind or
    several; None where that is not to be seen."""
    mask = next(iter(attention_mask.values()), None) if isinstance(attention_mask, dict) else attention_mask
    given = inputs_embeds if input_ids is None else input_ids
    if not isinstance(mask, Tensor) or given is None:
        return None
    if mask.ndim == 2:
        return (mask[:, -1] == 0).any()
    if mask.ndim == 4 and mask.dtype == torch.int32 and mask.shape[-1] > 1:
        return (mask[:, 0, 0, 1] < given.shape[1]).any()  # the end of the queries
    return None


def _after_forward(model: nn.Module, args: tuple, output: Any) -> None:
    """Fails if the first forward did not come to our attention; one that was compiled has nothing to show for it."""
    if torch.compiler.is_compiling():
        return
    patched = getattr(model, PATCHED, None)
    if patched is None or patched.called:
        return
    patched.called = _calls() > patched.calls or any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )
    if not patched.called:
        raise RuntimeError(f"patch: {type(model).__name__} ran without calling our attention; unpatch it")


def _mask(**asked: Any) -> Tensor | None:
    """What Hugging Face calls for the mask of a forward: our bounds, or the whole matrix where they cannot say it."""
    from transformers.masking_utils import sdpa_mask

    mask = _bounds_mask(**asked)
    if mask is None:
        return sdpa_mask(**{**asked, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return mask


def _bounds_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask in our form, None if it has none. Arguments are those of `transformers.masking_utils.sdpa_mask`."""
    causal = "allow_is_bidirectional_skip" not in others  # only bidirectional masks may be skipped as such
    window = _window(mask_function, local_size, use_vmap, causal, config)
    if window is None or (attention_mask is not None and attention_mask.ndim != 2):
        return None
    start = q_offset - kv_offset  # the key at which the first query stands
    same_tokens = isinstance(start, int) and start == 0 and q_length == kv_length
    if causal and _joined(mask_function) and not allow_is_causal_skip and attention_mask is None and same_tokens:
        return _as_mask(_starts(mask_function, batch_size, q_length, device), window)
    if causal and _joined(mask_function) and local_size is None:
        return None
    keys = torch.arange(kv_length, device=device)
    keep = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask is not None:  # it may end before the keys of a static cache do
        slot = keys + kv_offset
        keep = attention_mask[:, slot.clamp(max=attention_mask.shape[1] - 1)] & (slot < attention_mask.shape[1])
        keep = keep.expand(batch_size, -1)
    if causal:
        keep = keep & (keys < start + q_length)  # what lies behind is still empty
    first, end, whole = bounds_of(keep)
    if torch.compiler.is_compiling():
        torch._assert_async(whole, GAPS)
    elif attention_mask is not None and not whole:
        return None
    of_keys = torch.full_like(first, kv_length)
    if same_tokens and (causal or _is_encoder(config)):
        return _as_mask(torch.stack([first, end, of_keys], 1), window)
    if causal:
        queries = [(first - start).clamp(0, q_length), (end - start).clamp(0, q_length)]
    elif window == (-1, -1):
        queries = [torch.zeros_like(first), torch.full_like(first, q_length)]
    else:
        return None  # a window needs to know where a query stands
    return _as_mask(torch.stack([*queries, first, end, of_keys], 1), window)


def _window(
    mask_function: Callable, local_size: int | None, use_vmap: bool, causal: bool, config: Any
) -> tuple[int, int] | None:
    """(left, right) of a mask function, padding and packing aside; None for any other shape of mask.

    Only identity and name of the function can be asked in a compiled graph. Joined functions are a window, or packing,
    or both; those of users come with `use_vmap`, and chunks with their own size.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is causal_mask_function:
        return (-1, 0)
    if mask_function is bidirectional_mask_function:
        return (-1, -1)
    if use_vmap or not _joined(mask_function):
        return None
    if local_size is None:
        return (-1, 0) if causal else None
    if local_size != getattr(config, "sliding_window", None) or local_size == getattr(
        config, "attention_chunk_size", None
    ):
        return None
    return (local_size - 1, 0) if causal else (local_size, local_size)


def _joined(mask_function: Callable) -> bool:
    return getattr(mask_function, "__name__", "") == "and_mask"


def _is_encoder(config: Any) -> bool:
    return config.model_type in _ENCODERS and not getattr(config, "is_decoder", False)


def _starts(mask_function: Callable, B: int, tokens: int, device: torch.device | str) -> Tensor:
    """(B * tokens, 1): where a packed sequence starts, that is, where a token does not see the one before it."""
    row = torch.arange(B, device=device)[:, None]
    slot = torch.arange(tokens, device=device)[None]
    sees = mask_function(row, row, slot, (slot - 1).clamp(min=0))
    return (~sees | (slot == 0)).expand(B, -1).reshape(-1, 1)


def _as_mask(fields: Tensor, window: tuple[int, int]) -> Tensor:
    left, right = window
    return fields.int()[:, None, None].expand(-1, left + 2, right + 2, -1)


@once_a_batch
def _plan(mask: Tensor, B: int, queries: int, keys: int) -> PackPlan:
    fields = mask[:, 0, 0]
    if fields.shape[1] == 1:
        return stream_plan(boundaries_of_starts(fields[:, 0] == 1), None, B * queries, B * keys)
    torch._assert_async((fields[:, -1] == keys).all(), LENGTHS)
    return padded_plan(fields[:, :-1], queries, keys)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    deterministic: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Hugging Face calls in every layer.

    Args:
        query: (B, H, Q, D).
        key: (B, G, K, D).
        value: (B, G, K, D), or narrower.
        attention_mask: of `_mask`, a matrix of somebody else, or None: all of the row, causal if the layer is.

    Returns:
        (B, Q, H, D), contiguous, and no weights.
    """
    for name, argument in {"output_attentions": output_attentions or None, **others}.items():
        if argument is not None and name not in _HARMLESS:
            raise ValueError(f"patch: {type(module).__name__} asks for attention with {name}, which is not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    B, Q, K = len(query), query.shape[2], key.shape[2]
    reason = None
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        reason = "a mask that is neither padding, causal, packed nor a window"
    elif attention_mask is None and causal and 1 < Q != K and cu_seq_lens_q is None:
        reason = "a causal layer without a mask, with other keys than queries"
    if reason is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        count_call("patch", left_to_torch=reason)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap=softcap
        )

    if attention_mask is not None:
        left, right = attention_mask.shape[1] - 2, attention_mask.shape[2] - 2
    elif sliding_window is None:
        left, right = -1, 0 if causal else -1
    else:
        raise ValueError(f"patch: {type(module).__name__} asks for attention with sliding_window, but without a mask")
    if cu_seq_lens_q is not None:
        plan = stream_plan(cu_seq_lens_q, cu_seq_lens_k, B * Q, B * K)
    elif attention_mask is not None:
        plan = _plan(attention_mask, B, Q, K)
    else:
        plan = whole_rows_plan(B, Q, K, query.device)
    count_call("patch")
    width = value.shape[3]
    value = nn.functional.pad(value, (0, query.shape[3] - width)) if width < query.shape[3] else value
    out = heads_second(
        query,
        key,
        value,
        plan,
        causal=False,  # the window says it
        scale=scaling,
        window=(left, right),
        softcap=softcap,
        dropout=dropout,
        deterministic=bool(deterministic),
    )
    return out[..., :width], None
