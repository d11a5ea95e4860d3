"""Comparisons from pretrained starts: each system starts where it is told, spends what it may, is asked the same."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch

from conftest import TINY_TASKS, tiny_rows, write_jsonl
from trunkline import Engine, TrunkConfig
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk
from trunkline.training.compare.compare import compare
from trunkline.training.compare.comparison import load_comparison
from trunkline.training.compare.comparison_tables import cell
from trunkline.training.compare.starts import budget
from trunkline.training.compare.starts.cut_checkpoint import kept_blocks
from trunkline.training.compare.starts.held_out import book_pieces, language_loss
from trunkline.training.compare.systems import SYSTEMS

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = """
vocab_size: 400
lowercase: true
steps: 4
batch: {tokens: 256, max_length: 64}
evaluation: {every: 4, examples: 4, texts: 2, last_examples: 6}
search: {max_new_tokens: 4}
seeds: [0]
device: cpu
split: test
budget: FLOPs
prompts: {colour: "{text} Its colour is", retell: "{document} Summary:"}
start:
  multitask: {init: causal, about: a farm, adapters: {rank: 2, of: shared}}
  single-task: {init: causal, adapters: {rank: 2}}
  multitask-small: {init: causal, blocks: "0, 3", why: the ends, warm_up: 0.25}
  bert: {init: both-ways}
  bilstm-attention: {vectors: vectors.txt, hidden_size: 32}
"""
COMMON = {"vocab_size": 320, "hidden_size": 32, "num_heads": 4, "max_positions": 96}
SHAPES = {
    "causal": {"num_layers": 4, "positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False},
    "both-ways": {
        "num_layers": 2,
        "norm_position": "post",
        "norm_eps": 1e-12,
        "embedding_norm": True,
        "causal": False,
        "token_types": 2,
    },
}


def tokenizer_of(name: str, texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Of 320 entries; the one of an encoder puts a text between [CLS] and [SEP]."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>"] if name == "causal" else ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=320, **options))
    if name != "causal":
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return inner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """compare.yaml with its data, starts/ with two checkpoints and word vectors, and data/books/."""
    folder = tmp_path_factory.mktemp("started")
    tasks, texts = "", []
    for name in ("colour", "retell"):
        for number, split in enumerate(("train", "validation", "test")):
            rows = tiny_rows(name, 8 if number else 40, seed=number)
            texts += [str(value) for row in rows for value in row.values()]
            write_jsonl(folder / f"{name}-{split}.jsonl", rows)
        files = f"name: {name}, train: {name}-train.jsonl, validation: {name}-validation.jsonl"
        tasks += f"- {{{files}, {TINY_TASKS[name][1:]}\n"
    (folder / "compare.yaml").write_text(f"tasks:\n{tasks}{SETTINGS}")
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        Trunk(TrunkConfig(**COMMON, **shape)).save_pretrained(folder / "starts" / name)
        tokenizer_of(name, texts).save(str(folder / "starts" / name / "tokenizer.json"))
    numbers = " ".join(["0.5"] * 8)
    (folder / "starts" / "vectors.txt").write_text(f"the {numbers}\nred {numbers}\n")
    (folder / "data" / "books").mkdir(parents=True)
    book = " ".join(row["text"] for row in tiny_rows("colour", 300, seed=9))
    pq.write_table(pa.table({"text": [book]}), folder / "data" / "books" / "validation-0.parquet")
    return folder


def load(folder: Path, run: Path, *values: str) -> Any:
    places = [f"run={run}", f"starts={folder / 'starts'}", f"data={folder / 'data'}"]
    return load_comparison(folder / "compare.yaml", [*places, *values])


@pytest.fixture(scope="module")
def finished(folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison. Not to be changed."""
    run = tmp_path_factory.mktemp("compared") / "farm"
    compare(load(folder, run))
    return run


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The runs that are to be trained from here on; they fail."""
    calls = []

    def failing(engine: Engine, **options: Any) -> dict[str, Any]:
        calls.append(Path(engine.config.run))
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(Engine, "fit", failing)
    return calls


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "comparison.json").read_text())


def test_every_system_starts_where_it_is_told(folder, finished):
    results = results_of(finished)
    assert {name: about["seeds"]["0"]["state"] for name, about in results["systems"].items()} == dict.fromkeys(
        SYSTEMS, "finished"
    )
    about = {name: about["about"] for name, about in results["systems"].items()}
    assert about["multitask"].startswith("starts from Llama, ")
    assert about["multitask"].endswith("; a farm")
    assert about["multitask-small"].endswith("blocks 0, 3 of 4 are kept: the ends")
    assert about["bert"].startswith("starts from Bert, ")
    assert "word vectors of vectors.txt" in about["bilstm-attention"]
    original = Trunk.from_pretrained(folder / "starts" / "causal")
    engine = Engine.load(finished / "multitask" / "seed-0" / "all", device="cpu")
    assert torch.equal(engine.model.trunk.tokens.weight, original.tokens.weight)  # adapters leave the trunk alone
    assert engine.config.adapters is not None
    assert [task.head for task in Engine.load(finished / "bert" / "seed-0" / "all").tasks] == ["classify", "extract"]
    vectors = Engine.load(finished / "bilstm-attention" / "seed-0" / "all").model.embedding.weight
    assert (vectors[:, :8].mean(1) - 0.5).abs().min() < 0.02  # of 'the' or 'red', after a few steps


def test_a_cut_keeps_whole_blocks_and_is_healed_within_its_budget(folder, finished):
    original = Trunk.from_pretrained(folder / "starts" / "causal")
    small = Trunk.from_pretrained(finished / "starts" / "multitask-small")
    assert len(small.blocks) == 2
    for block, of in zip(small.blocks, (0, 3), strict=True):
        for name, weight in block.state_dict().items():
            assert torch.equal(weight, original.blocks[of].state_dict()[name]), name
    assert torch.equal(small.final_norm.weight, original.final_norm.weight)
    result = results_of(finished)["systems"]["multitask-small"]["seeds"]["0"]
    assert set(result["parts"]) == {"warm-up", "all"}
    assert result["parts"]["warm-up"] == round(0.25 * result["steps"])
    warm_up = json.loads((finished / "multitask-small" / "seed-0" / "warm-up" / "summary.json").read_text())
    assert {task["head"] for task in warm_up["tasks"].values()} == {"language-model"}


def test_budgets_are_matched_to_a_step(finished):
    systems = {name: about["seeds"]["0"] for name, about in results_of(finished)["systems"].items()}
    wanted = systems["multitask"]["training_flops"]
    assert systems["multitask"]["steps"] == 4
    for name, result in systems.items():
        of_step = result["training_flops"] / result["steps"]
        assert abs(result["training_flops"] - wanted) < of_step + 0.1 * wanted, name  # a step, and how full batches are
    assert systems["bert"]["steps"] > 4


def test_steps_go_by_what_a_step_takes_and_are_kept(folder, tmp_path, monkeypatch, fitted, capsys):
    """With seconds that are made up: another machine, which is slower, goes on with the same steps."""
    seconds = {"bert": 0.5}
    monkeypatch.setitem(budget.MEASURES, "seconds", lambda part, _: seconds.get(Path(part.config.run).name, 1.0))
    monkeypatch.setattr(budget, "parts_of", lambda system, basis, *_: [budget.Part(system, named(basis, system))])

    def named(basis: Any, system: str) -> Any:
        return basis.run(Path(system), 0)

    values = ("budget=seconds", "systems=[bert]", "prompts={}", f"kept={tmp_path / 'kept'}")
    compare(load(folder, tmp_path / "run", *values))
    assert json.loads((tmp_path / "kept" / "budget.json").read_text()) == {"seconds": {"multitask": 1.0, "bert": 0.5}}
    seconds["bert"] = 4.0
    compare(load(folder, tmp_path / "other", *values))
    assert len(fitted) == 2
    said = capsys.readouterr()
    assert (said.out + said.err).count("bert makes 8 steps") == 2  # of half a second, where multitask makes 4 of one


def test_tables_say_what_was_found(finished):
    results, text = results_of(finished), (finished / "comparison.md").read_text()
    assert "Scores on the test splits" in text
    assert "budgets matched by FLOPs" in text
    assert "| zero-shot | " in text
    assert "How far multitask is ahead of each" in text
    assert set(results["forgetting"]) == {
        "multitask",
        "single-task",
        "multitask-small",
    }  # not of those that read both ways
    page = (finished / "comparison.html").read_text()
    for place in ("ahead", "forgetting", "learning"):
        assert f'id="{place}"' in page
    assert page.count('aria-label="Score on') == 4  # two tasks over tokens and over seconds


def test_the_test_splits_are_scored_and_validation_is_kept(folder, finished):
    record = json.loads((finished / "parts" / "bert-seed-0-all-test.json").read_text())
    about, said = record["summary"]["tasks"]["colour"], record["predictions"]["colour"]
    rows = tiny_rows("colour", 8, seed=2)
    names = ["red", "black", "white", "brown"]
    labels = [row["label"] if isinstance(row["label"], int) else names.index(row["label"]) for row in rows]
    assert said["references"] == [labels[i] for i in said["examples"]]
    right = np.mean([p == r for p, r in zip(said["predictions"], said["references"], strict=True)])
    assert about["metrics"]["accuracy"] == pytest.approx(right)
    assert "accuracy" in about["validation_metrics"]
    text = json.dumps(record["predictions"]["retell"])
    assert rows[0]["text"] not in json.dumps(record)  # the data is not anybody's to hand on
    assert len(record["predictions"]["retell"]["values"][""]) == 6, text


def test_the_other_split_is_scored_without_training(folder, finished, tmp_path, fitted):
    again = shutil.copytree(finished, tmp_path / "farm")
    results = compare(load(folder, again, "split=validation", "systems=[multitask]"))
    assert fitted == []
    summary = json.loads((finished / "multitask" / "seed-0" / "all" / "summary.json").read_text())
    scores = results["systems"]["multitask"]["seeds"]["0"]["scores"]
    assert scores == {name: task["metrics"] for name, task in summary["tasks"].items()}


def test_forgetting_is_the_loss_of_book_text(folder, finished):
    """Of the checkpoint itself, by the definition: -log softmax of every next token, of 96 tokens a piece."""
    books = book_pieces(load(folder, finished))
    engine = Engine.load(finished / "multitask" / "seed-0" / "all", device="cpu")
    trunk, tokenizer = Trunk.from_pretrained(folder / "starts" / "causal"), engine.known_tokenizer
    losses = []
    for text in books:
        ids = np.array([tokenizer.end, *tokenizer.encode([text])[0][0]])[:96]
        tokens = torch.from_numpy(ids).long()
        log_p = next_tokens(trunk, tokens)
        losses.append(-log_p[:-1].gather(1, tokens[1:, None]))
    expected = float(torch.cat(losses).mean())
    assert results_of(finished)["forgetting"]["multitask"]["before"] == pytest.approx(expected, rel=1e-4)
    after = results_of(finished)["forgetting"]["multitask"]["after"]["mean"]
    assert after == pytest.approx(language_loss(engine, 0, books), rel=1e-5)
    assert after != pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def next_tokens(trunk: Trunk, tokens: torch.Tensor) -> torch.Tensor:
    """(T, V) log-probabilities of what follows each token of one text."""
    plan = pack([Example(0, tokens.numpy(), np.array([0]))], 1).plan
    return (trunk(tokens, torch.arange(len(tokens)), plan) @ trunk.tokens.weight.T).log_softmax(-1)


def test_zero_shot_takes_the_class_whose_name_is_the_likeliest_to_follow(folder, finished):
    trunk = Trunk.from_pretrained(folder / "starts" / "causal")
    tokenizer = Engine.load(finished / "multitask" / "seed-0" / "all", device="cpu").known_tokenizer
    entry = json.loads((finished / "parts" / "zero-shot-colour-test.json").read_text())
    rows = tiny_rows("colour", 8, seed=2)
    for i, said in zip(entry["examples"], entry["predictions"], strict=True):
        scores = []
        for name in ("red", "black", "white", "brown"):
            start, end = (ids for ids, _ in tokenizer.encode([f"{rows[i]['text']} Its colour is", f" {name}"]))
            tokens = torch.from_numpy(np.concatenate([start, end])).long()
            log_p = next_tokens(trunk, tokens)
            scores.append(float(log_p[:-1].gather(1, tokens[1:, None])[len(start) - 1 :].mean()))
        assert said == int(np.argmax(scores))


def test_records_made_elsewhere_count(folder, finished, tmp_path, fitted):
    kept = shutil.copytree(finished / "parts", tmp_path / "kept")
    results = compare(load(folder, tmp_path / "run", f"kept={kept}"))
    assert fitted == []
    assert results["table"] == results_of(finished)["table"]
    with pytest.raises(ValueError, match=r"kept.multitask-seed-0-all-test.json is no record .* steps: 4 in .*, 5 now"):
        compare(load(folder, tmp_path / "other", f"kept={kept}", "steps=5"))


def test_a_start_that_has_changed_is_refused(folder, finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / "farm")
    starts = shutil.copytree(folder / "starts", tmp_path / "starts")
    trunk = Trunk.from_pretrained(starts / "both-ways")
    with torch.no_grad():
        trunk.tokens.weight[0, 0] += 1
    trunk.save_pretrained(starts / "both-ways")
    with pytest.raises(ValueError, match="the start of bert has changed since the comparison was begun: SHA-256"):
        compare(load(folder, again, f"starts={starts}"))


def test_a_failed_part_is_a_failed_cell_and_the_next_goes_on(folder, finished, tmp_path, fitted):
    """The run of the next is there, but its record is not."""
    again = shutil.copytree(finished, tmp_path / "farm")
    shutil.rmtree(again / "single-task" / "seed-0" / "colour")
    for task in ("colour", "retell"):
        (again / "parts" / f"single-task-seed-0-{task}-test.json").unlink()
    results = compare(load(folder, again))
    assert fitted == [again / "single-task" / "seed-0" / "colour"]
    assert cell(results, "colour", "single-task") == "failed"
    assert cell(results, "retell", "single-task") == cell(results_of(finished), "retell", "single-task")
    assert (
        "single-task, seed 0: FloatingPointError: the loss is not finite (in part 'colour')"
        in (again / "comparison.md").read_text()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["start.multitask.init=both-ways"],
            "start.multitask: task 'retell' predicts next tokens, which needs a causal",
        ),
        (["start.bert.init=causal"], "start.bert: it reads in both directions, and the trunk of 'causal' is causal"),
        (["start.bert.init=berta"], "start.bert: there is no folder 'berta' in .*starts, which has both-ways, causal"),
        (["start.bert.init=''"], "start.bert: init is missing"),
        (["start.multitask-small.blocks='4-5'"], "names block 4, and the checkpoint has 0 to 3"),
        (["start.multitask-small.blocks='2-1'"], "'2-1' leaves no block of the checkpoint's 4"),
        (["start.bilstm-attention.vectors=vectors"], "start.bilstm-attention: vectors .*vectors is no file"),
        (
            ["start.bert.batch={tokens: 100000, max_length: 64}", "budget=tokens"],
            "budgets cannot be matched: of 1.02 k tokens, bert gets 0 steps of 100 k tokens, and needs 2 at least",
        ),
    ],
)
def test_starts_that_cannot_be_are_named_before_any_training(folder, tmp_path, fitted, values, message):
    with pytest.raises(ValueError, match=message):
        compare(load(folder, tmp_path / "run", *values))
    assert fitted == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["systems=[multitask]", "start={bert: {init: both-ways}}"], "not of 'multitask'"),
        (["start.brt={init: both-ways}"], "start names 'brt'; the systems are multitask"),
        (["trunk=tiny"], "leave trunk out"),
        (["adapters={rank: 2}"], "adapters is said of every system by itself: leave it out"),
        (["start={}"], "budget and prompts are of comparisons with `start`"),
        (["start.bert.vectors=vectors.txt"], "init and vectors are two starts"),
        (["start.bilstm-attention.projection=pooler"], "projection is of a checkpoint"),
        (["start.bert={init: both-ways, projection: pooler, warm_up: 0.1}"], "a warm_up does not hand on"),
        (["prompts={color: '{text}'}"], "prompts names 'color'"),
        (["prompts={colour: '{sentence}'}"], "prompts.colour must have columns of the task in braces, {text}"),
    ],
)
def test_settings_that_cannot_be_are_named(folder, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path / "run", *values)


def test_split_test_needs_a_name_for_it(folder, tmp_path, fitted):
    labels = "labels: [red, black, white, brown], train: colour-train.jsonl, validation: 0.2"
    task = f"tasks=[{{name: colour, head: classify, text: [text], label: label, {labels}}}]"
    comparison = load(folder, tmp_path / "run", task, "prompts={}", "systems=[multitask]")
    with pytest.raises(ValueError, match="that of task 'colour' is 0.2"):
        compare(comparison)
    assert fitted == []


@pytest.mark.parametrize(
    ("blocks", "kept"), [("", [0, 1, 2, 3]), ("0-1,3", [0, 1, 3]), (" 2 ", [2])], ids=lambda value: str(value)
)
def test_blocks_are_spans(blocks, kept):
    assert kept_blocks(blocks, 4) == kept


@pytest.mark.parametrize("blocks", ["1,0", "0-1,1", "-1", "all"])
def test_blocks_that_are_none_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks"):
        kept_blocks(blocks, 4)
