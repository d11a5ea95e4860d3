"""Several runs one after the other in one group of ranks: what each rank does. `forked_ranks.start` begins it."""

import faulthandler
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

LONGEST = 240  # seconds that all runs of a group may take, on a machine that does something else besides


def main(file: Path) -> None:
    import torch.distributed as dist

    faulthandler.dump_traceback_later(LONGEST, exit=True)  # a rank that hangs says where
    rank, size, runs = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), json.loads(file.read_text())
    # DTensor remembers groups by their names, which repeat only where every run has a default group of its own
    each_its_own = any("parallel=shard" in run.get("values", ()) for run in runs)
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*where, is_master=rank == 0, multi_tenant=True, wait_for_workers=False)
    if not each_its_own:
        dist.init_process_group("gloo", store=dist.PrefixStore("all", store), rank=rank, world_size=size)
    outcomes = []
    for run in runs:
        outcomes.append(outcome(run, rank))
        (file.parent / f"rank-{rank}.json").write_text(json.dumps(outcomes))  # before the next one kills it
    with suppress(RuntimeError):  # of a store that was killed
        store.set(f"ended/{rank}", "")
    if rank == 0:  # whose store it is
        store.wait([f"ended/{other}" for other in range(size) if str(other) != os.environ["KILLED"]])


def outcome(run: dict[str, Any], rank: int) -> dict[str, Any]:
    """Trains; 'bits' of the weights after every step, the bytes that were 'held', and the 'error' that ended it or its
    'steps'. Or, where there is an 'engine', puts it to use."""
    if "engine" in run:
        return answers(Path(run["engine"]), Path(run["file"]))
    from trunkline import Engine
    from trunkline.training.config_file import load_config
    from trunkline.training.run.run import Run

    config = load_config(Path(run["config"]), run["values"] + (run.get("more", []) if rank else []))
    bits: list[str] = []
    held: dict[str, int] = {}
    update = Run.update

    def updated(self: Run, loss: Any) -> Any:
        learnt = [p for p in self.model.parameters() if p.grad is not None]
        held["gradients"] = size_of(p.grad for p in learnt)
        norm = update(self, loss)
        bits.append(digest(self.model))
        held["parameters"] = size_of(self.model.parameters())
        held["optimizer"] = size_of(self.optimizer.state[p][key] for p in learnt for key in ("exp_avg", "exp_avg_sq"))
        return norm

    with pytest.MonkeyPatch.context() as patch, grams_seen() as grams:
        patch.setattr(Run, "update", updated)
        patch.setattr("trunkline.training.distributed.gradient_exchange.BUCKET", 20_000)  # several of a tiny trunk
        patch.setattr("trunkline.training.run.run.write_report", lambda folder: None)  # which takes longer than the run
        if config.parallel == "shard":  # where every batch of an evaluation is every rank's
            patch.setattr("trunkline.training.run.run.FIRST_LOOK", 2)
        with FAULTS[run.get("fault", "none")](rank, patch):
            try:
                summary = Engine.from_config(config).fit(resume=run.get("resume", False))
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                return {"bits": bits, "held": held, "error": f"{type(error).__name__}: {error}"}
    return {
        "bits": bits,
        "held": held,
        "grams": grams,
        "steps": summary["steps"],
        "left_out": summary["steps_left_out"],
    }


@contextmanager
def grams_seen() -> Iterator[list[list[list[float]]]]:
    """The Gram matrices that tasks are weighed by, one a step."""
    from trunkline.training.balancing.balancer import Balancer

    seen: list[list[list[float]]] = []
    weigh = Balancer._weigh

    def weighed(self: Balancer, losses: Any, counts: Any, gram: Any, step: int) -> Any:
        seen.append(gram.tolist())
        return weigh(self, losses, counts, gram, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Balancer, "_weigh", weighed)
        yield seen


def answers(folder: Path, file: Path) -> dict[str, Any]:
    """What an engine scores, and says of the rows of a file, 'together' with the other ranks and 'alone'; and how many
    batches it 'scored' for each."""
    from trunkline import Engine
    from trunkline.engine.network.model import MultiTaskModel
    from trunkline.training import predict
    from trunkline.training.distributed.ranks import ONE, Ranks
    from trunkline.training.scoring.evaluation import evaluate_engine

    engine, score, said = Engine.load(folder, device="cpu"), MultiTaskModel.score, {}
    with pytest.MonkeyPatch.context() as patch, Ranks(None) as several:
        patch.setattr(predict, "AT_ONCE", 8)
        patch.setattr(MultiTaskModel, "score", lambda *arguments: scored.append(0) or score(*arguments))
        for name, ranks in (("together", several), ("alone", ONE)):
            scored: list[int] = []
            scores = evaluate_engine(engine, ranks=ranks)
            rows = list(predict.of_file(engine, file, ["colour", "parts"], scores=True, ranks=ranks))
            said[name] = {"scores": scores, "rows": rows, "scored": len(scored)}
    return said


def size_of(tensors: Any) -> int:
    """Bytes of these tensors on this rank."""
    from trunkline.training.distributed.sharding import local

    return sum(local(tensor.detach()).nbytes for tensor in tensors)


def digest(model: Any) -> str:
    """Of the weights that all ranks have alike, or of this one's slices."""
    from trunkline.training.distributed.sharding import local

    state = sha256()
    for tensor in model.state_dict().values():
        state.update(local(tensor).contiguous().numpy().data)
    return state.hexdigest()


@contextmanager
def _none(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    yield


@contextmanager
def _not_finite(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loss of a batch of the last rank, in the third step."""
    from trunkline.training.balancing.balancer import Balancer

    forward = Balancer.forward

    def broken(self: Balancer, batch: Any, factor: Any, step: int) -> Any:
        sums = forward(self, batch, factor, step)
        return sums._replace(loss=sums.loss + float("nan")) if rank and step == 2 else sums

    patch.setattr(Balancer, "forward", broken)
    yield


@contextmanager
def _out_of_memory(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the last rank, once its last backward pass of the third step has sent what it found."""
    import torch

    from trunkline.training.run.run import Run

    gradients, failed = Run._gradients, []

    def fail(self: Run, *arguments: Any) -> Any:
        sums = gradients(self, *arguments)
        if rank and self.progress.step == 2 and not failed:
            assert len(self.exchange.buckets) > 5
            assert self.exchange.sent > 0
            failed.append(True)
            raise torch.OutOfMemoryError
        return sums

    patch.setattr(Run, "_gradients", fail)
    yield


@contextmanager
def _no_room_for_a_batch(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the last rank, in the third step."""
    import torch

    from trunkline.training.run.run import Run

    def fail(self: Run, *arguments: Any) -> Any:
        if self.ranks.rank == self.ranks.size - 1 and self.progress.step == 2:
            raise torch.OutOfMemoryError
        return gradients(self, *arguments)

    gradients = Run._gradients
    patch.setattr(Run, "_gradients", fail)
    yield


@contextmanager
def _terminated(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last rank, in the third step."""
    _signal_in_the_third_step(signal.SIGTERM, rank, patch)
    yield


@contextmanager
def _stops_answering(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last rank, after the third step, though its process is still there; nobody calls the roll for long."""
    _signal_in_the_third_step(signal.SIGSTOP, rank, patch)
    patch.setattr("trunkline.training.distributed.ranks.ROLL_CALL", 0.5)
    yield


def _signal_in_the_third_step(number: signal.Signals, rank: int, patch: pytest.MonkeyPatch) -> None:
    from trunkline.training.run.run import Run

    count = Run.count

    def signalled(self: Run, *arguments: Any) -> None:
        if rank and self.progress.step == 2:
            os.kill(os.getpid(), number)
        count(self, *arguments)

    patch.setattr(Run, "count", signalled)


def _before_second_save(patch: pytest.MonkeyPatch, does: Callable[[Path], None]) -> None:
    """Before every file of the second checkpoint, which the first rank writes."""
    from trunkline.engine import checkpoint

    def save(tensors: Any, file: Path, *metadata: Any) -> None:
        if file.parent.name == ".step-4.partial":
            does(file)
        save_file(tensors, file, *metadata)

    save_file = checkpoint.save_file
    patch.setattr(checkpoint, "save_file", save)


@contextmanager
def _disk_full(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the second checkpoint, which the first rank writes."""
    from safetensors import SafetensorError

    def full(file: Path) -> None:
        file.write_bytes(b"as much as there was room for")
        raise SafetensorError("No space left on device (os error 28)")

    _before_second_save(patch, full)
    yield


@contextmanager
def _killed_in_a_save(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first rank, when the weights of its second checkpoint are written and the rest is not."""

    def killed(file: Path) -> None:
        if file.stem == "optimizer":
            os.kill(os.getpid(), signal.SIGKILL)

    _before_second_save(patch, killed)
    yield


@contextmanager
def _slice_not_written(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last rank's disk is full in the checkpoint of the fourth step; the others' have room."""
    from safetensors import SafetensorError

    def full(file: Path) -> None:
        if "-4-of-4" in file.name:
            raise SafetensorError("No space left on device (os error 28)")

    _before_second_save(patch, full)
    yield


@contextmanager
def _scored_twice(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """At the end of a run, with the other ranks and by every rank alone: the same bits, and a share of the work."""
    from trunkline.engine.network.model import MultiTaskModel
    from trunkline.training.distributed.ranks import ONE
    from trunkline.training.run import run as module

    def evaluate(*arguments: Any, ranks: Any, **others: Any) -> Any:
        if others["texts"] is not None:  # during the run
            return score_all(*arguments, ranks=ranks, **others)
        others = {**others, "examples": 6}
        scores, counts = [], []
        for who in (ranks, ONE):
            scored.clear()
            found = score_all(*arguments, ranks=who, **others)
            scores.append({name: (task.metrics, task.predictions) for name, task in found.items()})
            counts.append(len(scored))
        assert scores[0] == scores[1]
        assert 0 < counts[0] < 0.7 * counts[1], counts
        return found

    scored: list[int] = []
    score, score_all = MultiTaskModel.score, module.evaluate
    patch.setattr(MultiTaskModel, "score", lambda *arguments: scored.append(0) or score(*arguments))
    patch.setattr(module, "evaluate", evaluate)
    yield


@contextmanager
def _killed_while_loading(rank: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last rank, between a checkpoint's model and its optimizer."""
    from trunkline.engine import checkpoint

    if rank:
        patch.setattr(checkpoint, "load_optimizer_tensors", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    yield


FAULTS = {
    "none": _none,
    "not finite": _not_finite,
    "out of memory": _out_of_memory,
    "no room for a batch": _no_room_for_a_batch,
    "terminated": _terminated,
    "stops answering": _stops_answering,
    "disk full": _disk_full,
    "killed in a save": _killed_in_a_save,
    "slice not written": _slice_not_written,
    "scored twice": _scored_twice,
    "killed while loading": _killed_while_loading,
}
