"""Scores: over all rows alike, whatever the batches, with predictions where their examples are."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline import Engine
from trunkline.engine.network.generate import Search
from trunkline.engine.network.packing import pack
from trunkline.training.data.corpus import Corpus, load_corpus
from trunkline.training.scoring.evaluation import Scored, evaluate, spaced
from trunkline.training.scoring.metrics import score

pytestmark = pytest.mark.usefixtures("one_thread")

Score = Callable[..., dict[str, Scored]]


@pytest.fixture(scope="module")
def engine(lively: Path) -> Engine:
    return Engine.load(lively, device="cpu")


@pytest.fixture(scope="module")
def corpus(engine: Engine) -> Corpus:
    return load_corpus(engine.config, engine.tokenizer)


@pytest.fixture(scope="module")
def scored(engine: Engine, corpus: Corpus) -> Score:
    """Scores that engine; keyword arguments of `evaluate` may be changed."""

    def run(**changes) -> dict[str, Scored]:
        settings = {"tokens": 512, "search": Search(max_new_tokens=8), **changes}
        return evaluate(engine.model, corpus.tokenizer, corpus.validation, **settings)

    return run


def row_losses(engine: Engine, corpus: Corpus, task: int) -> Tensor:
    """Of every labelled row of a task's validation split, example by example; of spans, of every example."""
    losses = []
    for i in range(len(corpus.validation[task])):
        example = corpus.validation[task].example(i, task)
        batch = pack([example], len(corpus.tasks))
        with torch.no_grad():
            logits = engine.model.logits(engine.model.hidden(batch), task)  # (R, C)
        match corpus.tasks[task].head:
            case "regress":
                labels = corpus.train[task].labels  # in whose standard deviations an error is measured
                losses.append(((logits[:, 0] - batch.rows.value) / labels.std()).square())
            case "span":
                first, _, start, last = corpus.validation[task].label_of(i)
                losses.append(F.cross_entropy(logits.T, torch.tensor([start - first, last - first]).long())[None])
            case _:
                losses.append(F.cross_entropy(logits, batch.rows.target, reduction="none"))
    return torch.cat(losses)


def test_a_loss_is_the_mean_over_all_rows(engine, corpus, scored):
    results = scored()
    for number, task in enumerate(corpus.tasks):
        losses = row_losses(engine, corpus, number)
        assert losses.std() > 0.01 * losses.mean()  # so that another mean would be another number
        assert results[task.name].metrics["loss"] == pytest.approx(float(losses.mean()), rel=1e-4), task.name


def test_predictions_are_in_the_order_of_the_examples(engine, corpus, scored):
    results = scored()
    for split in corpus.validation:
        name, head = split.task.name, split.task.head
        if head == "language-model":
            assert (results[name].examples, results[name].predictions) == ([], [])
            continue
        assert results[name].examples == list(range(20))
        texts = [tuple(corpus.tokenizer.decode(split.prompt_of(i)).split(" | ")) for i in range(20)]
        assert len(set(texts)) > 12  # so that another order would be seen
        if head == "generate":
            alone = [engine.generate([text], name)[0] for (text,) in texts]
            assert len(set(alone)) > 12
            assert results[name].predictions == alone
            continue
        (answers,) = engine.predict(texts, [name]).values()
        match head:
            case "classify":
                assert [split.task.labels[c] for c in results[name].predictions] == answers
            case "regress":
                assert results[name].predictions == pytest.approx(answers, abs=1e-4)
                assert len(set(answers)) > 12
            case "tag":
                assert [[split.task.labels[c] for c in tags] for tags in results[name].predictions] == answers
            case "span":
                first = [int(split.label_of(i)[0]) for i in range(20)]
                spans = [
                    corpus.tokenizer.decode(split.tokens_of(i)[first[i] + start : first[i] + last + 1])
                    for i, (start, last) in enumerate(results[name].predictions)
                ]
                assert spans == answers


def test_metrics_are_those_of_the_predictions(corpus, scored):
    results = scored()
    references = [corpus.validation[1].reference(i) for i in range(20)]
    assert corpus.tasks[1].name == "closeness"
    expected = score(("pearson", "spearman"), results["closeness"].predictions, references)
    assert results["closeness"].metrics == {"loss": results["closeness"].metrics["loss"], **expected}
    assert results["prose"].metrics["perplexity"] == pytest.approx(math.exp(results["prose"].metrics["loss"]))


def test_batches_change_nothing_and_keep_to_their_budget(engine, scored, monkeypatch):
    few = scored(tokens=4096)
    passes, forward = [], engine.model.trunk.forward

    def count(tokens, *rest, **named):
        passes.append(len(tokens))
        return forward(tokens, *rest, **named)

    monkeypatch.setattr(engine.model.trunk, "forward", count)
    many = scored(tokens=40, texts=0)
    assert max(passes) <= 40
    assert len(passes) > 30
    for name, task in few.items():
        assert task.metrics["loss"] == pytest.approx(many[name].metrics["loss"], rel=1e-5), name
    assert few["closeness"].predictions == pytest.approx(many["closeness"].predictions, abs=1e-5)
    assert few["parts"].predictions == many["parts"].predictions


def test_some_examples_are_spaced_over_the_split(scored):
    everything, some = scored(), scored(examples=5)
    for name in ("colour", "where", "retell"):
        assert some[name].examples == [0, 5, 10, 14, 19]
        assert some[name].predictions == [everything[name].predictions[i] for i in some[name].examples]
    assert some["prose"].metrics["loss"] != everything["prose"].metrics["loss"]


def test_texts_cost_time_and_can_be_left_out(scored):
    without, three, more = scored(texts=0), scored(texts=3), scored(examples=5, texts=9)
    assert without["retell"].metrics.keys() == {"loss"}
    assert without["retell"].predictions == []
    assert without["colour"].metrics.keys() == {"loss", "accuracy"}
    assert three["retell"].examples == [0, 10, 19]  # np.round of 9.5 is 10
    assert three["retell"].metrics.keys() == {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert three["retell"].metrics["loss"] == without["retell"].metrics["loss"]  # of all examples
    assert more["retell"].examples == [0, 5, 10, 14, 19]  # of the five


def test_nothing_is_trained(engine, scored):
    engine.model.train()
    first = scored(texts=0)
    assert not engine.model.training
    assert scored(texts=0)["closeness"] == first["closeness"]  # without dropout
    assert all(parameter.grad is None for parameter in engine.model.parameters())


SPACED = [(5, 0, range(5)), (5, 9, range(5)), (5, 5, range(5)), (9, 3, [0, 4, 8]), (9, 1, [0]), (0, 3, [])]


@pytest.mark.parametrize(("count", "wanted", "expected"), SPACED)
def test_spaced(count, wanted, expected):
    assert spaced(count, wanted) == list(expected)


def test_spaced_never_repeats():
    for count in range(1, 40):
        for wanted in range(1, count + 1):
            places = spaced(count, wanted)
            assert len(set(places)) == len(places) == wanted
            assert places == sorted(places)
            assert places[0] == 0
            assert places[-1] == count - 1 or wanted == 1
