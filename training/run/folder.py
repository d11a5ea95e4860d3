"""The folder of a run: made or refused before any work is done, and what must stay the same for the run to go on."""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trunkline.engine.config import Config
from trunkline.engine.foreign import pretrained
from trunkline.training.data.corpus import Corpus


def open_folder(run: Path, resume: bool, overwrite: bool) -> None:
    """Makes the run folder.

    Raises:
        ValueError: it cannot be used, or holds a run and neither `resume` nor `overwrite` is asked for.
    """
    checkpoints = run / "checkpoints"
    if run.exists() and not run.is_dir():
        raise ValueError(f"run folder {run} is a file")
    if resume and not checkpoints.is_dir():
        raise ValueError(f"run folder {run} has no checkpoints to resume from")
    if checkpoints.exists() and not resume:
        if not overwrite:
            raise ValueError(
                f"run folder {run} holds a run: resume it (--resume), replace it (--overwrite), or name another"
            )
        shutil.rmtree(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise ValueError(f"run folder {run} cannot be written: {error}") from error


def fingerprint(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a run to go on; where it lies and what it runs on may change."""
    settings = asdict(config)
    elsewhere = ("run", "base", "data", "tokenizer")  # of the tokenizer the digest counts
    for name in (*elsewhere, "device", "compile", "checkpointing", "profile"):
        del settings[name]
    settings["layout"] = 1 if corpus.tokenizer.is_plain else config.layout
    settings["init"] = pretrained.digest(config.init) if config.init else ""
    settings["tasks"] = [task.name for task in corpus.tasks]  # in the order of the heads
    data = {
        split.task.name: asdict(split.task) | {"examples": len(split), "tokens": int(split.lengths.sum())}
        for split in corpus.train
    }
    return json.loads(json.dumps(settings | {"data": data, "tokenizer_digest": corpus.tokenizer.digest}))
