"""How many steps a first run takes: some passes over the data, in a time that one waits for.

Nothing here waits for torch: `trunkline init` answers in seconds, and `trunkline estimate` knows better.
"""

import os
import time

from trunkline.engine.network.trunk_config import PRESETS

TOKENS = 2048  # of a batch, as Batch.tokens
LONGEST = 512  # tokens, as Batch.max_length: a batch holds it
EXAMPLES = 32  # of a batch from a checkpoint: of the same tokens, more and smaller steps learn more
TOKENS_PER_WORD = 1.4  # of English and a vocabulary of some thousand entries, with what stands around a text
PASSES_FROM_SCRATCH, PASSES_FROM_CHECKPOINT = 10, 3
FEWEST, MOST = 100, 20_000  # steps
MINUTES = 2.0  # of training from scratch, where nothing is said
UTILISATION = 0.5  # of the rate of large products, by a whole step on a CPU


def batch_tokens(words: float) -> int:
    """Of a batch of a run from a checkpoint, whose examples have so many words."""
    return min(TOKENS, max(LONGEST, 64 * round(EXAMPLES * tokens_of(words) / 64)))


def tokens_of(words: float) -> float:
    """Tokens of a text of so many words."""
    return 2 + TOKENS_PER_WORD * words


def seconds_per_step(preset: str) -> float:
    """On this machine's CPU, of the arithmetic: six operations for every weight of the blocks and every token."""
    shape = PRESETS[preset]
    weights = 12 * shape["num_layers"] * shape["hidden_size"] ** 2
    return 6 * weights * TOKENS / (UTILISATION * _product_rate())


def _product_rate(seconds: float = 0.1) -> float:
    """Operations a second of large float32 products on all cores, from the best there was on one.

    With several threads a core that is busy with something else would hold up all of them.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    a = np.ones((512, 512), np.float32)
    with threadpool_limits(1):
        a @ a
        end, best = time.perf_counter() + seconds, float("inf")
        while (began := time.perf_counter()) < end:
            a @ a
            best = min(best, time.perf_counter() - began)
    return (os.cpu_count() or 1) * 2 * 512**3 / best


def steps_for(examples: int, words: float, minutes: float | None, preset: str | None, batch: int) -> tuple[int, str]:
    """Steps of a run, and why.

    Args:
        examples: of all tasks, to learn from.
        words: of an example, on average.
        minutes: what training may take; None: a few from scratch, whatever it takes from a checkpoint.
        preset: of a trunk from scratch; None: it comes from a checkpoint, whose size is not known here.
        batch: tokens of a step.
    """
    passes = PASSES_FROM_CHECKPOINT if preset is None else PASSES_FROM_SCRATCH
    steps = min(MOST, max(FEWEST, round(passes * examples * tokens_of(words) / batch)))
    took = ""
    if preset is not None:
        pace = seconds_per_step(preset)
        within = int(60 * (minutes or MINUTES) / pace)
        steps = max(min(steps, within), FEWEST if minutes is None else 1)
        took = f", about {_duration(steps * pace)} on this CPU"
    seen = steps * batch / (examples * tokens_of(words))
    return steps, f"{seen:.2g} passes over the data{took}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
