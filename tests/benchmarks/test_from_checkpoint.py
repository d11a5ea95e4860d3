"""The plain Hugging Face loop that fine-tuning is compared with: its model, its budget, its scores, its pace."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from conftest import tiny_rows, write_jsonl
from encoded import bert
from trunkline.benchmarks.learning.from_checkpoint import Peer, peer
from trunkline.benchmarks.systems import fine_tuning_pace
from trunkline.engine.config import Config, config_from
from trunkline.training.data.corpus import load_corpus

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TASKS = {
    "colour": {"head": "classify", "text": ["text"], "label": "label", "labels": ["red", "black", "white", "brown"]},
    "closeness": {"head": "regress", "text": ["first", "second"], "label": "score"},
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two tasks on a BERT of two blocks that knows letters."""
    inner = bert(LETTERS).inner
    special = [(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    shape = transformers.BertConfig(vocab_size=inner.get_vocab_size(), **SHAPE)
    transformers.BertModel(shape).save_pretrained(tmp_path / "bert")
    inner.save(str(tmp_path / "bert" / "tokenizer.json"))
    for name in TASKS:
        write_jsonl(tmp_path / f"{name}.jsonl", tiny_rows(name, 80, seed=0))
    files = {name: {"train": f"{name}.jsonl", "validation": f"{name}.jsonl"} for name in TASKS}
    tasks = [{"name": name, **files[name], **fields} for name, fields in TASKS.items()]
    bert_of = str(tmp_path / "bert")
    return config_from({"tasks": tasks, "base": str(tmp_path), "init": bert_of, "batch": {"max_length": 128}})


def test_padding_and_token_types_are_those_of_each_example(config):
    corpus = load_corpus(config)
    model = Peer(config.init, corpus.train).eval()
    task = [task.name for task in corpus.tasks].index("closeness")
    split, members = corpus.train[task], [0, 5, 9]
    assert len({int(split.lengths[i]) for i in members}) > 1
    theirs = transformers.BertModel.from_pretrained(config.init).eval()
    with torch.no_grad():
        expected = []
        for i in members:
            ids = torch.from_numpy(split.tokens_of(i).astype("int64"))
            second = (ids == ids[-1]).nonzero()[0, 0] + 1  # after the first [SEP]
            types = (torch.arange(len(ids)) >= second).long()
            expected.append(model.heads[task](theirs(ids[None], token_type_ids=types[None]).pooler_output[0]))
        torch.testing.assert_close(model(split, task, members), torch.stack(expected))


def test_it_stops_at_its_budget_and_is_scored_on_every_task(config):
    measured = peer(config, config.init, seed=0, tokens=3000, examples=20)
    longest_step = 32 * 80
    assert 3000 <= measured["real_tokens"] < 3000 + longest_step
    assert measured["scores"].keys() == measured["metrics"].keys() == set(TASKS)
    assert measured == peer(config, config.init, seed=0, tokens=3000, examples=20)
    assert measured != peer(config, config.init, seed=1, tokens=3000, examples=20)


def test_the_pace_of_both_is_of_as_many_tokens(config):
    config = replace(config, steps=4, evaluation=replace(config.evaluation, every=4))
    budget = 4 * config.batch.tokens
    ours, _ = fine_tuning_pace.ours(config)
    theirs, _ = fine_tuning_pace.peer(config)
    assert 0.95 * budget < ours <= budget <= theirs < budget + 32 * 80
