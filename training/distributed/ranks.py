"""The processes of a run: which of them this one is, and what they tell one another.

torchrun starts them and says to each, by its environment, who it is. A run in a process by itself has one rank and no
process group: every exchange then returns what it is given.

Whatever all ranks have to decide alike is decided from what they exchanged, or by the first rank. When a rank leaves
before the others they hear of it from their next exchange: at once where its connections are closed, after
`Config.rank_timeout` where it only stopped answering. Then they call the roll in the store that they met in: who does
not answer is who is lost.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trunkline.engine import checkpoint
from trunkline.engine.config import Config
from trunkline.training.distributed.launch import USER_ERROR, is_rank, too_few_batches
from trunkline.training.environment import versions
from trunkline.training.run.folder import settings_that_count

ALONE = timedelta(days=1)  # that a rank may work by itself while the others wait: encoding, generated texts
ROLL_CALL = 5.0  # seconds within which every rank that is still there hears of one that is not
AGREED = 1.0  # seconds within which all ranks find the same fault, if they all find it
Item = TypeVar("Item")
Result = TypeVar("Result")
runs = count()  # of this process: each has names of its own in the store


class RankLost(ConnectionError):
    """Another rank left, or does not answer; says which, when, and how to go on."""


class Ranks:
    """A context, around all that a run does.

    Args:
        config: of the run; None: of what is done with a finished one.
        active: whether there are other ranks; None: if torchrun started this process.

    Attributes:
        rank, size: this one's number, and how many there are.
        shards: whether each holds a slice of the model, and not all of it.
        slices: in how many the model lies; ranks that follow one another have those of one replica.
        first: whether this is the one that writes the run and speaks.
        step: steps done, for who asks when a rank was lost.

    Raises:
        ValueError: `config.devices` asks for several ranks, and this process is none of them.
    """

    def __init__(self, config: Config | None, active: bool | None = None):
        self.config, self.step = config, 0
        self.active = is_rank() if active is None else active
        if not self.active and config is not None and config.devices not in (1, "all"):
            raise ValueError(
                f"devices={config.devices} needs a process for each of them: 'trunkline train CONFIG "
                f"devices={config.devices}' starts them, or 'torchrun --nproc-per-node={config.devices}' a script of "
                "yours; from a notebook use devices=1"
            )
        self.rank = int(os.environ["RANK"]) if self.active else 0
        self.size = int(os.environ["WORLD_SIZE"]) if self.active else 1
        self.first = self.rank == 0
        self.shards = self.size > 1 and config is not None and config.parallel == "shard"
        self.slices = (config.slices or self.size) if self.shards and config is not None else 1
        self.open = ExitStack()

    @property
    def restarted(self) -> bool:
        """Whether torchrun started the ranks again after one of them failed."""
        return self.active and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    def __enter__(self) -> "Ranks":
        if not self.active:
            return self
        try:
            self._meet(timedelta(seconds=(self.config or Config).rank_timeout))
        except RuntimeError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RankLost(f"the {self.size} ranks did not meet at {where}: {str(error).splitlines()[0]}") from error
        self.hosts = self.gather(socket.gethostname())
        if not self.first:
            self.open.enter_context(redirect_stdout(self.open.enter_context(open(os.devnull, "w"))))
        return self

    def _meet(self, timeout: timedelta) -> None:
        self.begins = not dist.is_initialized()
        hosts = self.begins and self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # both stores are documented, and only not among the names that the module exports
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=hosts,
            timeout=timeout,
            multi_tenant=True,
        )
        # with names of its own for every attempt: torchrun keeps the store, and in it where the ranks were before
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"trunkline/{attempt}/{next(runs)}", store)  # type: ignore[attr-defined]
        if self.begins:
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=timeout)
        self.host = dist.new_group(backend="gloo", timeout=timeout)
        self.waiting = dist.new_group(backend="gloo", timeout=ALONE)
        self.device = dist.new_group(backend=_backend(), timeout=timeout)
        self.across: list[dist.ProcessGroup] = []  # of a slice's replicas, and of this replica's slices
        if 1 < self.slices < self.size and self.size % self.slices == 0:
            numbers = torch.arange(self.size).view(-1, self.slices)
            for rows in (numbers.T.tolist(), numbers.tolist()):
                groups = [dist.new_group(row, backend=_backend(), timeout=timeout) for row in rows]  # all make all
                self.across += [group for row, group in zip(rows, groups, strict=True) if self.rank in row]

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self.open.close()
        if not self.active:
            return
        leaves = isinstance(error, Exception) and not isinstance(error, RankLost)
        said = leaves and self._leave(str(error))
        for group in () if self.begins else (self.host, self.waiting, self.device, *self.across):
            dist.destroy_process_group(group)
        del self.host, self.waiting, self.device, self.across  # which closes their connections: the others hear of it
        if self.begins:
            dist.destroy_process_group()
            if leaves and self.first:  # without torchrun the store that the others look into is this process's
                self._wait_for(lambda rank: self._noted("here", rank) or self._noted("left", rank), ROLL_CALL)
        if said:
            raise SystemExit(USER_ERROR) from error

    def _leave(self, why: str) -> bool:
        """Notes why this rank leaves before the others; whether the first one leaves, too, and says the same."""
        self.store.set(f"left/{self.rank}", why)
        if self.first:
            return False
        self._wait_for(lambda rank: rank > 0 or self._noted("left", rank), AGREED)
        return self._noted("left", 0) and self.store.get("left/0") == why.encode()

    def in_words(self) -> str:
        assert self.config is not None
        hosts = sorted(set(self.hosts))
        where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} machines, {', '.join(hosts)}"
        least, rest = divmod(self.config.batch.accumulate, self.size)
        share = f"{least} to {least + 1}" if rest else f"{least}"
        return f"{self.size} ranks on {where}, {share} of a step's {self.config.batch.accumulate} batches each"

    # Exchanges

    def sum(self, values: Tensor) -> Tensor:
        """Their sums over all ranks, in place; on any device."""
        if self.active:
            with self.heard():
                dist.all_reduce(values, group=self._group(values))
        return values

    @property
    def total(self) -> Callable[[Tensor], Tensor] | None:
        """`sum`; None where there is nothing to be summed."""
        return self.sum if self.active else None

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each over all ranks, in place; on any device."""
        if self.active:
            with self.heard():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group(values))
        return values

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        """Begins `sum` of a tensor on the model's device. What comes back, once it is called, has waited for the sums;
        on a GPU the stream waits, not the host."""
        with self.heard():
            work = dist.all_reduce(values, group=self.device, async_op=True)
        assert work is not None

        def wait() -> None:
            with self.heard():
                work.wait()

        return wait

    def gather(self, value: Any, patient: bool = False) -> list[Any]:
        """What every rank gives, by rank; `patient`: of work that takes some ranks longer than others."""
        if not self.active:
            return [value]
        values: list[Any] = [None] * self.size
        with self.heard():
            dist.all_gather_object(values, value, group=self.waiting if patient else self.host)
        return values

    def of_first(self, make: Callable[[], Result]) -> Result:
        """What the first rank makes; the others wait for it, however long it takes."""
        if not self.active:
            return make()
        made = make() if self.first else None
        return self._broadcast(made, self.waiting)

    def spread(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What `work` makes of every item, in their order, on all ranks; each rank does some of them.

        With a model in slices `work` exchanges, so all ranks do it as often: who has no item left does one again.
        """
        items = list(items)
        own = [work(item) for item in items[self.rank :: self.size]]
        if self.shards and self.rank >= len(items) % self.size > 0:
            work(items[-1])
        by_rank = self.gather(own, patient=True)
        return [by_rank[number % self.size][number // self.size] for number in range(len(items))]

    def said_by_first(self, value: Result) -> Result:
        """What the first rank gives."""
        return self._broadcast(value, self.host) if self.active else value

    def _broadcast(self, value: Any, group: dist.ProcessGroup) -> Any:
        values = [value]
        with self.heard():
            dist.broadcast_object_list(values, src=0, group=group)
        return values[0]

    @contextmanager
    def first_of_host_goes_before(self) -> Iterator[None]:
        """Around what the other ranks of a host do once one of them has done it, and find it done."""
        if not self.active:
            yield
            return
        goes_before = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if goes_before:
            yield
        with self.heard():
            dist.barrier(group=self.waiting)
        if not goes_before:
            yield

    def copy_of_first(self, model: nn.Module) -> None:
        """Gives the model of every rank the weights that the first one's has; those on the meta device every rank reads
        by itself."""
        if self.active:
            with self.heard(), torch.no_grad():
                for tensor in (tensor for tensor in model.state_dict().values() if not tensor.is_meta):
                    whole = tensor.contiguous()
                    dist.broadcast(whole, src=0, group=self._group(whole))
                    tensor.copy_(whole)

    def check_settings(self) -> None:
        """
        Raises:
            ValueError: a step has fewer batches than there are ranks, or the ranks do not agree on what they are to do.
        """
        assert self.config is not None
        if self.size > (batches := self.config.batch.accumulate):
            raise ValueError(too_few_batches(batches, self.size))
        if self.shards and batches % self.size:
            raise ValueError(
                f"parallel shard: every rank needs as many batches of a step as the others, and batch.accumulate "
                f"{batches} is no multiple of {self.size} ranks"
            )
        if self.shards and self.size % self.slices:
            raise ValueError(f"parallel shard: slices {self.slices} must divide the number of ranks, {self.size}")
        layout = {"parallel": self.config.parallel, "slices": self.config.slices}
        self.check_same("versions or settings", versions() | settings_that_count(self.config) | layout)

    def check_same(self, what: str, values: dict[str, Any]) -> None:
        """
        Args:
            what: the values are.
            values: of this rank, as JSON; may be nested.

        Raises:
            ValueError: they are others on another rank; lists the differences.
        """
        flat = dict(_flat(json.loads(json.dumps(values, default=str))))
        everywhere = self.gather(flat)
        differences = [
            f"{key} is {everywhere[0].get(key)} on rank 0, {others.get(key)} on rank {rank} ({self.hosts[rank]})"
            for rank, others in enumerate(everywhere)
            for key in {**everywhere[0], **others}
            if everywhere[0].get(key) != others.get(key)
        ]
        if differences:
            more = f"; and {len(differences) - 9} more" if len(differences) > 9 else ""
            raise ValueError(f"the ranks were started with different {what}: {'; '.join(differences[:9])}{more}")

    def _group(self, values: Tensor) -> dist.ProcessGroup:
        return self.host if values.device.type == "cpu" else self.device

    # A rank that is lost

    def passes(self) -> AbstractContextManager:
        """Around forward and backward passes, which exchange where the model lies in slices."""
        return self.heard(alone=False) if self.shards else nullcontext()

    @contextmanager
    def heard(self, alone: bool = True) -> Iterator[None]:
        """Around an exchange, `alone` or with other work: says who is lost where it fails."""
        try:
            yield
        except torch.OutOfMemoryError:  # a RuntimeError as well
            raise
        except RuntimeError as error:
            # gloo's errors have no class of their own
            if not (alone or isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise
            lost, told = self._roll_call()
            if told or (lost and self.rank != min(set(range(self.size)) - set(lost))):
                raise SystemExit(USER_ERROR) from error  # somebody else says it
            raise RankLost(self._in_words(lost, error)) from error

    def _roll_call(self) -> tuple[list[int], list[int]]:
        """The ranks that do not answer, and those that left with an error, which they say themselves."""
        try:
            self.store.set(f"here/{self.rank}", "")
            lost = self._wait_for(lambda rank: self._noted("here", rank) or self._noted("left", rank), ROLL_CALL)
            return lost, [rank for rank in range(self.size) if self._noted("left", rank)]
        except RuntimeError:  # without torchrun the store is the first rank's, and gone with it
            return [0], []

    def _noted(self, what: str, rank: int) -> bool:
        return self.store.check([f"{what}/{rank}"])

    def _wait_for(self, answers: Callable[[int], bool], seconds: float) -> list[int]:
        """The ranks that do not answer within so many seconds."""
        end, silent = time.monotonic() + seconds, list(range(self.size))
        while (silent := [rank for rank in silent if not answers(rank)]) and time.monotonic() < end:
            time.sleep(0.05)
        return silent

    def _in_words(self, lost: list[int], error: Exception) -> str:
        who = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in lost)
        what = f"{who} left, or does not answer," if who else f"the ranks lost one another ({error})"
        if self.config is None:
            return f"{what}: start it again"
        found = checkpoint.steps(Path(self.config.run) / "checkpoints")
        saved = f"the last checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        go_on = "go on with --resume, on any number of ranks" if found else "start it again"
        return f"{what} in step {self.step + 1}; {saved}: {go_on}"


ONE = Ranks(None, active=False)  # this process by itself, whoever started it


def _backend() -> str:
    """NCCL where every rank of this host has a GPU of its own."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "nccl" if dist.is_nccl_available() and torch.cuda.device_count() >= ranks else "gloo"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by their names and those of what they lie in."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
