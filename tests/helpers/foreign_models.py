"""Small Hugging Face models with random weights, of every family that the patch is tested on, and inputs for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

VOCABULARY, WINDOW = 50, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
BUILD: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=160,
            scale_attn_by_inverse_layer_idx=True,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=1,
        )
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=160,
            rotary_dim=4,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=1,
        )
    ),
    "gptneo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            max_position_embeddings=160,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=1,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **GROUPED,
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["full_attention", "sliding_attention"],
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**SMALL, local_attention=2 * WINDOW, global_attn_every_n_layers=2)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL)),
    "xlm-roberta": lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**SMALL)),
    "modernbert-decoder": lambda: transformers.ModernBertDecoderForCausalLM(
        transformers.ModernBertDecoderConfig(**SMALL, local_attention=2 * WINDOW, global_attn_every_n_layers=2)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=160,
            forced_eos_token_id=None,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=1,
            decoder_start_token_id=2,
        )
    ),
}
# Of these it is the release of transformers that says whether they have an attention of their own, which is refused.
OWN_ATTENTION = [family for family in ("gptj", "gptneo") if not BUILD[family]()._can_set_attn_implementation()]
FAMILIES = [family for family in BUILD if family not in OWN_ATTENTION]
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "bart")  # and one with both
DECODERS = [family for family in FAMILIES if family not in ENCODERS]


def ids(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape)


MASKS = {
    "no padding": None,
    "left": [(3, 11), (0, 11), (9, 11)],
    "right": [(0, 7), (0, 11), (0, 1)],
    "both": [(2, 7), (4, 11), (0, 5)],
}


def mask_of(rows: list[tuple[int, int]] | None, slots: int = 11) -> dict[str, Tensor]:
    if rows is None:
        return {}
    slot = torch.arange(slots)
    return {"attention_mask": torch.stack([(slot >= first) & (slot < end) for first, end in rows]).long()}


def with_large_weights(model: Any) -> Any:
    """The model with new matrices, so large that a wrong mask shows."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layernorm" not in name:
            parameter.data.normal_(std=0.3)
    return model
