"""What can go wrong in a step, and how the run goes on: numbers that are not finite, and too little memory.

A step whose loss or gradient is not finite is left out: weights and optimizer stay as they were. The optimizer finds
that verdict on the device, as it does with a gradient scaler's, and the host learns of it at its next look: no step
waits for it. Where memory is short, a batch is worked on in parts. The losses are normalised by the row weights of the
whole step, so the sum of the parts' gradients is the gradient of the batch.

N tasks
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from trunkline.engine.network.bilstm import Model
from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.batches import Members, Packer
from trunkline.training.run.progress import Progress

NAMED = 5  # examples of a step that is left out
WORDS = 8  # of each of them that are quoted
Result = TypeVar("Result")


class Guard:
    """Leaves out the steps whose loss or gradient is not finite, and ends the run after too many in a row.

    Args:
        optimizer: a fused one: the others have no `found_inf`.
        names: of the N tasks.
        limit: steps in a row that end the run.
        progress: where the steps are counted.
    """

    def __init__(self, optimizer: torch.optim.AdamW, names: Sequence[str], limit: int, progress: Progress):
        self.optimizer, self.names, self.limit, self.progress = optimizer, names, limit, progress
        self.unseen: list[tuple[int, Tensor]] = []  # number of a step, and which of its numbers are finite, (N + 1,)

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Tells the optimizer, before its step, whether to take it; nobody waits.

        Args:
            step: its number, from 1.
            loss: (N,) loss sums.
            norm: () of the gradient.
        """
        finite = torch.cat([loss.isfinite(), norm.isfinite().view(1)])
        self.optimizer.found_inf = (~finite.all()).float()  # type: ignore[attr-defined]
        self.unseen.append((step, finite))

    def look(self) -> list[tuple[int, list[str]]]:
        """The steps since the last look that were left out, each with the tasks whose loss was not finite.

        Waits for the device.
        """
        found = torch.stack([finite for _, finite in self.unseen]).tolist()
        left_out = []
        for (step, _), finite in zip(self.unseen, found, strict=True):
            if all(finite):
                self.progress.left_out_in_a_row = 0
            else:
                self.progress.left_out += 1
                self.progress.left_out_in_a_row += 1
                left_out.append((step, [name for name, good in zip(self.names, finite, strict=False) if not good]))
        self.unseen.clear()
        return left_out

    def check(self) -> None:
        """
        Raises:
            FloatingPointError: too many steps in a row were left out.
        """
        if (count := self.progress.left_out_in_a_row) >= self.limit:
            raise FloatingPointError(
                f"{count} steps in a row were left out because their loss or gradient is not finite, up to step "
                f"{self.progress.step}: try a lower optimizer.learning_rate, or look at the examples named above"
            )


def culprits(model: Model, packer: Packer, members: Members) -> Iterator[tuple[int, int]]:
    """Those of the examples whose loss or gradient is not finite with the weights as they are, found by halving."""
    if _is_finite(model, packer.pack(members)):
        return
    if len(members) == 1:
        yield members[0]
        return
    for half in (members[::2], members[1::2]):
        yield from culprits(model, packer, half)


def _is_finite(model: Model, batch: PackedBatch) -> bool:
    loss = model(batch.to(model.device)).loss.sum()
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients if g is not None)


def named_culprits(model: Model, packer: Packer, tokenizer: Tokenizer, members: Members) -> list[dict[str, Any]]:
    """The first culprits, each with its task, its number among the task's training examples (from 1) and its text."""
    model.eval()
    return [
        {"task": packer.train[task].task.name, "example": i + 1, "text": first_words(packer, tokenizer, task, i)}
        for task, i in islice(culprits(model, packer, members), NAMED)
    ]


def first_words(packer: Packer, tokenizer: Tokenizer, task: int, i: int) -> str:
    words = tokenizer.decode(packer.train[task].tokens_of(i)).split()
    return " ".join(words[:WORDS]) + (" ..." if len(words) > WORDS else "")


def in_words(step: int, tasks: Sequence[str], examples: Sequence[dict[str, Any]] | None) -> str:
    """What the console says of a step that was left out; `examples`: None: nobody has looked for them."""
    what = f"the loss of {', '.join(tasks)}" if tasks else "the gradient"
    if examples is None:
        return f"step {step} is left out: {what} is not finite"
    named = "".join(f"\n  {e['task']}, training example {e['example']}: {e['text']}" for e in examples)
    return f"step {step} is left out: {what} is not finite{named or '; no example is to blame by itself'}"


class Parts:
    """Works on a step's batches in parts where memory is short; how small they must be is remembered.

    Args:
        packer: makes the parts.
        tokenizer: to name an example that does not fit at all.
        progress: where the most tokens of a part are remembered; 0: batches are whole.
        tell: is told when they get smaller.
        compiled: the model's graph, which is fitted to the parts.
        sample: what is in some of the run's batches: the graph has room for their parts.
    """

    def __init__(
        self,
        packer: Packer,
        tokenizer: Tokenizer,
        progress: Progress,
        tell: Callable[[str], None],
        compiled: CompiledModel | None = None,
        sample: Sequence[Members] = (),
    ):
        self.packer, self.tokenizer, self.progress, self.tell = packer, tokenizer, progress, tell
        self.compiled, self.sample = compiled, sample
        self._fit()

    def run(
        self,
        work: Callable[[Sequence[PackedBatch]], Result],
        batches: Sequence[PackedBatch],
        members: Sequence[Members],
        together: str = "",
    ) -> Result:
        """What `work` makes of the batches, or of their parts if it runs out of memory with them.

        Args:
            work: can be called again after a torch.OutOfMemoryError.
            batches: of the step.
            members: what is in each of them.
            together: why parts would not help, as when `work` holds all of the batches until its end.

        Raises:
            MemoryError: an example does not fit by itself, which is named; or the batches do not, `together`.
        """
        while True:
            if self.progress.part_tokens:
                batches = [self._pack(part) for part in self._split(members)]
            try:
                return work(batches)
            except torch.OutOfMemoryError:
                pass  # what the exception holds on to is freed with it, at the end of this block
            if together:
                raise MemoryError(
                    f"out of memory with {sum(len(batch.tokens) for batch in batches)} tokens, {together}: lower "
                    "batch.tokens or batch.accumulate"
                )
            torch.cuda.empty_cache()  # does nothing without a GPU
            self._shrink(members)

    def _pack(self, part: Members) -> PackedBatch:
        if not self.compiled:
            return self.packer.pack(part)
        fits = self.packer.tokens(part) <= self.progress.part_tokens
        batch = self.packer.pack(part, self.progress.part_tokens if fits else None)
        return self.compiled.shapes.pad(batch)

    def _fit(self) -> None:
        if self.compiled and (limit := self.progress.part_tokens):
            parts = [part for part in self._split(self.sample) if self.packer.tokens(part) <= limit]
            batches = [self.packer.pack(part, limit) for part in parts]
            if batches:
                self.compiled.fit(FixedShapes.of(batches, self.compiled.shapes.groups))

    def _split(self, members: Sequence[Members]) -> list[Members]:
        limit = self.progress.part_tokens
        return [part for whole in members for part in self._halved(whole, limit)] if limit else list(members)

    def _halved(self, members: Members, limit: int) -> list[Members]:
        if len(members) == 1 or self.packer.tokens(members) <= limit:
            return [members]
        return self._halved(members[::2], limit) + self._halved(members[1::2], limit)

    def _shrink(self, members: Sequence[Members]) -> None:
        parts = self._split(members)
        divisible = [part for part in parts if len(part) > 1]
        largest = max(divisible or parts, key=self.packer.tokens)
        if not divisible:
            ((task, i),) = largest
            raise MemoryError(
                f"out of memory with a single example, of {self.packer.tokens(largest)} tokens: training example "
                f"{i + 1} of task '{self.packer.train[task].task.name}': "
                f"{first_words(self.packer, self.tokenizer, task, i)}; lower batch.max_length"
            )
        self.progress.part_tokens = -(-self.packer.tokens(largest) // 2)
        self.tell(
            f"out of memory with {self.packer.tokens(largest)} tokens at a time: from here on batches are worked on in "
            f"parts of about {self.progress.part_tokens} tokens, which gives the same gradients"
        )
        self._fit()
