"""From texts to what tasks say of them, or write: what `Engine.predict` and `Engine.generate` do, and a server as well.

Tasks are named by their places in the model.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trunkline.engine.answers.answer import Question, answer, in_batches, reader_of
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.generate import Search, check_search, prompts_at_once
from trunkline.engine.text.given import misfit, text_rows
from trunkline.engine.text.layout import Laid, Layout

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


def predict(engine: "Engine", texts: Iterable[str | Sequence[str]], names: Sequence[str], scores: bool) -> dict:
    """See `Engine.predict`."""
    parts = text_rows(texts, "predict")
    asked = [engine.place_of(name) for name in names] or answering(engine)
    for t in asked:
        task = engine.tasks[t]
        if HEADS[task.head].group == "vocabulary":
            raise ValueError(f"predict: task '{task.name}' writes text: use generate()")
        for place, text in enumerate(parts):
            if wrong := misfit(task, text):
                raise ValueError(f"predict: {wrong} at place {place}")
    predictions: dict[str, list[Any]] = {engine.tasks[t].name: [] for t in asked}
    for together in in_batches((question(engine, text, asked) for text in parts), engine.config.batch.tokens):
        for answers in answer(engine, together):
            for name, given in answers.items():
                predictions[name].append(given if scores else given["label"])
    return predictions


def generate(engine: "Engine", texts: Iterable[str], name: str, search: Search) -> list[str]:
    """See `Engine.generate`."""
    documents = text_rows(texts, "generate")
    t = engine.place_of(name)
    if not HEADS[engine.tasks[t].head].writes:
        raise ValueError(f"generate: task '{name}' has head '{engine.tasks[t].head}': use predict()")
    for place, document in enumerate(documents):
        if len(document) != 1:
            raise ValueError(f"generate: task '{name}' takes 1 text, got {document!r:.120} at place {place}")
    check_search(search, engine.config.trunk.vocab_size)
    prompts = [prompt(engine, text, t).tokens for (text,) in documents]
    model, tokenizer = engine.model.eval(), engine.known_tokenizer
    written = [""] * len(prompts)
    for places in prompts_at_once([len(tokens) for tokens in prompts], search, engine.config.batch.tokens):
        with engine.autocast():
            made = model.generate([prompts[place] for place in places], t, tokenizer.ends, search)
        for place, tokens in zip(places, made, strict=True):
            written[place] = tokenizer.decode(tokens)
    return written


def answering(engine: "Engine", texts: int = 0) -> list[int]:
    """The tasks that answer without writing, and that take so many texts; 0: any number."""
    return [
        t
        for t, task in enumerate(engine.tasks)
        if HEADS[task.head].group != "vocabulary" and texts in (0, len(task.text))
    ]


def question(engine: "Engine", text: Sequence[str], tasks: Sequence[int]) -> Question:
    """A text, as the trunk reads it, and what tasks look at in it.

    Raises:
        ValueError: the tokenizer makes nothing of it that a task could look at.
    """
    laid = Layout(engine.known_tokenizer, engine.config.batch.max_length, engine.config.trunk.causal).lay(text)
    rows = [HEADS[engine.tasks[t].head].rows(laid) for t in tasks]
    return Question(laid, tuple(tasks), rows, tuple(reader_of(engine.model, t) for t in tasks))


def prompt(engine: "Engine", text: str, task: int) -> Laid:
    """A document that a task is to write from, as the trunk reads it."""
    layout = Layout(engine.known_tokenizer, engine.config.batch.max_length, causal=True)
    return layout.prompt(text, engine.tasks[task].max_target_tokens)
