"""The parts of a config: what is in a step, how the tasks are mixed and weighed, the optimizer, the evaluations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, get_args

from trunkline.engine.checks import above, at_least, check, from_to_below, nearest, raise_all

if TYPE_CHECKING:
    from trunkline.engine.config import Config

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
Tracking = Literal["tensorboard", "wandb", "trackio", "mlflow"]
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
    """Longest example, in tokens; what happens to longer ones is their task's policy. Where a config does not say, as
    many as `tokens` and the trunk's positions have room for, up to 512."""

    def __post_init__(self):
        sizes = at_least(1, 2**31 - 1)
        check(self, "batch.", tokens=sizes, accumulate=at_least(1, 1_000_000), max_length=sizes)


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine to 0."""

    learning_rate: float | Literal["auto"] = "auto"
    """Highest learning rate; auto: 1e-3, and 1e-4 for a trunk that `init` takes from a checkpoint of others."""
    head_learning_rate: float | None = None
    """That of heads and projections; None: as `learning_rate`, and 1e-3 on a trunk from a checkpoint of others."""
    layer_decay: float = 1.0
    """Factor of the rate from each block of the trunk to the one below it: below 1, what is near the input, and the
    embeddings most of all, moves least (Howard and Ruder, arXiv:1801.06146, section 3.1)."""
    freeze: tuple[str, ...] = ()
    """Parts of the trunk that stay as they are: trunk, embeddings, blocks.N, blocks.N-M (both ends included), or the
    name of a module of the trunk such as final_norm. Or tasks by name: their heads and adapters stay, and their
    examples are not seen."""
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

    def __post_init__(self):
        if isinstance(self.warmup, int | float) and self.warmup > 1:
            raise ValueError(
                f"optimizer.warmup is the share of the steps in which the learning rate rises, from 0 to 1, not their "
                f"number; got {self.warmup}"
            )
        check(
            self,
            "optimizer.",
            learning_rate=at_least(0, 10),
            head_learning_rate=at_least(0, 10),
            layer_decay=above(0, 1),
            warmup=at_least(0, 1),
            weight_decay=at_least(0, 100),
            beta1=from_to_below(0, 1),
            beta2=from_to_below(0, 1),
            clip=above(0),
            give_up_after=at_least(1),
        )


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA) on the trunk, which itself stays as it is; names as in PEFT."""

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of zeroing an element of what goes into an adapter in training."""
    layers: Literal["all"] | tuple[str, ...] = "all"
    """Linear layers of the blocks that have adapters: all; or names: qkv, attention_out, mlp_in, mlp_out; blocks.N or
    blocks.N-M; or what the checkpoint's family calls them, such as q_proj and v_proj."""
    of: str | dict[str, tuple[str, ...]] = "task"
    """Whose they are. task: each task has one of its own; shared: all tasks have one together; or groups of tasks by
    name, {inference: [mnli, rte], others: [...]}, every task in one."""
    rslora: bool = False
    """alpha / sqrt(rank) instead of alpha / rank."""
    trunk_digest: str = ""
    """SHA-256 of the checkpoint that they are made for; set when a run begins."""

    def __post_init__(self):
        check(
            self,
            "adapters.",
            rank=at_least(1, 1024),
            alpha=above(0, 1e6),
            dropout=from_to_below(0, 1),
        )
        if isinstance(self.of, str) and self.of not in ("task", "shared"):
            raise ValueError(f"adapters.of must be task, shared or groups of tasks by name, got {self.of!r}")
        if not self.layers or not self.of:
            raise ValueError("adapters.layers is empty" if not self.layers else "adapters.of is empty")

    def groups(self, tasks: Sequence[str]) -> dict[str, list[str]]:
        """The adapters by name, with the tasks of each.

        Raises:
            ValueError: a task in two groups or in none, or one that there is not.
        """
        if self.of == "task":
            return {task: [task] for task in tasks}
        if self.of == "shared":
            return {"shared": list(tasks)}
        assert isinstance(self.of, dict)
        faults = []
        for task in tasks:
            homes = [group for group, members in self.of.items() if task in members]
            if len(homes) != 1:
                faults.append(f"task '{task}' is in {' and '.join(homes) or 'no group'}; every task has one adapter")
        for group, members in self.of.items():
            faults += [f"{group} names '{m}'; did you mean '{nearest(m, tasks)}'?" for m in members if m not in tasks]
            faults += [f"{group} has no tasks"] if not members else []
        raise_all([f"adapters.of: {fault}" for fault in faults])
        return {group: list(members) for group, members in self.of.items()}


@dataclass(frozen=True)
class Evaluation:
    """When and on how much of the validation splits the model is scored."""

    every: int = 200
    """Steps between evaluations during training; each writes a checkpoint."""
    examples: int = 256
    """Of each task, during training; 0: all."""
    last_examples: int = 0
    """Of each task, in the last evaluation; 0: all."""
    texts: int = 16
    """Of each generating task, texts written and scored during training; 0: none. The last evaluation takes all of its
    examples."""

    def __post_init__(self):
        count = at_least(0)
        check(self, "evaluation.", every=at_least(1), examples=count, last_examples=count, texts=count)


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
        check(self, "mixing.", temperature=above(0, 1e6), patience=at_least(1))

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
        check(self, "balancing.", watch=at_least(0))


def not_in_slices(config: "Config", tasks: Sequence[str]) -> Iterator[str]:
    """What parallel shard cannot do of what a config with these tasks asks for, and why."""
    if config.architecture != "trunk":
        yield "parallel shard puts a trunk's blocks together one at a time; architecture bilstm has none"
    if config.balancing.method != "fixed" or config.balancing.watch:
        what = "balancing.watch" if config.balancing.method == "fixed" else f"balancing {config.balancing.method}"
        yield (
            f"parallel shard does not go with {what}, which holds all batches of a step until its weights are known, "
            "and then needs every block again: use balancing fixed, or parallel replicate"
        )
    if config.slices == 1:
        yield "slices 1 is a whole model on every process: use parallel replicate"
    if config.compile is True:
        yield "parallel shard does not go with compile true: a graph would have to hold the exchange; leave it out"
    if config.mixing.patience is not None or any(name in tasks for name in config.optimizer.freeze):
        yield (
            "parallel shard cannot hold the heads of single tasks still, which lie in slices: leave out "
            "mixing.patience, and tasks in optimizer.freeze"
        )
