"""Inner modules under the names that they had before: they go on working, and quietly."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NETWORK = "packing trunk model generate compiled memory balanced_backward"
_FOREIGN = "pretrained families patch plans drop_in multihead_attention"
_DATA = "sources cache corpus batches mixing generated"
_TASKS = "task_gram task_loss task_projection task_tiles"
_RUN = "loop faults interruption progress profiling"
MOVED: dict[str, tuple[str, ...]] = {  # what was one module may be several now
    **{f"engine.{name}": (f"engine.network.{name}",) for name in _NETWORK.split()},
    **{f"engine.{name}": (f"engine.foreign.{name}",) for name in _FOREIGN.split()},
    **{f"training.{name}": (f"training.data.{name}",) for name in _DATA.split()},
    **{f"training.{name}": (f"training.run.{name}",) for name in _RUN.split()},
    **{f"kernels.{name}": (f"kernels.tasks.{name}",) for name in _TASKS.split()},
    "kernels.linear_cross_entropy": ("kernels.vocabulary.linear_cross_entropy",),
    "kernels.pack_plan": ("kernels.attention.pack_plan",),
    "training.tasks": ("engine.tasks.task",),
    "training.builtin": ("engine.tasks.builtin",),
    "training.tokenizer": ("engine.text.tokenizer",),
    "training.cells": ("engine.text.cells", "engine.text.class_names"),
    "training.config": ("engine.config", "engine.settings", "training.config_file"),
    "training.metrics": ("training.scoring.metrics",),
    "training.evaluation": ("training.scoring.evaluation",),
    "training.checkpoint": ("engine.checkpoint",),
    "training.baselines": ("engine.network.bilstm",),
}


class _Moved(MetaPathFinder, Loader):
    """Finds what nobody else does: it comes last."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.removeprefix("trunkline.") in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        places = [f"trunkline.{place}" for place in MOVED[module.__name__.removeprefix("trunkline.")]]

        def find(name: str) -> Any:
            for place in places:
                if hasattr(found := import_module(place), name):
                    return getattr(found, name)
            raise AttributeError(f"{module.__name__} is {' and '.join(places)} now, and has no '{name}'")

        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(_Moved())
