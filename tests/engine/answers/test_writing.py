"""Texts that join while others are written are those that each prompt gives by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from answering import TASKS, TRUNK
from trunkline.engine.answers.writing import Text, Writing
from trunkline.engine.network.generate import Search
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.trunk import Trunk

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "learned positions": TRUNK,
    "rotary, grouped": replace(TRUNK, positions="rotary", num_kv_heads=2),
    "local layers": replace(TRUNK, positions="rotary", window=4, global_every=2, num_layers=3),
    "exact match": replace(TRUNK, exact_match=True),
}
SEARCHES = {
    "plain": Search(max_new_tokens=12),
    "long": Search(max_new_tokens=12, min_new_tokens=6),
    "no repeats": Search(max_new_tokens=12, no_repeat_ngram=2),
}
ENDS = (7, 19)


def model_of(shape) -> MultiTaskModel:
    tasks = [TASKS[-1], replace(TASKS[-1], name="rewrite")]
    model = MultiTaskModel(Trunk(replace(shape, vocab_size=40)), tasks, projection="gelu").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_texts_are_those_of_each_prompt_alone(shape, search):
    model, random = model_of(shape), np.random.default_rng(1)
    texts = [
        Text(random.integers(0, 40, random.integers(1, 30)), int(random.integers(2)), int(random.integers(1, 13)))
        for _ in range(17)
    ]

    def alone(text: Text) -> list[int]:
        own = replace(search, max_new_tokens=text.most, min_new_tokens=min(search.min_new_tokens, text.most))
        return model.generate([text.prompt], text.task, ENDS, own)[0]

    expected = [alone(text) for text in texts]
    writing, waiting, ended = Writing(model, ENDS, search), texts.copy(), []
    sizes = set()
    while waiting or writing.texts:
        if waiting and random.random() < 0.6:
            count = int(random.integers(1, 4))
            writing.join(waiting[:count])
            waiting = waiting[count:]
        if writing.texts:
            ended += writing.step()
            sizes.add(len(writing.texts))
    assert {id(text) for text in ended} == {id(text) for text in texts}
    assert len(ended) == len(texts)
    assert [text.tokens for text in texts] == expected
    assert max(sizes) > 2  # some were written together
    assert len({len(tokens) for tokens in expected}) > 2


def test_what_does_not_fit_is_refused_and_the_others_go_on():
    model = model_of(TRUNK)
    writing = Writing(model, ENDS, Search(max_new_tokens=4))
    first = Text(np.arange(5), 0, 4)
    writing.join([first])
    with pytest.raises(ValueError, match="a prompt of 90 tokens and 7 new ones are more than the trunk's 96 positions"):
        writing.join([Text(np.zeros(90, np.int64), 0, 7)])
    while writing.texts:
        writing.step()
    assert first.tokens == model.generate([first.prompt], 0, ENDS, Search(max_new_tokens=4))[0]
