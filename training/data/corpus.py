"""Everything a run reads: its tokenizer and the encoded splits of all its tasks, checked before the first step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trunkline.engine.config import Config, check_vocabulary
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.model import in_model_order
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data import cache
from trunkline.training.data.encoded import Encoded
from trunkline.training.data.encoding import encode
from trunkline.training.data.sources import Source, find_rows
from trunkline.training.scoring.metrics import metric_names

TOKENIZER_TEXTS = 20_000  # of each task that a tokenizer is trained on
TOKENIZER_CHARACTERS = 20_000_000  # of each column; reached by the longer texts of a corpus only


@dataclass(frozen=True)
class Corpus:
    """The data of a run; a task's place in `tasks` is its number everywhere."""

    tasks: tuple[Task, ...]
    tokenizer: Tokenizer
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]


def load_corpus(
    config: Config, tokenizer: Tokenizer | None = None, tell: Callable[[str], None] = lambda _: None
) -> Corpus:
    """Reads, checks and encodes the data of a run, or takes it from the cache.

    Args:
        tokenizer: to encode with; None: the one the config names, or one trained on the training text.
        tell: is told what takes time.

    Raises:
        ValueError: anything in the data that cannot be used; names task, file, row and value.
    """
    tell = _once(tell)
    tasks = in_model_order(config.all_tasks)
    data, base = Path(config.data) if config.data else None, Path(config.base)
    for task in tasks:
        metric_names(task)  # a wrong metric is found now, not after training
    sources = {
        (task, split): find_rows(task, split, data, base, config.seed)
        for task in tasks
        for split in ("train", "validation")
    }
    if tokenizer is None:
        training = [(task, sources[task, "train"]) for task in tasks]
        tokenizer = _tokenizer(config, training, tell)
        check_vocabulary(config, tokenizer)
    if any(HEADS[task.head].hides for task in tasks):
        tokenizer.mask()  # before anything is encoded: it may be new to the vocabulary

    typed = config.trunk.token_types > 1

    def encoded(task: Task, split: str) -> Encoded:
        def make() -> Encoded:
            rows = source.read()
            tell(f"encoding {task.name}, {split}: {len(rows)} rows")
            return encode(task, rows, tokenizer, config.batch.max_length, config.trunk.causal, typed)

        source = sources[task, split]
        key = [split, source.digest, tokenizer.digest, config.batch.max_length, typed]
        return cache.encoded(task, key, config.trunk.causal, make, tell)

    return Corpus(
        tuple(tasks),
        tokenizer,
        tuple(encoded(task, "train") for task in tasks),
        tuple(encoded(task, "validation") for task in tasks),
    )


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """As `tell`, for messages that were not told yet."""
    told: set[str] = set()

    def tell_new(message: str) -> None:
        if message not in told:
            told.add(message)
            tell(message)

    return tell_new


def _tokenizer(config: Config, training: list[tuple[Task, Source]], tell: Callable[[str], None]) -> Tokenizer:
    if source := config.tokenizer or config.init:
        return Tokenizer.load(source, layout=config.layout, grows=not config.init)

    def texts() -> Iterator[str]:
        for task, source in training:
            rows = source.read()
            columns = [*task.text, *([task.label] if HEADS[task.head].learns_words else [])]
            for column in columns:
                characters = 0
                for row, value in enumerate(rows.columns[column][:TOKENIZER_TEXTS]):
                    try:
                        text = text_of(value)
                    except ValueError as error:
                        raise ValueError(f"task '{task.name}': {error} ({rows.where(row)})") from error
                    yield text
                    characters += len(text)
                    if characters >= TOKENIZER_CHARACTERS:
                        break

    def make() -> Tokenizer:
        tell(f"training a tokenizer of {config.vocab_size} entries")
        return Tokenizer.train(texts(), config.vocab_size, config.lowercase)

    sources = [[task.head, task.text, task.label, source.digest] for task, source in training]
    return cache.tokenizer(
        [config.vocab_size, config.lowercase, TOKENIZER_TEXTS, TOKENIZER_CHARACTERS, sources], make, tell
    )
