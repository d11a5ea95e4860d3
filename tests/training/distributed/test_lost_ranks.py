"""Ranks that are lost where files are written and read: the others end, and the run goes on from what there was."""

from pathlib import Path

import forked_ranks
import pytest
from test_replicate import described

from trunkline import Engine
from trunkline.engine import checkpoint
from trunkline.training.config_file import load_config

pytestmark = pytest.mark.usefixtures("one_thread")
SAVES = "steps=6 evaluation.every=2"


def test_a_disk_that_is_full_ends_all_ranks_and_a_kill_in_a_save_costs_that_save_alone(tiny_config: Path, tmp_path):
    runs = [
        described(tiny_config, tmp_path / name.replace(" ", "-"), SAVES, fault=name)
        for name in ("disk full", "killed in a save")
    ]
    (said,), (full, left) = forked_ranks.start(2, runs, tmp_path / "outcomes", killed=0)
    assert "step-4 is not saved, earlier ones are kept: No space left on device" in said["error"]
    assert full["error"] == "SystemExit: 2"  # the first rank has said it
    folder = tmp_path / "disk-full" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-2"]
    checkpoint.load(folder / "step-2")

    run = tmp_path / "killed-in-a-save"
    assert left["error"].startswith("RankLost: rank 0 on ")
    assert f"in step 5; the last checkpoint is {run / 'checkpoints' / 'step-2'}: go on with --resume" in left["error"]
    assert (run / "checkpoints" / ".step-4.partial" / "model.safetensors").is_file()

    resumed = [described(tiny_config, run, SAVES, fault="killed while loading", resume=True)]
    (first,), _ = forked_ranks.start(2, resumed, tmp_path / "resumed", killed=1)
    assert first["error"].startswith("RankLost: rank 1 on ")
    assert "in step 1; the last checkpoint is " in first["error"]

    summary = Engine.from_config(load_config(tiny_config, resumed[0]["values"])).fit(resume=True)
    assert summary["steps"] == 6
    assert not (run / "checkpoints" / ".step-4.partial").exists()
