"""What people do today: a Hugging Face GPT-2 with one head per task, and three ways of making batches.

    padded    one task per batch, filled up to its longest example
    grouped   the same, from examples of similar length
    packed    any mix in one row, told apart by their positions

As Hugging Face's models do, the vocabulary logits are computed at every token, with or without a label.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel

from trunkline.engine.network.generate import Search
from trunkline.engine.network.trunk import TrunkConfig
from trunkline.training.data.encoded import Encoded

WAYS = ("padded", "grouped", "packed")
GROUPED = 8  # batches that are sorted by length together
READY = 64  # batches that the next is drawn from: batches of one task in a row, from short to long, teach badly

Batch = tuple[list[tuple[int, int]], bool]  # (task, example) of each member; whether they lie in one row


class HuggingFaceModel(nn.Module):
    """GPT2Model and a linear head for every task that is no summary."""

    def __init__(
        self, config: TrunkConfig, splits: Sequence[Encoded], class_weights: dict[str, list[float]] | None = None
    ):
        super().__init__()
        self.class_weights = {name: torch.tensor(factors) for name, factors in (class_weights or {}).items()}
        shape = GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=config.max_positions,
            bos_token_id=0,
            eos_token_id=0,
            embd_pdrop=config.dropout,
            attn_pdrop=0.0,
            resid_pdrop=config.dropout,
            attn_implementation="sdpa",
        )
        self.splits, self.trunk = splits, GPT2Model(shape)
        self.vocabulary_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = _vocabulary_loss
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, len(split.task.labels) or 1)
            if split.task.head != "generate"
            else nn.Identity()
            for split in splits
        )

    def forward(self, batch: Batch, device: torch.device, weights: Tensor | None = None) -> Tensor:
        """Sum of the tasks' mean losses, each times its weight."""
        members, one_row = batch
        tokens = [torch.from_numpy(self.splits[t].tokens_of(i).astype("int64")) for t, i in members]
        lengths = torch.tensor([len(sequence) for sequence in tokens])
        if one_row:
            ids = torch.cat(tokens)[None].to(device)
            positions = torch.cat([torch.arange(len(sequence)) for sequence in tokens])[None].to(device)
            hidden = self.trunk(ids, position_ids=positions, use_cache=False).last_hidden_state[0]  # (T, D)
            starts = lengths.cumsum(0) - lengths
        else:
            ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)
            mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
            hidden = self.trunk(ids, attention_mask=mask.long().to(device), use_cache=False).last_hidden_state
            starts = torch.arange(len(members)) * ids.shape[1]
            hidden = hidden.flatten(0, 1)  # (B * L, D)
        loss = hidden.new_zeros(())
        for task in sorted({t for t, _ in members}):
            places = [place for place, (t, _) in enumerate(members) if t == task]
            labels = [self.splits[task].label_of(members[place][1])[0] for place in places]
            if self.splits[task].task.head == "generate":
                target = torch.full((len(hidden),), -100)
                for place, prompt in zip(places, map(int, labels), strict=True):
                    first, last = int(starts[place]) + prompt - 1, int(starts[place] + lengths[place]) - 1
                    target[first:last] = tokens[place][prompt:]
                own = self.vocabulary_loss(self.trunk.wte.weight, hidden, target.to(device))
            else:
                logits = self.heads[task](hidden[(starts + lengths - 1)[places].to(device)])
                if self.splits[task].task.head == "regress":
                    own = F.mse_loss(logits[:, 0], torch.tensor(labels, dtype=torch.float32, device=device))
                else:
                    classes = torch.tensor(labels, dtype=torch.int64, device=device)
                    own = F.cross_entropy(logits, classes, self.class_weights.get(self.splits[task].task.name))
            loss = loss + (own if weights is None else own * weights[task])
        return loss

    def predict(self, task: int, prompts: Sequence[Any], end: int, search: Search) -> list[Any]:
        """A class, a number or the tokens of a text for each prompt."""
        tokens = [torch.from_numpy(prompt.astype("int64")) for prompt in prompts]
        lengths = torch.tensor([len(sequence) for sequence in tokens])
        if self.splits[task].task.head == "generate":
            writer = GPT2LMHeadModel(self.trunk.config)
            writer.transformer = self.trunk
            writer.tie_weights()
            return write_texts(writer, prompts, end, search)
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        hidden = self.trunk(ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        logits = self.heads[task](hidden[torch.arange(len(tokens)), lengths - 1])
        return (logits[:, 0] if self.splits[task].task.head == "regress" else logits.argmax(-1)).tolist()


def write_texts(model: PreTrainedModel, prompts: Sequence[Any], end: int, search: Search) -> list[list[int]]:
    """The tokens that a causal model writes after each prompt, until its end token or the longest length."""
    tokens = [torch.from_numpy(prompt.astype("int64")) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=end, padding_side="left")
    lengths = torch.tensor([len(sequence) for sequence in tokens])
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - lengths[:, None]
    made = model.generate(
        ids,
        attention_mask=mask.long(),
        max_new_tokens=search.max_new_tokens,
        min_new_tokens=search.min_new_tokens,
        no_repeat_ngram_size=search.no_repeat_ngram,
        num_beams=search.beams,
        length_penalty=search.length_penalty,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [text[text != end].tolist() for text in made[:, ids.shape[1] :]]


def _vocabulary_loss(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def batches(
    way: str, splits: Sequence[Encoded], shares: Sequence[float], budget: int, seed: int, rows: int | None = None
) -> Iterator[Batch]:
    """Endless batches of about `budget` tokens, or of `rows` examples of a task; tasks in proportion to `shares`."""
    rng = random.Random(seed)
    streams = [cycle(rng.sample(range(len(split)), len(split))) for split in splits]

    def draw() -> tuple[int, int]:
        task = rng.choices(range(len(splits)), shares)[0]
        return task, next(streams[task])

    def length(member: tuple[int, int]) -> int:
        return int(splits[member[0]].lengths[member[1]])

    if way == "packed":
        while True:
            members: list[Any] = []
            while sum(map(length, members)) < budget:
                members.append(draw())
            yield members, True
    pools: list[list[tuple[int, int]]] = [[] for _ in splits]
    ready: list[Batch] = []
    while True:
        while len(ready) < READY:
            member = draw()
            pool = pools[member[0]]
            pool.append(member)
            size = rows or max(2, int(budget / splits[member[0]].lengths.mean()))
            wanted = size * (GROUPED if way == "grouped" else 1)
            if len(pool) >= wanted:
                if way == "grouped":
                    pool.sort(key=length)
                ready += [(pool[first : first + size], False) for first in range(0, wanted, size)]
                pool.clear()
        yield ready.pop(rng.randrange(len(ready)))
