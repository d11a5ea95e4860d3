"""Tokens per second of written summaries: Trunkline beside Hugging Face `generate`, with the same weights.

    python benchmarks/systems/generation.py DATA [--steps 150] [--rounds 15]

DATA is laid out like the hub and has DialogSum. A GPT-2 shape (width 256, 4 layers, vocabulary 8,192) is trained on it
for as many steps as it takes to end its texts by itself; then both write summaries of the same 32 validation documents,
greedily, in float32, and have to write the same tokens. They take turns, round after round, in one process. Hugging
Face's model is `to_hugging_face()` of the trunk and gets the documents as one batch, padded on the left, with its
default attention and cache. Timed is all of it, from the token ids of the documents to those of the summaries.

The second setting has the end token forbidden, so that every text has the full length.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from trunkline.benchmarks.microbenchmarks.measure import in_turns
from trunkline.benchmarks.record import record
from trunkline.benchmarks.systems.hugging_face import write_texts
from trunkline.engine.engine import Engine
from trunkline.engine.network.generate import Search, generate
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.network.trunk import preset
from trunkline.engine.settings import Batch, Evaluation
from trunkline.training.data.corpus import load_corpus
from trunkline.training.environment import environment
from trunkline.training.scoring.evaluation import spaced

TEXTS, LONGEST = 32, 48
SHAPE = preset("tiny", positions="learned", activation="gelu_tanh")  # as Hugging Face's GPT-2
SETTINGS = {"as they end": Search(LONGEST), "full length": Search(LONGEST, min_new_tokens=LONGEST)}
WARM_UP = 1  # rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=150, help="of training, before anything is measured")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    engine = trained(options.data, options.steps)
    assert engine.tokenizer is not None
    prompts, end = documents(engine), engine.tokenizer.end
    theirs = engine.model.trunk.to_hugging_face().eval()
    settings = {
        name: measure(engine, theirs, prompts, end, search, options.rounds) for name, search in SETTINGS.items()
    }
    for name, found in settings.items():
        rates = found["tokens_per_second"]
        print(f"{name:12} {found['tokens']:5d} tokens  ", end="")
        print(f"{rates['trunkline']:8,.0f} against {rates['hugging_face']:8,.0f} tokens/s  {found['faster']:.2f}x")
    content = {
        "command": f"python benchmarks/systems/generation.py DATA --steps {options.steps} --rounds {options.rounds}",
        "unit": "seconds for all texts",
        "threads": torch.get_num_threads(),
        "texts": TEXTS,
        "document_tokens": {"mean": float(np.mean([*map(len, prompts)])), "longest": max(map(len, prompts))},
        "longest_text": LONGEST,
        "settings": settings,
    }
    record("generation", content, environment())


def trained(data: Path, steps: int) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            SHAPE,
            ["dialogsum"],
            data=str(data),
            run=f"{folder}/run",
            steps=steps,
            batch=Batch(tokens=2048, max_length=512),
            evaluation=Evaluation(every=steps, examples=16, texts=0),
            search=Search(max_new_tokens=1),  # the texts that training itself would write are not wanted here
            device="cpu",
        )
        engine.fit()
    return engine


def documents(engine: Engine) -> list[np.ndarray]:
    """Token ids of prompts, evenly spaced over the validation split."""
    (split,) = load_corpus(engine.config, engine.tokenizer).validation
    return [split.prompt_of(i) for i in spaced(len(split), TEXTS)]


def measure(
    engine: Engine, theirs: PreTrainedModel, prompts: Sequence[np.ndarray], end: int, search: Search, rounds: int
) -> dict:
    """Times both in turns, once they are found to write the same."""
    model = engine.model.eval()
    systems = {
        "trunkline": lambda _: generate(model.trunk, partial(model.logits, task=0), prompts, end, search),
        "hugging_face": lambda _: write_texts(theirs, prompts, end, search),
    }
    texts = {name: write(0) for name, write in systems.items()}
    assert texts["trunkline"] == texts["hugging_face"], "they write different texts"
    seconds = in_turns(systems, rounds, warm_up=WARM_UP)
    lengths = [len(text) + (len(text) < search.max_new_tokens) for text in texts["trunkline"]]  # with the end token
    pairs = zip(*seconds.values(), strict=True)  # the machine's speed changes; the times of one round belong together
    return {
        "tokens": sum(lengths),
        "shortest_text": min(lengths),
        "tokens_per_second": {name: sum(lengths) / median(times) for name, times in seconds.items()},
        "faster": median(other / ours for ours, other in pairs),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
