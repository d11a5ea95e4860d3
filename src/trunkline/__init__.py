"""One shared transformer trunk, many task heads, custom kernels.

The public names are imported at their first use: `import trunkline` and `trunkline --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trunkline import _moved as _moved

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine as Engine
    from trunkline.engine.foreign.drop_in import attention_counts as attention_counts
    from trunkline.engine.foreign.drop_in import flash_attn_func as flash_attn_func
    from trunkline.engine.foreign.drop_in import flash_attn_varlen_func as flash_attn_varlen_func
    from trunkline.engine.foreign.drop_in import scaled_dot_product_attention as scaled_dot_product_attention
    from trunkline.engine.foreign.multihead_attention import MultiheadAttention as MultiheadAttention
    from trunkline.engine.foreign.patch import patch as patch
    from trunkline.engine.foreign.patch import unpatch as unpatch
    from trunkline.engine.network.packing import PackedBatch as PackedBatch
    from trunkline.engine.network.trunk import Trunk as Trunk
    from trunkline.engine.network.trunk_config import TrunkConfig as TrunkConfig
    from trunkline.engine.tasks.task import Task as Task
    from trunkline.kernels.attention.attention import attention as attention
    from trunkline.kernels.attention.pack_plan import PackPlan as PackPlan
    from trunkline.kernels.tasks.task_loss import task_loss as task_loss
    from trunkline.kernels.tasks.task_projection import task_projection as task_projection
    from trunkline.kernels.vocabulary.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from trunkline.training.config_file import load_config as load_config
    from trunkline.training.watching.listener import Listener as Listener

__version__ = "0.1.0"

_MODULES = {
    "Engine": "trunkline.engine.engine",
    "load_config": "trunkline.training.config_file",
    "Listener": "trunkline.training.watching.listener",
    "Task": "trunkline.engine.tasks.task",
    "Trunk": "trunkline.engine.network.trunk",
    "TrunkConfig": "trunkline.engine.network.trunk_config",
    "PackedBatch": "trunkline.engine.network.packing",
    "PackPlan": "trunkline.kernels.attention.pack_plan",
    "attention": "trunkline.kernels.attention.attention",
    "flash_attn_func": "trunkline.engine.foreign.drop_in",
    "flash_attn_varlen_func": "trunkline.engine.foreign.drop_in",
    "scaled_dot_product_attention": "trunkline.engine.foreign.drop_in",
    "attention_counts": "trunkline.engine.foreign.drop_in",
    "MultiheadAttention": "trunkline.engine.foreign.multihead_attention",
    "patch": "trunkline.engine.foreign.patch",
    "unpatch": "trunkline.engine.foreign.patch",
    "task_projection": "trunkline.kernels.tasks.task_projection",
    "task_loss": "trunkline.kernels.tasks.task_loss",
    "linear_cross_entropy": "trunkline.kernels.vocabulary.linear_cross_entropy",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        from difflib import get_close_matches

        (nearest,) = get_close_matches(name, __all__, n=1, cutoff=0.0)
        raise AttributeError(f"trunkline has no '{name}'; the nearest public name is '{nearest}'")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
