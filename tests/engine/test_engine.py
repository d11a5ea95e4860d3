"""The engine: one pass of the trunk for all tasks, answers in the order of the texts, back from disk bit for bit."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conftest import tiny_rows, write_jsonl
from trunkline import Engine, Task, Trunk, TrunkConfig
from trunkline.engine.config import Config
from trunkline.engine.network.generate import Search
from trunkline.engine.settings import Batch, Evaluation, Mixing, Optimizer
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.kernels.attention import attention_elsewhere

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = TrunkConfig(hidden_size=32, num_layers=2, num_heads=4, max_positions=160)
COLOURS = ("red", "black", "white", "brown")
TAGS = ("article", "adjective", "noun", "verb")
SHORT = "the red cat is in the barn"
TEXTS = [SHORT, "owl", " ".join([SHORT] * 20), "the brown fox", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]


@pytest.fixture(scope="module")
def engine(lively: Path) -> Engine:
    """Of six tasks. Not to be changed."""
    return Engine.load(lively, device="cpu")


def one_step(folder: Path, **settings) -> Engine:
    """An engine that has not been trained, on its way to a single step."""
    write_jsonl(folder / "rows.jsonl", tiny_rows("colour", 30, seed=0))
    task = Task("colour", "classify", ("text",), "label", COLOURS, train="rows.jsonl", validation="rows.jsonl")
    defaults = {"trunk": SHAPE, "tasks": [task], "steps": 1, "device": "cpu"}
    sizes = {"batch": Batch(tokens=256, max_length=100), "evaluation": Evaluation(examples=4)}
    if "tokenizer" not in settings:
        defaults["vocab_size"] = 400
    return Engine(**{**defaults, **sizes, "run": str(folder / "run"), "base": str(folder), **settings})


def test_scores_are_those_of_the_run(finished):
    summary = json.loads((finished.run / "summary.json").read_text())["tasks"]
    engine = Engine.load(finished.run, device="cpu")
    scores = engine.evaluate()
    assert scores == {name: pytest.approx(task["metrics"], abs=1e-5) for name, task in summary.items()}
    fewer = engine.evaluate(examples=3)
    assert fewer["closeness"]["loss"] != pytest.approx(scores["closeness"]["loss"], abs=1e-5)


# Training


def test_an_engine_without_weights_says_so(tmp_path):
    engine = one_step(tmp_path)
    uses = [lambda: engine.predict([SHORT]), lambda: engine.save(tmp_path), lambda: engine.model, engine.evaluate]
    for use in uses:
        with pytest.raises(ValueError, match=r"no weights yet: call fit\(\), or Engine.load"):
            use()


def test_fit_returns_the_summary_and_changes_settings(tmp_path):
    engine = one_step(tmp_path)
    summary = engine.fit(steps=2, seed=3)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], engine.config.steps, engine.config.seed) == (2, 2, 3)
    assert engine.config.trunk.vocab_size == engine.tokenizer.vocab_size
    assert engine.predict([SHORT]).keys() == {"colour"}


@pytest.mark.parametrize("change", ["tasks", "trunk", "projection", "label_smoothing", "tokenizer", "device"])
def test_what_an_engine_is_made_from_cannot_be_changed(tmp_path, change):
    with pytest.raises(ValueError, match=f"fit: {change} cannot be changed"):
        one_step(tmp_path).fit(**{change: getattr(Config(tasks=("sst2",)), change)})
    assert not (tmp_path / "run").exists()


def test_fitting_again_goes_on_from_the_weights(tmp_path):
    engine = one_step(tmp_path)
    engine.fit()
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    summary = engine.fit(overwrite=True, optimizer=Optimizer(learning_rate=0.0))
    assert summary["steps"] == 1
    torch.testing.assert_close(engine.model.state_dict(), before, rtol=0, atol=0)


def test_a_trunk_brings_its_weights(tmp_path):
    trunk = Trunk(replace(SHAPE, vocab_size=500))
    before = trunk.tokens.weight.detach().clone()
    engine = one_step(tmp_path, trunk=trunk)
    assert engine.config.trunk == trunk.config
    engine.fit(optimizer=Optimizer(learning_rate=0.0))
    assert engine.model.trunk is trunk
    assert torch.equal(trunk.tokens.weight, before)
    assert Engine.load(engine.save(tmp_path / "saved")).config.trunk.vocab_size == 500


def test_a_trunk_with_too_few_entries_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer has 321 entries, more than the trunk's vocabulary of 300"):
        one_step(tmp_path, trunk=Trunk(replace(SHAPE, vocab_size=300))).fit()


def test_a_tokenizer_is_taken_as_it_is(tmp_path):
    tokenizer = Tokenizer.train(["the red cat is in the barn"] * 3, 300)
    engine = one_step(tmp_path, tokenizer=tokenizer)
    engine.fit()
    assert engine.tokenizer.digest == tokenizer.digest
    assert Engine.load(tmp_path / "run").tokenizer.digest == tokenizer.digest
    path = tmp_path / "run" / "tokenizer.json"
    again = one_step(tmp_path, tokenizer=str(path), run=str(tmp_path / "again"))
    again.fit()
    assert again.tokenizer.digest == tokenizer.digest
    for given in (tokenizer, str(path)):
        with pytest.raises(ValueError, match="vocab_size is of a tokenizer that is trained"):
            one_step(tmp_path, tokenizer=given, vocab_size=400)


def test_presets_and_seeds(tmp_path):
    assert one_step(tmp_path, trunk="tiny").config.trunk.hidden_size == 256
    with pytest.raises(ValueError, match="trunk 'huge' is no preset"):
        one_step(tmp_path, trunk="huge")
    tokenizer = Tokenizer.train(["the red cat is in the barn"], 300)
    first, same, other = (one_step(tmp_path, seed=seed).build(tokenizer).state_dict() for seed in (1, 1, 2))
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first["trunk.tokens.weight"], other["trunk.tokens.weight"])


# Disk


def test_a_saved_engine_is_weights_and_json(engine, tmp_path):
    folder = engine.save(tmp_path / "some" / "where")
    assert sorted(path.name for path in folder.iterdir()) == ["engine.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((folder / "engine.json").read_text()).keys() == asdict(engine.config).keys()
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(engine.model.state_dict())


def test_a_loaded_engine_is_the_saved_one_bit_for_bit(engine, tmp_path):
    loaded = Engine.load(engine.save(tmp_path), device="cpu")
    assert loaded.config == engine.config
    assert loaded.tasks == engine.tasks
    torch.testing.assert_close(loaded.model.state_dict(), engine.model.state_dict(), rtol=0, atol=0)
    pairs = [(row["first"], row["second"]) for row in tiny_rows("closeness", 12, seed=8)]
    assert loaded.predict(pairs, ["closeness", "where"]) == engine.predict(pairs, ["closeness", "where"])
    assert loaded.predict(TEXTS, ["colour", "parts"]) == engine.predict(TEXTS, ["colour", "parts"])
    assert loaded.generate(TEXTS, "retell") == engine.generate(TEXTS, "retell")


def test_settings_of_every_kind_come_back(tmp_path):
    engine = one_step(
        tmp_path,
        trunk=replace(SHAPE, num_kv_heads=2, positions="rotary", norm="rms", activation="swiglu"),
        projection="tanh",
        mixing=Mixing("proportional"),
        optimizer=Optimizer(clip=0.5),
        search=Search(max_new_tokens=3, beams=2),
    )
    engine.fit()
    loaded = Engine.load(tmp_path / "run")
    assert loaded.config == replace(engine.config, device="auto")
    assert loaded.predict(TEXTS, ["colour"]) == engine.predict(TEXTS, ["colour"])


def test_a_run_folder_and_its_model_are_the_same_engine(finished):
    run, model = Engine.load(str(finished.run), device="cpu"), Engine.load(finished.run / "model", device="cpu")
    assert run.config == model.config
    torch.testing.assert_close(run.model.state_dict(), model.model.state_dict(), rtol=0, atol=0)


def test_other_folders_are_not_loaded(finished, tmp_path):
    for folder in (tmp_path, tmp_path / "absent", finished.run / "checkpoints"):
        with pytest.raises(ValueError, match="has no engine.json: it is neither a saved engine nor a run|is no folder"):
            Engine.load(folder)


# Tasks of the user's, end to end

NOUNS = (
    "anchor basket candle dagger engine feather guitar hammer island jacket kettle lantern mirror needle orchid "
    "pillow quartz ribbon saddle turnip"
).split()


def memorable() -> list[dict]:
    """Twenty rows whose labels follow no rule; the first word tells the row."""
    rng, rows = random.Random(0), []
    for first in NOUNS:
        words = [first, *rng.sample([noun for noun in NOUNS if noun != first], 5)]
        rows.append(
            {
                "text": " ".join(words),
                "tags": [rng.choice("abc") for _ in words],
                "question": f"what of {first} ?",
                "answer": " ".join(words[rng.randrange(1, 4) :][: rng.randint(1, 2)]),
                "two": " ".join(rng.sample(NOUNS, 2)),
            }
        )
    return rows


def test_own_tasks_learn_their_training_rows_by_heart(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", memorable())
    files = {"train": "rows.jsonl", "validation": "rows.jsonl"}
    tasks = [
        Task("kind", "tag", ("text",), "tags", ("a", "b", "c"), **files),
        Task("part", "span", ("question", "text"), "answer", **files),
        Task("two", "generate", ("text",), "two", max_target_tokens=16, **files),
    ]
    engine = Engine(
        TrunkConfig(hidden_size=64, num_layers=2, num_heads=4, max_positions=128),
        tasks,
        vocab_size=400,
        steps=120,
        batch=Batch(tokens=512, max_length=64),
        optimizer=Optimizer(learning_rate=5e-3),
        evaluation=Evaluation(every=120),
        search=Search(max_new_tokens=16),
        run=str(tmp_path / "run"),
        base=str(tmp_path),
        device="cpu",
    )
    summary = engine.fit()
    rows, texts = memorable(), [row["text"] for row in memorable()]
    tags = engine.predict(texts, ["kind"])["kind"]
    right = [a == b for row, own in zip(rows, tags, strict=True) for a, b in zip(row["tags"], own, strict=True)]
    assert sum(right) >= 0.97 * len(right)
    spans = engine.predict([(row["question"], row["text"]) for row in rows], ["part"])["part"]
    assert sum(row["answer"] == span for row, span in zip(rows, spans, strict=True)) >= 19
    written = engine.generate(texts, "two")
    assert sum(row["two"] == text for row, text in zip(rows, written, strict=True)) >= 19
    scores = {name: task["metrics"] for name, task in summary["tasks"].items()}
    assert scores["kind"]["tag_accuracy"] == pytest.approx(sum(right) / len(right))
    assert scores["part"]["span_exact"] >= 0.95
    assert scores["two"]["rouge1"] >= 0.95


def test_a_step_with_flash_attn_is_not_compiled(tmp_path, monkeypatch):
    """Its part of a batch is chosen on the host, which one graph for the whole step does not allow."""
    engine = one_step(tmp_path)
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    assert engine.compiles
    monkeypatch.setattr(attention_elsewhere, "FORCED", "flash_attn")
    assert not engine.compiles
    with pytest.raises(ValueError, match="TRUNKLINE_LONG_ATTENTION=flash_attn cannot be compiled"):
        _ = one_step(tmp_path, compile=True).compiles
