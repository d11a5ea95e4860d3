"""A trunk learns from books, of which nothing is lost and no two are mixed, and a run of many tasks starts from it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import tiny_rows, write_jsonl
from encoded import BYTES, END, TEXT, ids, made
from trunkline import Engine
from trunkline.training.config_file import load_config
from trunkline.training.data import corpus
from trunkline.training.data.corpus import load_corpus

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
TINY = [
    "trunk={hidden_size: 32, num_layers: 2, num_heads: 4, max_positions: 128, positions: rotary, exact_match: true}",
    "vocab_size=400",
    "steps=3",
    "batch={tokens: 256, max_length: 100}",
    "evaluation={every: 3, examples: 4, texts: 0}",
    "device=cpu",
]


def books(count: int, seed: int) -> list[str]:
    """Each has some hundred words."""
    lines = [row["text"] for row in tiny_rows("prose", 40 * count, seed)]
    return ["\n".join(lines[first : first + 40]) for first in range(0, len(lines), 40)]


@pytest.fixture
def library(tmp_path) -> Path:
    """A folder laid out like the hub with books/, in two files."""
    (tmp_path / "books").mkdir()
    texts = books(6, seed=0)
    texts[5] += " zebra" * 20
    files = {"train-00000-of-00002": texts[:4], "train-00001-of-00002": texts[4:]}
    for name, own in (files | {"validation-00000-of-00001": books(2, seed=1)}).items():
        columns = {"title": [f"Farm {i}" for i in range(len(own))], "author": ["A. Hen"] * len(own), "text": own}
        pq.write_table(pa.table(columns), tmp_path / "books" / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize("max_length", [10, 50, 51, 1000])
def test_a_book_is_cut_into_pieces_that_lose_nothing_and_mix_nothing(max_length):
    texts = ["a" * 49 + "z", "b", "c" * 200]
    encoded = made(TEXT, max_length, tokenizer=BYTES, text=texts)
    pieces = [encoded.tokens_of(i).tolist() for i in range(len(encoded))]
    assert max(map(len, pieces)) <= max_length
    predicted = [token for piece in pieces for token in piece[1:]]
    assert predicted == [token for text in texts for token in [*ids(text), END]]  # every token once
    inner = [set(piece) - {END} for piece in pieces]
    assert all(len(letters - set(ids("z"))) <= 1 for letters in inner)
    assert all(END not in piece[1:-1] for piece in pieces)


def test_a_tokenizer_is_trained_on_as_much_of_a_corpus_as_it_takes(library, monkeypatch):
    config = load_config(CONFIGS / "pretrain.yaml", [f"data={library}", *TINY])
    whole = load_corpus(config).tokenizer
    monkeypatch.setattr(corpus, "TOKENIZER_CHARACTERS", 100)
    first = load_corpus(config).tokenizer
    assert len(ids(" zebra", whole)) == 1 < len(ids(" zebra", first))  # only the last book has one


def test_a_run_of_many_tasks_starts_from_a_trunk_that_has_read_books(library, one_thread):
    pretrain = load_config(CONFIGS / "pretrain.yaml", [f"data={library}", f"run={library / 'pretrain'}", *TINY])
    summary = Engine.from_config(pretrain).fit()
    task = summary["tasks"]["books"]
    assert task["train_examples"] > 6 * 3  # pieces, not books
    assert task["truncated"] == 0
    assert set(task["metrics"]) == {"loss", "perplexity"}
    learnt = Engine.load(library / "pretrain", device="cpu")

    rows = tiny_rows("colour", 20, seed=0)
    write_jsonl(library / "colour.jsonl", rows)
    retold = tiny_rows("retell", 20, seed=0)
    write_jsonl(library / "retell.jsonl", retold)
    (library / "many.yaml").write_text(
        """
tasks:
- {name: colour, head: classify, text: [text], label: label, labels: [red, black, white, brown], train: colour.jsonl,
   validation: colour.jsonl}
- {name: retell, head: generate, text: [document], label: summary, max_target_tokens: 12, train: retell.jsonl,
   validation: retell.jsonl}
trunk: {dropout: 0.2}
steps: 2
batch: {tokens: 256, max_length: 100}
evaluation: {every: 1, examples: 4, texts: 0}
search: {max_new_tokens: 8}
device: cpu
"""
    )
    settings = [f"init={library / 'pretrain'}", f"run={library / 'many'}"]
    engine = Engine.from_config(load_config(library / "many.yaml", settings))
    engine.build(learnt.tokenizer)
    for name, weight in learnt.model.trunk.state_dict().items():
        assert torch.equal(weight, engine.model.trunk.state_dict()[name]), name
    assert engine.config.trunk.dropout == 0.2
    many = Engine.from_config(load_config(library / "many.yaml", settings))
    scores = many.fit()["tasks"]
    assert many.tokenizer.digest == learnt.tokenizer.digest
    moved = many.model.trunk.blocks[0].qkv.weight - learnt.model.trunk.blocks[0].qkv.weight
    assert 0 < moved.abs().max() < 0.05
    assert np.isfinite(scores["retell"]["last_loss"])
    saved = json.loads((library / "many" / "model" / "engine.json").read_text())
    assert saved["trunk"]["exact_match"]  # what it starts from says what the trunk is
