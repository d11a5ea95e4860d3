"""Checkpoints as transformers writes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model as transformers does."""
    from checkpoints import make

    def write(model: torch.nn.Module | str, **options) -> Path:
        model = make(model) if isinstance(model, str) else model
        model.save_pretrained(tmp_path / "theirs", **options)
        return tmp_path / "theirs"

    return write
