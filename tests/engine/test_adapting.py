"""A run of adapters: what learns, what is saved, what goes on, and PEFT's files in and out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import make
from conftest import tiny_rows, write_jsonl
from trunkline import Engine, Task
from trunkline.engine.adapting import adapters_of
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.text.tokenizer import Tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 265  # bytes, three special tokens, six merges
TASKS = {
    "colour": {"head": "classify", "text": ["text"], "label": "label", "labels": ["red", "black", "white", "brown"]},
    "prose": {"head": "language-model", "text": ["text"]},
}
ROWS = tiny_rows("colour", 30, seed=1)
TEXT = "the red cat is in the barn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama with a tokenizer, and rows of two tasks."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    make("llama-text", vocab_size=VOCABULARY, max_position_embeddings=160).save_pretrained(folder / "llama")
    Tokenizer.train([TEXT] * 3, VOCABULARY).save(folder / "llama")
    for name in TASKS:
        write_jsonl(folder / f"{name}.jsonl", tiny_rows(name, 30, seed=0))
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> dict:
    return {
        "tasks": [
            {"name": name, "train": f"{name}.jsonl", "validation": f"{name}.jsonl", **TASKS[name]} for name in TASKS
        ],
        "init": str(folder / "llama"),
        "base": str(folder),
        "run": str(tmp_path / "run"),
        "steps": 4,
        "batch": {"tokens": 256, "max_length": 100},
        "evaluation": {"examples": 4, "every": 2},
        "device": "cpu",
        "adapters": {"rank": 4, "dropout": 0.1},
    }


def state(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if torch.equal(one[name], other[name])]


def fitted(settings: dict, **changes) -> Engine:
    engine = Engine(**{**settings, **changes})
    engine.fit()
    return engine


def randomised(engine: Engine) -> Engine:
    """With adapters that add something."""
    for layer in adapters_of(engine.model).layers.values():
        torch.nn.init.normal_(layer.up, std=0.1)
    return engine


@pytest.mark.parametrize("of", ["task", "shared", {"all": ["prose", "colour"]}], ids=str)
def test_adapters_and_heads_learn_and_the_trunk_stays(settings, of):
    engine = Engine(**{**settings, "adapters": {"rank": 4, "of": of}})
    before = state_before(engine)
    engine.fit()
    after = state(engine)
    kept = same(before, after)
    assert {name for name in after if name.startswith("trunk.")} <= set(kept)
    assert "vocabulary" in kept  # the checkpoint's
    learnt = [name for name in after if name.startswith("adapters.")] + ["weight", "bias"]
    assert not set(learnt) & set(kept)


def state_before(engine: Engine) -> dict[str, torch.Tensor]:
    engine.build(Tokenizer.load(engine.config.init, layout=engine.config.layout, grows=False))
    return state(engine)


def test_a_run_holds_adapters_and_heads_only(settings):
    engine = fitted(settings)
    run = Path(settings["run"])
    for file in (run / "model", run / "checkpoints" / "step-4", run / "checkpoints" / "best"):
        names = load_file(file / "model.safetensors")
        assert not [name for name in names if name.startswith(("trunk.", "vocabulary"))]
        assert any(name.startswith("adapters.") for name in names)
    for place in (run, run / "checkpoints" / "step-4"):
        loaded = Engine.load(place, device="cpu")
        assert same(state(engine), state(loaded)) == list(state(engine))
        assert loaded.predict([TEXT]) == engine.predict([TEXT])


def test_a_resumed_run_has_the_same_bits(settings, tmp_path):
    whole = fitted(settings, run=str(tmp_path / "whole"))
    engine = fitted(settings)
    for step in ("step-4",):
        for file in (Path(settings["run"]) / "checkpoints" / step).iterdir():
            file.unlink()
        (Path(settings["run"]) / "checkpoints" / step).rmdir()
    resumed = Engine(**settings)
    resumed.fit(resume=True)
    assert same(state(whole), state(resumed)) == list(state(whole))
    assert same(state(whole), state(engine)) == list(state(whole))


@pytest.mark.parametrize("changes", [{"checkpointing": "block"}, {"checkpointing": "selective"}])
def test_checkpointing_changes_no_bit(settings, changes, tmp_path):
    engine = fitted(settings, run=str(tmp_path / "plain"))
    assert same(state(engine), state(fitted(settings, **changes))) == list(state(engine))


def test_a_batch_in_parts_makes_the_same_step(settings, tmp_path, monkeypatch, capsys):
    """Of which some have no text of one of the tasks."""
    settings["adapters"] = {"rank": 4}  # dropout is drawn anew for every part
    whole = fitted(settings, run=str(tmp_path / "whole"))
    forward, present = MultiTaskModel.forward, []

    def limited(model, batch, *factor):
        if model.training and len(batch.tokens) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        present.append(batch.examples)
        return forward(model, batch, *factor)

    monkeypatch.setattr(MultiTaskModel, "forward", limited)
    parts = fitted(settings)
    assert "out of memory with" in capsys.readouterr().out
    assert any(0 in examples for examples in present)
    torch.testing.assert_close(state(parts), state(whole), rtol=0, atol=1e-5)


def test_a_trunk_that_changed_or_is_gone_is_named(settings, folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (folder / "llama").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    fitted(settings, init=str(copy))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"adapters are for a trunk of SHA-256 \w+, but '{copy}' has"):
        Engine.load(settings["run"])
    for file in copy.iterdir():
        file.unlink()
    copy.rmdir()
    with pytest.raises(ValueError, match=str(copy)):
        Engine.load(settings["run"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_reads_ours(settings, folder, tmp_path):
    engine = randomised(fitted(settings))
    engine.save_adapters(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "prose").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
        merged = engine.merge("prose").to_hugging_face(engine.model.vocabulary.detach()).eval()
        torch.testing.assert_close(merged(tokens).logits[0], expected, rtol=1e-5, atol=1e-5)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")(tokens).logits[0]
    assert (plain - expected).abs().max() > 1e-2


def test_what_is_saved_is_read_back(settings, tmp_path):
    engine = randomised(fitted(settings))
    engine.save_adapters(tmp_path / "out")
    other = Engine.load(settings["run"])
    other.load_adapter("colour", tmp_path / "out" / "colour")
    ours, theirs = adapters_of(engine.model), adapters_of(other.model)
    place = ours.names.index("colour")
    for key, layer in ours.layers.items():
        assert torch.equal(layer.up[place], theirs.layers[key].up[place])
        assert torch.equal(layer.down[place], theirs.layers[key].down[place])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: True is not covered"),
        ({"modules_to_save": ["score"]}, r"modules_to_save: \['score'\] is not covered"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not covered"),
        ({"r": 0}, "r: expected a number above 0, got 0"),
        ({"lora_alpha": None}, "lora_alpha: expected a number above 0, got None"),
        ({"r": 8}, r"another trunk: .* has A \[4, 48\]"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ],
    ids=str,
)
def test_what_an_adapter_may_not_be(settings, changes, message, tmp_path):
    engine = fitted(settings, steps=1)
    engine.save_adapters(tmp_path / "out")
    file = tmp_path / "out" / "colour" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"adapter {tmp_path}/out/colour: .*{message}"):
        engine.load_adapter("colour", tmp_path / "out" / "colour")


def test_a_damaged_or_foreign_adapter_is_found(settings, tmp_path):
    engine = fitted(settings, steps=1)
    engine.save_adapters(tmp_path)
    file, origin = tmp_path / "colour" / "adapter_model.safetensors", tmp_path / "colour" / "adapter_origin.json"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged: adapter_origin.json says SHA-256"):
        engine.load_adapter("colour", tmp_path / "colour")
    file.write_bytes(content)
    origin.write_text(json.dumps({**json.loads(origin.read_text()), "trunk": "0" * 64}))
    with pytest.raises(ValueError, match="another trunk: of SHA-256 '0000"):
        engine.load_adapter("colour", tmp_path / "colour")
    origin.unlink()
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({key.replace("layers.0", "layers.7").replace("layers.1", "layers.7"): tensors[key]}, file)
    with pytest.raises(ValueError, match=r"target 'model.layers.7.* is none of the trunk's adaptable layers"):
        engine.load_adapter("colour", tmp_path / "colour")
    with pytest.raises(ValueError, match="no adapter 'color'; there are colour, prose"):
        engine.load_adapter("color", tmp_path / "colour")


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"rank": 0}, "adapters.rank must be"),
        ({"alpha": 0}, "adapters.alpha must be"),
        ({"of": "tasks"}, "adapters.of must be task, shared or groups"),
        ({"of": {"one": ["colour"]}}, "task 'prose' is in no group"),
        ({"of": {"one": ["colour", "prose"], "two": ["prose"]}}, "task 'prose' is in one and two"),
        ({"of": {"one": ["colour", "prose", "colours"]}}, "one names 'colours'; did you mean 'colour'"),
        ({"layer": "all"}, "did you mean 'adapters.layers'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, adapters, message):
    with pytest.raises(ValueError, match=message):
        Engine(**{**settings, "adapters": adapters})


def test_a_layer_that_there_is_not_is_named_before_the_first_step(settings):
    engine = Engine(**{**settings, "adapters": {"layers": ["q_prj"]}})
    with pytest.raises(ValueError, match=r"adapters.layers: the trunk has no 'q_prj'; did you mean 'q_proj'"):
        engine.fit()


@pytest.mark.parametrize(
    ("layers", "parts"),
    [(["q_proj", "v_proj"], 4), (["blocks.1"], 7), (["blocks.0-1"], 14), (["mlp_in"], 4), (["blocks.0.qkv"], 3)],
    ids=str,
)
def test_layers_are_named_as_ours_or_theirs(settings, layers, parts):
    engine = Engine(**{**settings, "adapters": {"layers": layers}})
    state_before(engine)
    assert sum(len(layer.parts) for layer in adapters_of(engine.model).layers.values()) == parts


def test_own_adapters_are_not_balanced(settings):
    with pytest.raises(ValueError, match="adapters of their own share nothing"):
        Engine(**settings, balancing="pcgrad")
    fitted({**settings, "adapters": {"rank": 4, "of": "shared"}}, balancing="pcgrad", steps=2)


def test_a_merge_that_loses_too_much_is_refused(settings):
    engine = randomised(fitted(settings, steps=1))
    with torch.no_grad():
        for parameter in engine.model.trunk.parameters():
            parameter.copy_(parameter.bfloat16())
    engine.model.trunk.bfloat16()
    with pytest.raises(ValueError, match="merged and unmerged outputs of task 'prose' differ by"):
        engine.merge("prose")


@pytest.mark.parametrize("of", ["task", "shared"])
def test_a_task_is_added_without_a_bit_of_the_others_changing(settings, folder, tmp_path, of):
    engine = fitted({**settings, "adapters": {"rank": 4, "of": of}})
    before, answers = state(engine), engine.predict([TEXT], tasks=["colour"])
    own = adapters_of(engine.model).names
    write_jsonl(folder / "length.jsonl", [{"text": row["text"], "label": len(row["text"])} for row in ROWS])
    engine.add_task(Task("length", "regress", ("text",), "label", train="length.jsonl", validation="length.jsonl"))
    engine.fit(run=str(tmp_path / "second"))
    after, adapters = state(engine), adapters_of(engine.model)
    places = [adapters.names.index(name) for name in own]
    added = adapters.names.index("length")
    for name in before:
        if name.startswith("adapters."):
            assert torch.equal(before[name], after[name][places]), name
            assert "up" not in name or after[name][added].any(), name
    colours = [t for t, task in enumerate(engine.model.tasks) if task.name == "colour"]
    rows = torch.isin(engine.model.task_parameters()[0][1], torch.tensor(colours))
    assert torch.equal(before["weight"], after["weight"][rows])
    assert engine.predict([TEXT], tasks=["colour"]) == answers
    assert engine.model.spread.max() > 1  # in units of the new task's labels
    loaded = Engine.load(tmp_path / "second")
    assert loaded.predict([TEXT]) == engine.predict([TEXT])


def test_a_task_cannot_be_added_twice_or_without_adapters(settings):
    engine = fitted(settings, steps=1)
    with pytest.raises(ValueError, match="tasks names colour twice"):
        engine.add_task(engine.tasks[0])
    with pytest.raises(ValueError, match="add_task: without adapters"):
        fitted(settings, steps=1, adapters=None, run=f"{settings['run']}2").add_task(Task("x", "regress", ("t",), "l"))
