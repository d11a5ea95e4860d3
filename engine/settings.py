"""The parts of a config: what is in a step, how the tasks are mixed and weighed, the optimizer, the evaluations."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, get_args

MixingMethod = Literal["proportional", "temperature", "annealed", "fixed", "progress", "loss_ratio"]
ADAPTIVE = ("progress", "loss_ratio")  # methods whose shares react to training
GRADIENT_METHODS = (
    "gradnorm",
    "pcgrad",
    "mgda",
    "cagrad",
    "imtl-g",
    "aligned-mtl",
    "nash-mtl",
)  # weighed by gradients
BalancingMethod = Literal[
    "fixed",
    "uncertainty",
    "dynamic-average",
    "famo",
    "gradnorm",
    "pcgrad",
    "mgda",
    "cagrad",
    "imtl-g",
    "aligned-mtl",
    "nash-mtl",
]


@dataclass(frozen=True)
class Batch:
    """What goes into one step."""

    tokens: int = 2048
    """Token budget of a packed batch."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    max_length: int = 512
    """Longest example, in tokens; what happens to longer ones is their task's policy."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine to a tenth of the learning rate."""

    learning_rate: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.05
    """Share of the steps in which it rises."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    """Longest gradient, in the 2-norm over all parameters; longer ones are scaled down."""
    give_up_after: int = 5
    """Steps in a row whose loss or gradient is not finite that end the run; fewer are left out, named and counted."""


@dataclass(frozen=True)
class Evaluation:
    """When and on how much of the validation splits the model is scored."""

    every: int = 200
    """Steps between evaluations during training; each writes a checkpoint."""
    examples: int = 256
    """Of each task, during training; 0: all. The last evaluation takes all."""
    texts: int = 16
    """Of each generating task, texts written and scored during training; 0: none. The last evaluation takes all."""


@dataclass(frozen=True)
class Mixing:
    """How often each task is seen."""

    method: MixingMethod = "temperature"
    """An example of a task with n of them is drawn in proportion to: n; n^(1/temperature); n^(1 - 0.8 progress), where
    progress goes from 0 to 1 over the run; or the task's share in `shares`. progress and loss_ratio start as 'fixed'
    where there are `shares`, else as 'temperature'; at every evaluation they give more to the tasks whose validation
    loss falls the fastest, or to those where it has fallen the least since the start."""
    temperature: float = 2.0
    """Of method 'temperature': 1 is proportional, larger is more even."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of method 'fixed': every task's share of the examples, by name; they need not add up to 1."""
    patience: int | None = None
    """Evaluations in a row without a better validation loss or score after which a task stops, with any method: its
    examples leave the mix, its head stays as it is, the trunk goes on with the other tasks. None: no task stops."""

    def __post_init__(self):
        if self.method not in get_args(MixingMethod):
            nearest = get_close_matches(str(self.method), get_args(MixingMethod), n=1, cutoff=0.0)[0]
            known = ", ".join(get_args(MixingMethod))
            raise ValueError(f"mixing: method must be one of {known}, got '{self.method}'; did you mean '{nearest}'?")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"mixing: patience must be at least 1 evaluation, got {self.patience}")

    @property
    def reacts(self) -> bool:
        """Whether what is seen depends on how training goes."""
        return self.method in ADAPTIVE or self.patience is not None


@dataclass(frozen=True)
class Balancing:
    """Who decides how much each task counts."""

    method: BalancingMethod = "fixed"
    """fixed: `weights` alone; uncertainty, dynamic-average, famo: from the losses; the others from the tasks' own
    gradients, had in the same backward pass. Batches of a step with accumulation are held until the weights are known,
    except with fixed."""
    layers: tuple[str, ...] = ("last",)
    """Linear layers of the trunk whose gradients are looked at: 'last' for those of the last block, names of blocks or
    of layers such as 'blocks.2' and 'blocks.3.mlp_out'."""
    watch: int = 0
    """Steps between looks at the gradients, for the report, with a method that does without them; 0: none."""

    def __post_init__(self):
        if self.method not in get_args(BalancingMethod):
            methods = ", ".join(get_args(BalancingMethod))
            raise ValueError(f"balancing: method must be one of {methods}, got '{self.method}'")
        if self.watch < 0:
            raise ValueError(f"balancing: watch must be at least 0, got {self.watch}")
