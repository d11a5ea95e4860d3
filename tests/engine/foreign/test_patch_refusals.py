"""What a patched Hugging Face model leaves to PyTorch, saying so, and what it refuses."""

import pytest
import torch

import trunkline
from foreign_models import BUILD, DECODERS, GROUPED, OWN_ATTENTION, VOCABULARY, ids, mask_of
from trunkline.engine.foreign import drop_in

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "fresh_counts")


def test_mask_of_other_keys_is_an_error(model_of):
    model = trunkline.patch(model_of("bert"))
    for slots in (4, 6):
        with pytest.raises(RuntimeError, match="as long as the keys"):
            model(ids(2, 5), attention_mask=torch.ones(2, slots))


GENERATING = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "without a cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("more", GENERATING.values(), ids=GENERATING)
@pytest.mark.parametrize("family", DECODERS)
def test_generating_from_rows_padded_on_the_right_is_an_error(family, more, model_of):
    """The first new token comes from the logits at the last slot, of which only Hugging Face makes something."""
    model, settings = trunkline.patch(model_of(family)), {"max_new_tokens": 3, "do_sample": False, **more}
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids(3, 7), **mask_of([(0, 7), (0, 5), (0, 7)], 7), **settings)
    for rows in ([(0, 7), (2, 7), (6, 7)], None):
        model.generate(ids(3, 7), **mask_of(rows, 7), **settings)


def test_rows_padded_on_the_right_may_be_encoded_and_trained_on(model_of):
    mask = mask_of([(0, 7), (0, 5), (0, 7)], 7)
    trunkline.patch(model_of("bart")).generate(ids(3, 7), **mask, max_new_tokens=3)
    model = trunkline.patch(model_of("llama"))
    model(ids(3, 7), **mask, labels=ids(3, 7)).loss.backward()
    with torch.no_grad():
        model(ids(3, 7), **mask, use_cache=True)


def test_masks_that_are_no_bounds_are_left_to_torch(model_of):
    model, tokens = model_of("llama"), ids(2, 5)
    gaps = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    matrix = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    matrix[..., 3, 1] = False
    for mask in (gaps, matrix, torch.zeros(matrix.shape, dtype=torch.float64).masked_fill_(~matrix, -1e9)):
        expected = model(tokens, attention_mask=mask).logits
        drop_in._counts.clear()
        trunkline.patch(model)
        with pytest.warns(UserWarning, match="patch: a mask that is neither padding, causal, packed nor a window"):
            torch.testing.assert_close(model(tokens, attention_mask=mask).logits, expected)
        assert trunkline.attention_counts() == {"patch: a mask that is neither padding, causal, packed nor a window": 2}
        trunkline.unpatch(model)


def test_mask_with_a_pattern_of_the_user_is_left_to_torch(model_of):
    from transformers.masking_utils import create_causal_mask

    model = trunkline.patch(model_of("llama"))
    embeds = torch.zeros(1, 6, 32)
    for pattern in (
        {"or_mask_function": lambda batch, head, q, kv: (q < 3) & (kv < 3)},
        {"and_mask_function": lambda batch, head, q, kv: kv != 1},
        {"block_sequence_ids": torch.tensor([[-1, 0, 0, -1, 1, 1]])},
    ):
        mask = create_causal_mask(model.config, embeds, None, None, **pattern)
        model.config._attn_implementation = "sdpa"
        expected = create_causal_mask(model.config, embeds, None, None, **pattern)
        model.config._attn_implementation = "trunkline"
        assert torch.equal(mask, expected)


def test_chunks_are_left_to_torch():
    config = transformers.Llama4TextConfig(**GROUPED, attention_chunk_size=4, num_local_experts=2, moe_layers=[])
    from transformers.masking_utils import create_chunked_causal_mask

    trunkline.patch(BUILD["llama"]())  # registers
    masks = []
    for implementation in ("trunkline", "sdpa"):
        config._attn_implementation = implementation
        masks.append(create_chunked_causal_mask(config, torch.zeros(1, 9, 32), None, None))
    assert torch.equal(*masks)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_model_with_its_own_attention_is_an_error(family):
    assert_refused(BUILD[family]())


def test_model_that_keeps_its_attention_is_an_error(monkeypatch):
    """Whatever the release of transformers: a class of which Hugging Face says that its attention cannot be chosen."""
    model = BUILD["llama"]()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", staticmethod(lambda: False))
    assert_refused(model)


def assert_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__}.* does not take its attention from"):
        trunkline.patch(model)
    assert model.config._attn_implementation != "trunkline"
    assert not model._forward_hooks


def test_forward_that_does_not_come_to_us_is_an_error(model_of):
    model = trunkline.patch(model_of("llama"))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="LlamaForCausalLM ran without calling our attention"):
        model(ids(1, 3))
    model.config._attn_implementation = "trunkline"
    model(ids(1, 3))


def test_what_changes_the_result_and_is_unknown_is_an_error(model_of):
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = transformers.T5EncoderModel(config)
    if model._can_set_attn_implementation():
        with pytest.raises(ValueError, match="with position_bias, which is not supported"):
            trunkline.patch(model)(ids(1, 5))
    else:  # older transformers
        with pytest.raises(ValueError, match="does not take its attention from"):
            trunkline.patch(model)
    with pytest.raises(ValueError, match="LlamaAttention asks for attention with s_aux"):
        trunkline.patch(model_of("llama"))(ids(1, 5), s_aux=torch.zeros(4))


def test_attention_weights_are_an_error(model_of):
    model = trunkline.patch(model_of("gpt2"))
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(ids(1, 5), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model.generate(ids(1, 5), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_what_is_no_hugging_face_model_is_an_error():
    with pytest.raises(ValueError, match="expected a Hugging Face PreTrainedModel, got Linear"):
        trunkline.patch(torch.nn.Linear(2, 2))
