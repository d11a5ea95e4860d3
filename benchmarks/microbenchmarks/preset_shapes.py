"""The sizes at which the trunk's presets call the kernels of the tasks, for certification."""

import torch

from trunkline.engine.network.balanced_backward import linear_layers
from trunkline.engine.network.trunk import PRESETS, Trunk, preset

ROWS, TOKENS, TASKS, CLASSES = 512, 2048, 9, 3


def preset_shapes(kernel: str) -> dict[str, dict[str, int]]:
    """Sizes of a kernel's example by the name of a preset and, with `task_gram`, of a layer that it may look at."""
    shapes: dict[str, dict[str, int]] = {}
    for name in PRESETS:
        config = preset(name)
        D = config.hidden_size
        if kernel == "task_projection":
            shapes[name] = {"rows": ROWS, "tasks": TASKS, "width": D, "columns": D}
        elif kernel == "low_rank":
            shapes[name] = {"rows": TOKENS, "tasks": TASKS, "width": D, "columns": D, "rank": 16, "num_parts": 3}
        elif kernel == "task_loss":
            shapes[name] = {"rows": ROWS, "tasks": TASKS, "width": D, "classes": CLASSES}
        elif kernel == "linear_cross_entropy":
            shapes[name] = {"rows": ROWS, "width": D, "vocabulary": config.vocab_size, "tasks": 2}
        elif kernel == "task_gram":
            with torch.device("meta"):
                layers = linear_layers(Trunk(config), ["last"])
            for path, layer in layers.items():
                widths = {"width_in": layer.in_features, "width_out": layer.out_features}
                shapes[f"{name}, {path.rpartition('.')[2]}"] = {"tokens": TOKENS, "tasks": TASKS, **widths}
    return shapes
