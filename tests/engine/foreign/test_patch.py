"""Hugging Face models with our attention against the same models with PyTorch's, in float64 on random weights."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trunkline
from foreign_models import (
    BUILD,
    DECODERS,
    FAMILIES,
    GROUPED,
    MASKS,
    VOCABULARY,
    ids,
    mask_of,
    with_large_weights,
)
from trunkline.engine.foreign import plans

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_counts"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo's own doing
]


def results(model: Any, inputs: dict[str, Tensor], of_use: Tensor) -> dict[str, Tensor]:
    """Logits where a token is, and the gradients of all parameters."""
    logits = model(**inputs).logits[of_use]
    generator = torch.Generator().manual_seed(0)
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same_patched(model: Any, inputs: dict[str, Tensor], of_use: Tensor, calls: int) -> None:
    before = results(model, inputs, of_use)
    trunkline.patch(model)
    patched = results(model, inputs, of_use)
    assert trunkline.attention_counts() == {"patch": calls}
    trunkline.unpatch(model)
    after = results(model, inputs, of_use)
    assert before.keys() == patched.keys()
    for name in before:
        torch.testing.assert_close(patched[name], before[name], msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, rows, model_of):
    model, tokens, mask = model_of(family), ids(3, 11), mask_of(rows)
    of_use = mask["attention_mask"].bool() if mask else torch.ones(3, 11, dtype=torch.bool)
    inputs = {"input_ids": tokens, **mask}
    if family == "bart":  # decoder and encoder equally long: their masks must not be taken for one another
        decoder = {f"decoder_{name}": value.flip(0) for name, value in inputs.items()}
        assert_same_patched(model, {**inputs, **decoder}, of_use.flip(0), calls=6)
    else:
        assert_same_patched(model, inputs, of_use, calls=2)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "bert", "modernbert", "bart"])
def test_rows_too_long_for_a_tile(family, model_of):
    mask = mask_of([(0, 140), (5, 131), (139, 140)], 140)
    inputs = {"input_ids": ids(3, 140), **mask}
    if family == "bart":
        inputs["decoder_input_ids"] = ids(3, 5)
    of_use = torch.ones(3, 5, dtype=torch.bool) if family == "bart" else mask["attention_mask"].bool()
    assert_same_patched(model_of(family), inputs, of_use, calls=6 if family == "bart" else 2)


def test_soft_cap():
    """Against transformers' attention in single steps, whose softmax is in float32: its other ways know no soft cap."""
    settings = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "sliding_window": 8}
    config = transformers.Gemma2Config(**GROUPED, **settings)
    config._attn_implementation = "eager"
    model = with_large_weights(transformers.Gemma2ForCausalLM(config).double().eval())
    mask = mask_of([(0, 11), (0, 7)])
    inputs, of_use = {"input_ids": ids(2, 11), **mask}, mask["attention_mask"].bool()
    before = results(model, inputs, of_use)
    patched = results(trunkline.patch(model), inputs, of_use)
    assert trunkline.attention_counts() == {"patch": 2}
    for name in before:
        torch.testing.assert_close(patched[name], before[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [*DECODERS, "bart"])
def test_generated_ids(family, cache, model_of):
    model = model_of(family)
    mask = mask_of([(3, 7), (0, 7), (6, 7)], 7)
    settings = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}

    def generate() -> Tensor:
        return model.generate(inputs, **mask, **settings)

    inputs = ids(3, 7)
    expected = generate()
    trunkline.patch(model)
    assert torch.equal(generate(), expected)
    assert trunkline.attention_counts() == {"patch": 2 + 9 * 4 if family == "bart" else 9 * 2}


def test_generated_by_beams(model_of):
    model, inputs = model_of("bart"), ids(2, 7)
    expected = model.generate(inputs, max_new_tokens=6, num_beams=3)
    assert torch.equal(trunkline.patch(model).generate(inputs, max_new_tokens=6, num_beams=3), expected)


def test_cache_that_is_continued(model_of):
    """Several tokens at once behind a cache, in the window and out of it."""
    for family in DECODERS:
        model, tokens = model_of(family), ids(3, 12)
        mask = mask_of([(2, 12), (0, 12), (6, 12)], 12)["attention_mask"]  # of one the first tokens are all padding
        (name,) = {"cache", "past_key_values"} & inspect.signature(model.forward).parameters.keys()  # by release

        def run(model: Any = model, tokens: Tensor = tokens, mask: Tensor = mask, name: str = name) -> Tensor:
            cache, logits = transformers.DynamicCache(config=model.config), []
            for first, end in ((0, 5), (5, 7), (7, 12)):
                out = model(tokens[:, first:end], attention_mask=mask[:, :end], **{name: cache})
                logits.append(out.logits)
            return torch.cat(logits, 1)[mask.bool()]

        with torch.no_grad():
            expected = run()
            trunkline.patch(model)
            torch.testing.assert_close(run(), expected)
    assert trunkline.attention_counts() == {"patch": 3 * 2 * len(DECODERS)}


PACKED = [3, 1, 7, 5]


def packed(flash: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """Sequences, and the batch that `DataCollatorWithFlattening` makes of them."""
    sequences = [ids(length) for length in PACKED]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    batch = collate([{"input_ids": sequence.tolist()} for sequence in sequences])
    batch.pop("labels")
    return sequences, batch


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_packed(family, use_cache, model_of):
    model = model_of(family)
    sequences, batch = packed(flash=True)
    with torch.no_grad():
        expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
        trunkline.patch(model)
        out = model(**batch, **({} if family == "bert" else {"use_cache": use_cache})).logits[0]
    torch.testing.assert_close(out, expected)
    assert trunkline.attention_counts() == {"patch": 2}


@pytest.mark.parametrize("family", DECODERS)
def test_packed_by_position_ids(family, model_of):
    model = model_of(family)
    _, batch = packed(flash=False)
    batch["use_cache"] = False
    assert_same_patched(model, batch, torch.ones(1, sum(PACKED), dtype=torch.bool), calls=2)


def test_packed_sequences_never_read_one_another(model_of):
    model = trunkline.patch(model_of("llama"))
    _, batch = packed(flash=True)
    with torch.no_grad():
        clean = model(**batch).logits
        batch["input_ids"][0, 4:11] = ids(7)  # the third sequence
        dirty = model(**batch).logits
    theirs = torch.zeros(sum(PACKED), dtype=torch.bool)
    theirs[4:11] = True
    assert torch.equal(dirty[0, ~theirs], clean[0, ~theirs])
    assert not torch.equal(dirty[0, theirs], clean[0, theirs])


COMPILED = {
    "gpt2, packed": ("gpt2", lambda: packed(flash=True)[1]),
    "llama, no mask": ("llama", lambda: {"input_ids": ids(3, 11)}),
    "mistral, padded": ("mistral", lambda: {"input_ids": ids(3, 11), **mask_of(MASKS["both"])}),
    "bert, padded": ("bert", lambda: {"input_ids": ids(3, 11), **mask_of(MASKS["both"])}),
}


@pytest.mark.parametrize(("family", "inputs"), COMPILED.values(), ids=COMPILED)
def test_compiled_without_a_graph_break(family, inputs, model_of):
    model, inputs = trunkline.patch(model_of(family)), inputs()
    if family != "bert":
        inputs["use_cache"] = False
    of_use = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected = results(model, inputs, of_use)
    compiled = results_of_compiled(model, inputs, of_use)
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert trunkline.attention_counts() == {"patch": 4}  # a compiled call counts when it is compiled


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Inductor's own doing
def test_compiled_by_inductor(model_of):
    """As users compile: with code generated around our kernels; against the model as it was."""
    model, mask = model_of("gpt2"), mask_of([(0, 9), (0, 6)], 9)
    inputs, of_use = {"input_ids": ids(2, 9), **mask, "use_cache": False}, mask["attention_mask"].bool()
    expected = results(model, inputs, of_use)
    compiled = results_of_compiled(trunkline.patch(model), inputs, of_use, backend="inductor")
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert trunkline.attention_counts() == {"patch": 2}


def results_of_compiled(
    model: Any, inputs: dict[str, Tensor], of_use: Tensor, backend: str = "aot_eager"
) -> dict[str, Tensor]:
    torch.compiler.reset()
    forward = model.forward
    model.forward = torch.compile(forward, fullgraph=True, backend=backend)
    try:
        return results(model, inputs, of_use)
    finally:
        del model.forward


def test_compiled_steps_of_generation(model_of):
    """A static cache, the masks made outside of the graph."""
    model, inputs = model_of("mistral"), ids(2, 5)
    settings = {**mask_of([(2, 5), (0, 5)], 5), "max_new_tokens": 5, "cache_implementation": "static"}
    expected = model.generate(inputs, **settings)
    trunkline.patch(model)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    try:
        assert torch.equal(model.generate(inputs, **settings), expected)
    finally:
        del model.forward


def test_gaps_in_a_compiled_graph_are_an_error(model_of):
    model = trunkline.patch(model_of("gpt2"))
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    with pytest.raises(RuntimeError, match="must lie side by side"):
        results_of_compiled(model, {"input_ids": ids(1, 5), "attention_mask": mask, "use_cache": False}, mask.bool())


def test_plan_is_made_once_a_forward(model_of, monkeypatch):
    made = []
    plan = plans.PackPlan
    monkeypatch.setattr(plans, "PackPlan", lambda **fields: made.append(1) or plan(**fields))
    model = trunkline.patch(model_of("gpt2"))
    inputs = {"input_ids": ids(3, 11), **mask_of(MASKS["both"])}
    results(model, inputs, inputs["attention_mask"].bool())
    assert len(made) == 1
    model(**inputs)
    assert len(made) == 2


def test_dropout_is_drawn_from_the_seed():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0
    )
    model, tokens = trunkline.patch(transformers.GPT2LMHeadModel(config).train()), ids(2, 9)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(tokens).logits

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)


def test_only_this_model_changes_and_comes_back(model_of):
    model = BUILD["llama"]()
    other = copy.deepcopy(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    members = dict(vars(type(model.model.layers[0].self_attn)))
    assert trunkline.patch(model) is model
    assert trunkline.patch(model) is model  # once is enough
    assert model.config._attn_implementation == "trunkline"
    assert other.config._attn_implementation == implementation
    assert vars(type(model.model.layers[0].self_attn)) == members
    assert trunkline.unpatch(model) is model
    assert model.config._attn_implementation == implementation
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not patched"):
        trunkline.unpatch(model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_of_a_patched_model_is_one(copied, model_of):
    model, inputs = trunkline.patch(model_of("llama")), {"input_ids": ids(2, 5)}
    expected = model(**inputs).logits
    twin = copied(model)
    assert torch.equal(twin(**inputs).logits, expected)
    assert trunkline.attention_counts() == {"patch": 4}
    with pytest.raises(ValueError, match="output_attentions=True"):
        twin(**inputs, output_attentions=True)
    trunkline.unpatch(twin)
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "trunkline")
    assert not twin._forward_hooks
    assert not twin._forward_pre_hooks
    torch.testing.assert_close(twin(**inputs).logits, expected)
    assert trunkline.attention_counts() == {"patch": 4}
    assert torch.equal(model(**inputs).logits, expected)  # still patched
    assert trunkline.attention_counts() == {"patch": 6}
    trunkline.unpatch(model)


def test_a_pickled_model_is_patched_in_a_process_that_has_patched_none(model_of, tmp_path):
    model = trunkline.patch(model_of("gpt2"))
    tokens = ids(2, 5)
    (tmp_path / "model").write_bytes(pickle.dumps((model, tokens)))
    code = f"""
import pickle, torch
with open({str(tmp_path / "model")!r}, "rb") as file: model, tokens = pickle.load(file)
torch.save(model(tokens).logits, {str(tmp_path / "logits")!r})
import trunkline
assert trunkline.attention_counts() == {{"patch": 2}}, trunkline.attention_counts()
"""
    source = Path(__file__).resolve().parents[3] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), model(tokens).logits)


def test_a_model_with_the_configuration_of_a_patched_one(model_of):
    model = trunkline.patch(model_of("llama"))
    other = type(model)(copy.deepcopy(model.config))
    if other.config._attn_implementation == "trunkline":
        with pytest.raises(ValueError, match="made with the configuration of a patched one; patch it first"):
            trunkline.unpatch(other)
    trunkline.unpatch(trunkline.patch(other))
    assert other.config._attn_implementation == "sdpa"


def test_same_losses_under_trainer(tmp_path):
    pytest.importorskip("accelerate")
    examples = [{"input_ids": ids(5 + 3 * (i % 4)).tolist()} for i in range(16)]

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = [longest - len(row["input_ids"]) for row in rows]
        tokens = torch.tensor([row["input_ids"] + [1] * n for row, n in zip(rows, padding, strict=True)])
        mask = torch.tensor([[1] * (longest - n) + [0] * n for n in padding])
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    def losses(name: str, patched: bool) -> list[float]:
        torch.manual_seed(0)
        model = BUILD["llama"]()
        if patched:
            trunkline.patch(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=examples, data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses("plain", patched=False)
    assert losses("patched", patched=True) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 4
    assert expected[-1] < expected[0]
    assert trunkline.attention_counts() == {"patch": 8}
