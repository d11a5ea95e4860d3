"""What a new model takes from the data and the files of its run, before the first step."""

from pathlib import Path
from typing import TYPE_CHECKING

from trunkline.engine.console import tell
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import BiLSTM, heads_of
from trunkline.engine.text.word_vectors import put_vectors
from trunkline.training.data.corpus import Corpus

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


def prepare(engine: "Engine", corpus: Corpus, is_new: bool) -> None:
    """Gives regressions the units of their labels, and the embeddings of a new Bi-LSTM the vectors of its words.

    `is_new`: the whole model, but for the heads that it keeps; else the tasks that were added to it.
    """
    names = [task.name for task in corpus.tasks]
    new = [name for name in names if name not in engine.kept] if is_new else engine.added
    labels = {t: s.labels for t, s in enumerate(corpus.train) if HEADS[s.task.head].squared and s.task.name in new}
    heads_of(engine.model).set_units(labels)
    engine.added = []
    if is_new and engine.config.vectors and isinstance(engine.model, BiLSTM):
        count = put_vectors(engine.model.embedding.weight, corpus.tokenizer, Path(engine.config.vectors))
        tell(f"{count:,} of {corpus.tokenizer.vocab_size:,} tokens start from the vectors of {engine.config.vectors}")
