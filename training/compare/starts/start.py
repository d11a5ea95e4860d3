"""What a system of a comparison starts from: a checkpoint, whole or cut to some of its blocks, or word vectors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Literal

import torch

from trunkline.engine.checks import at_least, check, from_to_below
from trunkline.engine.console import tell
from trunkline.engine.foreign import pretrained
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.settings import Adapters, Batch, Optimizer
from trunkline.training.compare.starts.cut_checkpoint import cut, kept_blocks
from trunkline.training.pages.units import quantity

STARTS = "starts.json"  # identities by system


@dataclass(frozen=True)
class Start:
    """Where one system starts, and how it learns from there; what is left out is as for all systems.

    Raises:
        ValueError: fields that contradict one another.
    """

    init: str = ""
    """A folder of `starts` by its name; another folder; or a hub id. As `init` of a run."""
    about: str = ""
    """What it was trained on, where that is known; for the tables."""
    blocks: str = ""
    """Blocks of the checkpoint that are kept, such as '0-13, 29', the first being 0; empty: all."""
    why: str = ""
    """Why these blocks; for the tables."""
    warm_up: float = 0.0
    """Part of its budget that it spends on the text of the tasks before it sees a label: masked words where its trunk
    is bidirectional, next words where it is causal. It heals what a cut has broken."""
    vectors: str = ""
    """Word vectors that the Bi-LSTM's embeddings start from: a file of `starts` by its name, or another one."""
    hidden_size: int = 256
    """Width of the Bi-LSTM."""
    adapters: Adapters | None = None
    """As `adapters` of a run; none: the trunk learns."""
    projection: Literal["", "none", "gelu", "tanh", "pooler"] = ""
    optimizer: Optimizer | None = None
    batch: Batch | None = None
    """Of other sizes than for all: its steps are then as many as its budget has room for."""
    prompt_weight: float = 0.0

    def __post_init__(self):
        check(self, "", warm_up=from_to_below(0, 1), hidden_size=at_least(2, 1 << 14), prompt_weight=at_least(0, 1e20))
        if self.init and self.vectors:
            raise ValueError("init and vectors are two starts: give one of them")
        if not self.init:
            for name in ("blocks", "adapters", "projection"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of a checkpoint, and there is no init")
        if self.projection == "pooler" and self.warm_up:
            raise ValueError("projection pooler starts from that of the checkpoint, which a warm_up does not hand on")


@dataclass(frozen=True)
class Found:
    """What a start was found to be; a comparison keeps it, and goes on with the same only."""

    source: str
    """Folder or hub id that a run can start from; empty: random weights, or vectors."""
    family: str
    parameters: int
    """Of the trunk."""
    about: str
    digest: str
    """SHA-256 of the checkpoint as it is given, or of the vectors."""
    vectors: str = ""
    """File with word vectors."""
    blocks: str = ""
    """That are kept, where not all are."""

    @property
    def identity(self) -> str:
        """By which a start is known again: digest and blocks."""
        return f"{self.digest} blocks {self.blocks}" if self.blocks else self.digest

    def in_words(self) -> str:
        known = f"; {self.about}" if self.about else ""
        digest = f", SHA-256 {self.digest[:12]}" if self.digest else ""
        size = f", {quantity(self.parameters)} parameters" if self.parameters else ""
        return f"{self.family}{size}{digest}{known}"


def find_starts(
    given: Mapping[str, Start], systems: Sequence[str], starts: str, run: Path, kept: Path
) -> dict[str, Found]:
    """What every system starts from; says so. `kept` has what `remember_starts` wrote.

    Raises:
        ValueError: a start that there is not, or that was another one when the comparison was begun.
    """
    file = kept / STARTS
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {system: find(system, given[system], starts, run / "starts") for system in systems}
    for system, of in found.items():
        if (before := known.get(system, of.identity)) != of.identity:
            raise ValueError(
                f"compare: the start of {system} has changed since the comparison was begun: SHA-256 {before} then, "
                f"{of.identity} now; put it back, or name another run="
            )
        tell(f"{system} starts from {of.in_words()}")
    return found


def remember_starts(identities: Mapping[str, str], kept: Path) -> None:
    """Beside those of systems that are not asked for this time."""
    file = kept / STARTS
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**known, **identities}, indent=1) + "\n", encoding="utf-8")


def find(system: str, start: Start, starts: str, cuts: Path) -> Found:
    """Finds a checkpoint, cuts it where that is asked for, and says what it is.

    Args:
        starts: folder with checkpoints by name; empty: none.
        cuts: where a checkpoint that is cut is written.

    Raises:
        ValueError: there is no such start, or no such blocks; names the system.
    """
    try:
        if start.vectors:
            path = _place(start.vectors, starts)
            if not path.is_file():
                raise ValueError(f"vectors {path} is no file")
            return Found("", f"word vectors of {path.name}", 0, start.about, _digest(path), str(path))
        if not start.init:
            return Found("", "random weights", 0, start.about, "")
        place = _place(start.init, starts)
        source = str(place) if place.is_dir() or "/" not in start.init else start.init
        if not place.is_dir() and "/" not in start.init:
            there = ", ".join(sorted(path.name for path in Path(starts).iterdir() if path.is_dir())) if starts else ""
            raise ValueError(
                f"there is no folder '{start.init}'" + (f" in {starts}, which has {there or 'none'}" if starts else "")
            )
        shape, digest = pretrained.shape_of(source), pretrained.digest(source)
        kept = kept_blocks(start.blocks, shape.num_layers)
        about, blocks = start.about, ""
        if len(kept) < shape.num_layers:
            source, blocks = str(cut(source, kept, cuts / system, digest)), start.blocks
            reason = f": {start.why}" if start.why else ""
            about = f"{about}; blocks {blocks} of {shape.num_layers} are kept{reason}".removeprefix("; ")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Trunk(replace(shape, num_layers=len(kept))).parameters())
        return Found(source, pretrained.family_name(source), parameters, about, digest, blocks=blocks)
    except ValueError as error:
        raise ValueError(f"compare: start.{system}: {error}") from error


def _place(name: str, starts: str) -> Path:
    beside = Path(starts, name)
    return beside if starts and beside.exists() else Path(name).expanduser()


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()
