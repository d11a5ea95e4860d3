"""Fine-tuning a pretrained encoder: real tokens a second and memory, here and in a plain Hugging Face loop.

    python benchmarks/systems/fine_tuning_pace.py DATA CHECKPOINT [--steps 60] [--rounds 5]

DATA is laid out like the hub. Ours is training/configs/finetune-encoder.yaml, the loop that of
learning/from_checkpoint.py, on as many tokens. Each runs in a process of its own with one thread, and they take turns:
in every turn both train from the checkpoint anew, and the time of their steps counts. Memory is the most that a process
has held in its first turn, as a run of a user's would.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median

import torch

from trunkline.benchmarks.learning.from_checkpoint import CONFIG, Peer, train
from trunkline.benchmarks.record import record
from trunkline.engine.config import Config
from trunkline.engine.engine import Engine
from trunkline.training.config_file import load_config
from trunkline.training.data.corpus import load_corpus
from trunkline.training.environment import environment

OURS, PEER = "trunkline", "hugging face"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder laid out like the hub")
    parser.add_argument("checkpoint", help="of a pretrained encoder")
    parser.add_argument("--steps", type=int, default=60, help="of ours in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    length = [f"steps={options.steps}", f"evaluation.every={options.steps}", "evaluation.last_examples=8"]
    config = load_config(CONFIG, [f"data={options.data}", f"init={options.checkpoint}", *length])
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    for name, turn in ((OURS, ours), (PEER, peer)):
        workers[name], theirs = context.Pipe()
        context.Process(target=work, args=(turn, config, theirs), daemon=True).start()
    pace: dict[str, list[float]] = {OURS: [], PEER: []}
    memory: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, connection in workers.items():
            connection.send(True)
            seen, seconds, held = connection.recv()
            memory.setdefault(name, held)
            pace[name].append(seen / seconds)
        print(*(f"{name} {values[-1]:,.0f} tokens/s" for name, values in pace.items()), sep=", ", flush=True)
    faster = median(o / t for o, t in zip(pace[OURS], pace[PEER], strict=True))
    print(f"{faster:.2f}x, with {memory[OURS] / memory[PEER]:.2f} of its memory")
    command = f"python benchmarks/systems/fine_tuning_pace.py DATA CHECKPOINT --steps {options.steps}"
    content = {
        "command": f"{command} --rounds {options.rounds}",
        "tokens_per_second": pace,
        "faster": faster,
        "memory": memory,
    }
    record("fine_tuning_pace", content, environment())


def work(turn: Callable[[Config], tuple[float, float]], config: Config, connection: Connection) -> None:
    """A turn whenever it is asked for one: real tokens, seconds, and the most bytes held so far."""
    torch.set_num_threads(1)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        seen, seconds = turn(config)
        connection.send((seen, seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def ours(config: Config) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        summary = Engine.from_config(replace(config, run=f"{folder}/run")).fit()
    return summary["real_tokens"], summary["training_seconds"]


def peer(config: Config) -> tuple[float, float]:
    corpus = load_corpus(config)
    torch.manual_seed(0)
    model = Peer(config.init, corpus.train)
    began = time.perf_counter()
    seen = sum(train(model, corpus, config, 0, config.steps * config.batch.tokens))
    return seen, time.perf_counter() - began


if __name__ == "__main__":
    main()
