"""What run folders hold, to be compared."""

import json
from pathlib import Path

import torch

from trunkline.engine import checkpoint


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(values: dict) -> dict:
    """What does not depend on the time of day."""
    return {k: v for k, v in values.items() if k not in ("seconds", "wall_seconds", "tokens_per_second")}


def assert_same_checkpoints(run: Path, other: Path) -> None:
    names = sorted(path.name for path in run.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        (tensors, state), (expected, expected_state) = (checkpoint.load(folder / name) for folder in (run, other))
        torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
        if "progress" in state:
            assert tensors.keys() == {"model", "optimizer"}
            assert without_clock(state["progress"]) == without_clock(expected_state["progress"])
