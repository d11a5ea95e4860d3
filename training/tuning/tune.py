"""`trunkline tune CONFIG`: times every candidate of every op on this GPU, and keeps what was fastest.

What is kept is used by all that runs on such a card with the same driver and releases; engine/device.py reads it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from trunkline.engine.config import Config
from trunkline.engine.device import card, use_tuned, write_tuned
from trunkline.engine.engine import Engine
from trunkline.engine.network.compiled import FixedShapes
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.settings import GRADIENT_METHODS
from trunkline.kernels.attention.attention_elsewhere import NOT_COMPILED
from trunkline.kernels.decisions import Choice, use
from trunkline.kernels.dispatch import has_kernels
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import load_corpus
from trunkline.training.run.compiling import sample_of
from trunkline.training.tuning.contest import Call, Clock, Row, Work, contest, turn_on_gpu
from trunkline.training.tuning.workloads import workloads

Tell = Callable[[str], None]
ROUNDS = 7  # turns of each candidate
TURN = 0.01  # seconds of each turn, at least one call


def tune(config: Config, tell: Tell) -> None:
    """Tunes for the batches of a config, tells every candidate, and writes the file.

    Raises:
        ValueError: there is nothing to tune: no GPU, or no model of ours.
    """
    engine = Engine.from_config(config)
    if engine.device.type != "cuda" or not has_kernels(engine.device):
        raise ValueError(f"tune: there is nothing to tune on {engine.device}: every op has one way of working there")
    corpus = load_corpus(config, engine.tokenizer, tell=tell)
    model = engine.build(corpus.tokenizer)
    if not isinstance(model, MultiTaskModel):
        raise ValueError("tune: there is nothing to tune: a Bi-LSTM runs on PyTorch's own kernels")
    packer, sample = Packer(corpus.train, config), sample_of(config, make_mixer(config, corpus))
    packed = [packer.pack(members, config.batch.tokens) for members in sample]
    batch = FixedShapes.of(packed, model.groups).pad(packed[0])
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    works = workloads(model, batch, config.balancing.method in GRADIENT_METHODS, dtype)
    use({})  # what was tuned before starts anew
    tune_works(works, card(engine.device), on_gpu, tell, NOT_COMPILED if engine.compiles else ())
    tell(use_tuned(engine.device))


def tune_works(
    works: Iterable[Work], made_on: Mapping[str, str], clock: Clock, tell: Tell, leave_out: Collection[Choice] = ()
) -> list[Row]:
    """Tells a line of every candidate, and writes what was chosen after each work: the next may fail."""
    rows: list[Row] = []
    for work in works:
        tell(f"\n{work.name}")
        of_work = contest(work, clock, ROUNDS, leave_out)
        for row in of_work:
            tell(in_words(row))
        choices: dict[str, dict[str, Choice]] = {}
        for row in of_work:
            if row.chosen:
                choices.setdefault(row.decision, {})[row.facts] = row.answer
        write_tuned(made_on, choices)
        rows += of_work
    return rows


def in_words(row: Row) -> str:
    answer = row.answer
    shown = " ".join(f"{key}={value}" for key, value in answer.items()) if isinstance(answer, dict) else str(answer)
    taken = row.problem if row.seconds is None else f"{1e6 * row.seconds:,.0f} us"
    return f"{'->' if row.chosen else '  '} {row.decision} ({row.facts}): {shown}: {taken}"


def on_gpu(call: Call) -> float:
    """Seconds of a call, the device's own."""
    once = turn_on_gpu([call], 1)
    return turn_on_gpu([call], max(1, min(1000, int(TURN / max(once, 1e-6)))))
