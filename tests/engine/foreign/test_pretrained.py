"""Hugging Face checkpoints: the same numbers here and there, and every bit back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import (
    LLAMA3,
    MODELS,
    POSITIONS,
    TOKENS,
    V,
    change,
    change_tensors,
    make,
    randomise,
    same_tensors,
    states,
    their_batch,
    their_states,
)
from trunkline.engine.foreign.families import FAMILIES
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig, preset
from trunkline.engine.tasks.task import Task

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

every_model = pytest.mark.parametrize("name", MODELS)


# There and back


@every_model
def test_a_ragged_batch_is_theirs(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    lengths = [33, 80, 1, 17]
    texts = [np.random.default_rng(length).integers(4, V, length) for length in lengths]
    batch = pack([Example(0, text, np.array([0])) for text in texts], 1)
    tokens, mask = torch.zeros(2, 4, 80, dtype=torch.int64)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], mask[i, : len(text)] = torch.from_numpy(text), 1
    with torch.no_grad():
        ours = trunk(batch.tokens, batch.positions, batch.plan).split([lengths[i] for i in batch.order])
    theirs = their_batch(model, tokens, attention_mask=mask)
    for i, states_of in zip(batch.order, ours, strict=True):
        torch.testing.assert_close(states_of, theirs[i, : lengths[i]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, (kind, _) in MODELS.items() if kind.endswith(("LMHeadModel", "CausalLM"))]
)
def test_logits_are_theirs(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    network = MultiTaskModel(trunk, [Task("prose", "language-model", ("text",))]).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS)[None]).logits[0]
        torch.testing.assert_close(network.logits(states(trunk, TOKENS), 0), theirs, atol=1e-5, rtol=1e-5)
        # and so is what is learnt from
        example = Example(0, TOKENS, np.arange(len(TOKENS) - 1), TOKENS[1:])
        loss = network(pack([example], 1)).loss[0]
        expected = F.cross_entropy(theirs[:-1], torch.from_numpy(TOKENS[1:]), reduction="sum")
        torch.testing.assert_close(loss, expected)


@every_model
def test_hidden_states_are_theirs(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    for tokens in (TOKENS, TOKENS[:1], TOKENS[:33]):
        torch.testing.assert_close(states(trunk, tokens), their_states(model, tokens), atol=1e-5, rtol=1e-5)


@every_model
def test_a_model_comes_back_bit_for_bit(name, saved):
    """Pooler, heads and vocabulary too."""
    model = make(name)
    back = Trunk.from_pretrained(saved(model)).to_hugging_face()
    assert type(back) is type(model)
    assert not back.training
    assert same_tensors(back.state_dict(), model.state_dict())
    ours, theirs = back.config.to_dict(), model.config.to_dict()
    assert {key for key in theirs if theirs[key] != ours[key]} <= {"_name_or_path"}
    with torch.no_grad():
        for got, expected in zip(*(m(torch.from_numpy(TOKENS)[None]).to_tuple() for m in (back, model)), strict=True):
            if isinstance(expected, Tensor):
                assert torch.equal(got, expected)


@every_model
def test_a_folder_comes_back_bit_for_bit(name, saved, tmp_path):
    theirs = saved(name)
    ours = Trunk.from_pretrained(theirs).save_pretrained(tmp_path / "ours")
    assert same_tensors(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    model = getattr(transformers, MODELS[name][0]).from_pretrained(ours)
    torch.testing.assert_close(
        their_states(model, TOKENS), states(Trunk.from_pretrained(ours), TOKENS), atol=1e-5, rtol=1e-5
    )


def test_weights_are_copies(saved):
    trunk = Trunk.from_pretrained(saved("qwen2"))
    before = {name: weight.clone() for name, weight in trunk.state_dict().items()}
    vocabulary = trunk.vocabulary.clone()
    randomise(trunk.to_hugging_face())
    assert same_tensors(trunk.state_dict(), before)
    assert torch.equal(trunk.vocabulary, vocabulary)


def test_trained_weights_go_out(saved, tmp_path):
    trunk = Trunk.from_pretrained(saved("llama-text"))
    randomise(trunk)
    vocabulary = torch.randn(V, 32)
    model = trunk.to_hugging_face(vocabulary)
    torch.testing.assert_close(their_states(model, TOKENS), states(trunk, TOKENS), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.lm_head.weight, vocabulary)
    again = Trunk.from_pretrained(trunk.save_pretrained(tmp_path / "ours", vocabulary))
    assert same_tensors(again.state_dict(), trunk.state_dict())
    assert torch.equal(again.vocabulary, vocabulary)


def test_precision_is_the_checkpoints_or_what_is_asked_for(saved, tmp_path):
    theirs = saved(make("qwen2").bfloat16())
    trunk, wide = Trunk.from_pretrained(theirs), Trunk.from_pretrained(theirs, dtype=torch.float32)
    assert {p.dtype for p in trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*wide.parameters(), wide.vocabulary)} == {torch.float32}
    assert same_tensors(wide.bfloat16().state_dict(), trunk.state_dict())
    assert trunk.to_hugging_face().dtype == torch.bfloat16
    ours = trunk.save_pretrained(tmp_path / "ours")
    assert same_tensors(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))


def test_dropout_is_the_checkpoints_or_what_is_asked_for(saved):
    theirs = saved(make("bert", hidden_dropout_prob=0.3))
    trunk = Trunk.from_pretrained(theirs)
    assert (trunk.config.dropout, trunk.blocks[0].dropout.p, trunk.training) == (0.3, 0.3, False)
    assert Trunk.from_pretrained(theirs, dropout=0.0).blocks[0].dropout.p == 0.0


def test_shards_are_read_together(saved):
    model = make("llama-text")
    theirs = saved(model, max_shard_size="20KB")
    assert len(list(theirs.glob("model-*.safetensors"))) > 2
    assert same_tensors(Trunk.from_pretrained(theirs).to_hugging_face().state_dict(), model.state_dict())


def test_old_checkpoints_are_read(saved):
    """Names of TensorFlow, masks among the weights, settings as transformers 4 wrote them."""
    bert = saved("bert-pretraining")
    expected = Trunk.from_pretrained(bert).state_dict()
    tensors = load_file(bert / "model.safetensors")
    renamed = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in tensors.items()
    }
    change_tensors(bert, {**dict.fromkeys(tensors), **renamed, "bert.embeddings.position_ids": torch.arange(80)[None]})
    assert same_tensors(Trunk.from_pretrained(bert).state_dict(), expected)

    gpt2 = saved("gpt2")
    mask = torch.ones(80, 80, dtype=torch.uint8).tril()
    change_tensors(gpt2, {"h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)})
    assert torch.equal(
        load_file(Trunk.from_pretrained(gpt2).save_pretrained(gpt2) / "model.safetensors")["h.0.attn.bias"], mask
    )

    llama = saved(make("llama-text"))
    expected = Trunk.from_pretrained(llama).config
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    change(llama, rope_parameters=..., rope_theta=500.0, rope_scaling={"type": "llama3", **scaling}, head_dim=...)
    assert Trunk.from_pretrained(llama).config == replace(expected, head_dim=None)


# Trunks of our own

_SMALL = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": POSITIONS}
_GATED = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "norm_eps": 1e-6}
_LOCAL = {"positions": "rotary", "embedding_norm": True, "first_norm": False, "activation": "geglu"}
OWN = {
    "GPT2LMHeadModel": preset("small", **_SMALL, dropout=0.2),
    "BertModel": preset("bert-base", **_SMALL),
    "LlamaForCausalLM": TrunkConfig(**_SMALL, **_GATED, rope_factor=4.0, rope_original_positions=32),
    "LlamaModel": TrunkConfig(**_SMALL, **_GATED | {"bias": True}, num_kv_heads=2, head_dim=6, tie_vocabulary=False),
    "Qwen2ForCausalLM": TrunkConfig(**_SMALL, **_GATED, qkv_bias=True, rope_factor=2.0),
    "Qwen3ForCausalLM": TrunkConfig(**_SMALL, **_GATED, num_kv_heads=1, qk_norm=True, intermediate_size=40),
    "RobertaModel": preset("bert-base", **_SMALL, position_offset=2),
    "ModernBertModel": TrunkConfig(**_SMALL, **_LOCAL, causal=False, window=5),
    "ModernBertDecoderModel": TrunkConfig(**_SMALL, **_LOCAL, rope_theta_local=70.0),
    "ModernBertDecoderForCausalLM": TrunkConfig(**_SMALL, **_LOCAL, last_layer=True, window=5, global_every=2),
}


@pytest.mark.parametrize("architecture", OWN)
def test_a_trunk_of_ours_goes_out_and_comes_back(architecture, tmp_path):
    trunk = Trunk(OWN[architecture]).eval()
    randomise(trunk)
    model = trunk.to_hugging_face()
    assert type(model).__name__ == architecture
    torch.testing.assert_close(their_states(model, TOKENS), states(trunk, TOKENS), atol=1e-5, rtol=1e-5)
    if architecture.endswith(("LM", "LMHeadModel")):
        expected = states(trunk, TOKENS) @ trunk.tokens.weight.T
        with torch.no_grad():
            torch.testing.assert_close(model(torch.from_numpy(TOKENS)[None]).logits[0], expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "theirs", trunk.save_pretrained(tmp_path / "ours")):
        back = Trunk.from_pretrained(folder)
        assert same_tensors(back.state_dict(), trunk.state_dict())
        assert torch.equal(states(back, TOKENS), states(trunk, TOKENS))


def test_an_untied_vocabulary_makes_a_model_of_texts():
    trunk, vocabulary = Trunk(OWN["LlamaModel"]), torch.randn(V, 32)
    model = trunk.to_hugging_face(vocabulary)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model.lm_head.weight, vocabulary)
    with pytest.raises(ValueError, match="vocabulary is tied to its embedding"):
        Trunk(OWN["GPT2LMHeadModel"]).to_hugging_face(vocabulary)


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (preset("tiny"), "the nearest, gpt2, lacks positions 'rotary'"),
        (preset("small", bias=False), "the nearest, gpt2, lacks bias False"),
        (preset("small", qkv_bias=False), "the nearest, gpt2, lacks qkv_bias False"),
        (preset("small", causal=False, num_kv_heads=3), "the nearest, gpt2, lacks num_kv_heads 3, causal False"),
        (preset("small", head_dim=32), "the nearest, gpt2, lacks head_dim 32"),
        (preset("small", exact_match=True), "the nearest, gpt2, lacks exact_match True"),
        (preset("bert-base", activation="swiglu"), "the nearest, bert, lacks activation 'swiglu'"),
        (TrunkConfig(**_SMALL, **_GATED | {"activation": "gelu"}), "the nearest, llama, lacks activation 'gelu'"),
    ],
)
def test_a_shape_that_nobody_has_is_told_from_the_nearest(config, lacks):
    with torch.device("meta"):
        trunk = Trunk(config)
    with pytest.raises(
        ValueError, match="none of gpt2, bert, llama, qwen2, qwen3, mistral, roberta, .* has this"
    ) as caught:
        trunk.to_hugging_face()
    assert str(caught.value).endswith(lacks)


# A larger vocabulary


@pytest.mark.parametrize("name", ["gpt2-text", "llama-text", "bert-pretraining"])
def test_vocabulary_grows(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    before, vocabulary = states(trunk, TOKENS), trunk.vocabulary
    trunk.grow_vocabulary(V - 5)
    assert trunk.config.vocab_size == V
    trunk.grow_vocabulary(V + 3)
    assert torch.equal(states(trunk, TOKENS), before)
    assert states(trunk, np.array([V, V + 2])).isfinite().all()
    assert trunk.tokens.weight.shape == (V + 3, 32)
    new, old = trunk.tokens.weight[V:], trunk.tokens.weight[:V]
    assert len({tuple(row) for row in new.tolist()}) == 3
    assert (new - old.mean(0)).abs().max() < 0.1
    larger = trunk.to_hugging_face()
    assert larger.config.vocab_size == V + 3
    assert larger.get_output_embeddings().weight.shape == (V + 3, 32)
    with torch.no_grad():
        logits, expected = (m(torch.from_numpy(TOKENS)[None])[0][0] for m in (larger, model))
    assert logits.shape == (POSITIONS, V + 3)
    torch.testing.assert_close(logits[:, :V], expected)
    if vocabulary is not None:
        assert torch.equal(trunk.vocabulary[:V], vocabulary)


def test_every_family_is_tried():
    tried = {getattr(transformers, kind).config_class.model_type for kind, _ in MODELS.values()}
    assert tried == FAMILIES.keys()
