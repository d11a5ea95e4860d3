"""The Bi-LSTM with attention that the trunk is compared with: what multi-task models were made of before transformers.

    tokens -> embeddings -> Bi-LSTM over every sequence by itself -> states (T, D)
      a class, a number         the task's additive attention over the states of its sequence -> head
      tags, spans, sentences    the states of the labelled tokens -> head
      a text                    an LSTM that attends to the document's states, and writes or copies

It takes the same packed batches as `MultiTaskModel`, gives the same sums, and uses its heads and losses, so that
batching, mixing, training, scoring and saving are those of the trunk. The encoder of a generating task sees the
document alone, although document and text lie in one sequence of the batch.

T tokens, S sequences, R labelled rows, N tasks, D width, V vocabulary, B documents, L tokens of the longest, Q rows of
the longest text
Sources: additive attention, Bahdanau et al., arXiv:1409.0473; copying, See et al., Get To The Point, arXiv:1704.04368.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.generate import Search, writer_of
from trunkline.engine.network.model import MultiTaskModel, in_model_order
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig, occurred_before
from trunkline.engine.tasks.task import Task
from trunkline.kernels.tasks.task_loss import LossSums, sum_by_task


class Lstm(nn.LSTM):
    """An LSTM over the sequences of a packed stream, without padding."""

    def forward(  # type: ignore[override]
        self, x: Tensor, sequence: Tensor, position: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Outputs in the order of the stream.

        Args:
            x: (T, inputs) of sequences that lie one after the other.
            sequence: (T,) int64, the number of each token's sequence; none is empty.
            position: (T,) int64, offset of each token inside its own sequence.
            state: hidden state and cell to start from, (layers, S, D) each; None: zeros.

        Returns:
            (T, D)
        """
        lengths = sequence.bincount()
        longest_first = lengths.argsort(descending=True, stable=True)
        rank = longest_first.argsort()
        by_time = (position * len(lengths) + rank[sequence]).argsort()  # as PackedSequence wants them
        packed = PackedSequence(x[by_time], position.bincount().cpu())
        if state is not None:
            state = state[0][:, longest_first].contiguous(), state[1][:, longest_first].contiguous()
        y, _ = super().forward(packed, state)
        return y.data[by_time.argsort()]


class Encoder(nn.Module):
    """Embeddings and Bi-LSTM. Of the config it takes vocab_size, hidden_size, num_layers, dropout and exact_match."""

    vocabulary = None  # no checkpoint brings one

    def __init__(self, config: TrunkConfig):
        super().__init__()
        self.config = config
        D, layers = config.hidden_size, config.num_layers
        self.tokens = nn.Embedding(config.vocab_size, D)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if config.exact_match:
            self.match = nn.Parameter(0.02 * torch.randn(D))
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = Lstm(D, D // 2, layers, bidirectional=True, dropout=config.dropout if layers > 1 else 0.0)

    def forward(self, tokens: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        """(T,) -> (T, D)"""
        x = self.tokens(tokens)
        if self.config.exact_match:
            x = x + occurred_before(tokens, position)[:, None] * self.match
        return self.dropout(self.lstm(self.dropout(x), sequence, position))


class AdditiveAttention(nn.Module):
    """One vector for every sequence: the mean of its states, weighted by softmax(v tanh(W h))."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.score = nn.Linear(width, width // 2), nn.Linear(width // 2, 1, bias=False)

    def forward(self, states: Tensor, sequence: Tensor, count: int) -> Tensor:
        """States (T, D) and the sequence of each, (T,) below `count` -> (count, D), 0 where there are no states."""
        score = self.score(self.hidden(states).tanh()).squeeze(-1)  # (T,)
        top = score.new_full((count,), float("-inf")).scatter_reduce(0, sequence, score.detach(), "amax")
        weight = (score - top[sequence]).exp()
        total = score.new_zeros(count).index_add(0, sequence, weight)
        mean = states * (weight / total[sequence])[:, None]
        return states.new_zeros(count, states.shape[1]).index_add(0, sequence, mean)


class Documents(NamedTuple):
    """What a decoder attends to."""

    states: Tensor  # (B, L, D), zeros beyond a document's end
    tokens: Tensor  # (B, L) int64
    there: Tensor  # (B, L) bool, False beyond a document's end

    @classmethod
    def of(cls, states: Sequence[Tensor], tokens: Sequence[Tensor]) -> "Documents":
        """From (length, D) and (length,) of every document."""
        there = [torch.ones_like(own, dtype=torch.bool) for own in tokens]
        parts = (pad_sequence(list(part), batch_first=True) for part in (states, tokens, there))
        return cls(*parts)

    def take(self, which: Tensor) -> "Documents":
        return Documents(*(part[which] for part in self))


class CopyingDecoder(nn.Module):
    """An LSTM that writes a text word by word: each from the vocabulary or, with probability 1 - p, of the document."""

    def __init__(self, width: int, vocabulary: int, dropout: float):
        super().__init__()
        D = width
        self.start = nn.Linear(D, 2 * D)  # from the document's mean state to hidden state and cell
        self.lstm = Lstm(D, D)
        self.query = nn.Linear(D, D, bias=False)
        self.out = nn.Linear(2 * D, D)
        self.switch = nn.Linear(3 * D, 1)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.dropout = nn.Dropout(dropout)

    def initial(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Hidden state and cell before the first word, (1, B, D) each."""
        mean = documents.states.sum(1) / documents.there.sum(1, keepdim=True)
        hidden, cell = self.start(mean).tanh()[None].chunk(2, -1)
        return hidden.contiguous(), cell.contiguous()

    def log_probabilities(self, hidden: Tensor, x: Tensor, documents: Documents, embedding: Tensor) -> Tensor:
        """Of the next token.

        Args:
            hidden: (B, Q, D) the LSTM's outputs.
            x: (B, Q, D) the embeddings that went in.
            documents: B of them.
            embedding: (V, D), which the output shares.

        Returns:
            (B, Q, V)
        """
        scores = self.query(hidden) @ documents.states.mT / hidden.shape[-1] ** 0.5  # (B, Q, L)
        attention = scores.masked_fill(~documents.there[:, None], float("-inf")).softmax(-1)
        context = attention @ documents.states  # (B, Q, D)
        out = self.dropout(self.out(torch.cat([hidden, context], -1)).tanh())
        p = self.switch(torch.cat([hidden, context, x], -1)).sigmoid()  # (B, Q, 1)
        written = p * (out @ embedding.T + self.bias).softmax(-1)
        copied = written.scatter_add(-1, documents.tokens[:, None].expand_as(attention), (1 - p) * attention)
        return copied.clamp_min(1e-30).log()  # a word that is not in the document may have no probability left


class BiLSTM(nn.Module):
    """Encoder, attention, heads and decoder for N tasks: stands where a `MultiTaskModel` can.

    Args:
        config: vocab_size, hidden_size (D, even), num_layers, dropout and exact_match are taken from it.
        tasks: in the order of `in_model_order`.
        label_smoothing: of the classification losses.

    Raises:
        ValueError: a language model among the tasks, whose next word the encoder would see; or an odd width.
    """

    def __init__(self, config: TrunkConfig, tasks: Sequence[Task], label_smoothing: float = 0.0):
        super().__init__()
        assert list(tasks) == in_model_order(tasks)
        if config.hidden_size % 2:
            raise ValueError(f"bilstm: hidden_size must be even, half for each direction; got {config.hidden_size}")
        if language := [task.name for task in tasks if not HEADS[task.head].labelled]:
            raise ValueError(f"bilstm: task '{language[0]}' is a language model, which it cannot be")
        self.tasks = tuple(tasks)
        answering = [task for task in tasks if HEADS[task.head].group != "vocabulary"]
        # of a trunk the heads ask no more than its config, its embedding and (R, D) states
        encoder = cast(Trunk, Encoder(config))
        self.heads = MultiTaskModel(encoder, answering, label_smoothing=label_smoothing)
        self.attention = nn.ModuleDict(
            {
                str(place): AdditiveAttention(config.hidden_size)
                for place, task in enumerate(answering)
                if HEADS[task.head].pools
            }
        )
        if len(answering) < len(tasks):
            self.decoder = CopyingDecoder(config.hidden_size, config.vocab_size, config.dropout)

    @property
    def embedding(self) -> nn.Embedding:
        return self.heads.trunk.tokens

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, batch: PackedBatch, dloss: Tensor | None = None) -> LossSums:
        """Loss sums of every task in the batch, (N,) each; a task without rows has sums of 0.

        `dloss`, see `MultiTaskModel.forward`, saves nothing here.
        """
        return self.losses(self.states(batch), batch)

    def states(self, batch: PackedBatch) -> Tensor:
        """(T, D) of the tokens that are read; 0 of texts that are to be written, and of the dummy sequence."""
        bounds, read = _read(batch, sum(batch.rows.counts[: len(self.heads.tasks)]))
        sequence = torch.bucketize(read, bounds[1:], right=True)
        # numbered without gaps: a document is never empty, for its last token is the first row of its text
        states = self.heads.trunk(batch.tokens[read], sequence, batch.positions[read].long())
        everything = states.new_zeros(len(batch.tokens), states.shape[1])
        return everything.index_copy(0, read, states)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(R, D) what the heads of the tasks that answer look at; batch.rows may hold no others."""
        return self.pooled(self.states(batch), batch)

    def pooled(self, states: Tensor, batch: PackedBatch) -> Tensor:
        """States (T, D) -> (R, D), the rows of the tasks that answer; those that write are left out."""
        rows, parts = batch.rows, []
        first_rows = np.cumsum([0, *rows.counts]).tolist()
        ends = batch.plan.cu_seqlens[1:]
        for place in range(len(self.heads.tasks)):
            own = rows.token[first_rows[place] : first_rows[place + 1]]
            if str(place) in self.attention and len(own):
                first, last = batch.token_offsets[place : place + 2].tolist()
                tokens = torch.arange(first, last, device=states.device)
                sequence = torch.bucketize(tokens, ends, right=True)
                means = self.attention[str(place)](states[first:last], sequence, len(ends))
                parts.append(means[torch.bucketize(own, ends, right=True)])
            else:
                parts.append(states[own])
        return torch.cat(parts) if parts else states[:0]

    def losses(self, states: Tensor, batch: PackedBatch) -> LossSums:
        """States (T, D) -> loss sums of every task, (N,) each."""
        parts = []
        if self.heads.tasks:
            parts.append(self.heads.losses(self.pooled(states, batch), batch))
        if len(self.heads.tasks) < len(self.tasks):
            parts.append(self._writing_losses(states, batch))
        return LossSums(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _writing_losses(self, states: Tensor, batch: PackedBatch) -> LossSums:
        rows, first = batch.rows, len(self.heads.tasks)
        a = sum(rows.counts[:first])
        token, task, target, weight = rows.token[a:], rows.task[a:] - first, rows.target[a:], rows.weight[a:]
        count = len(self.tasks) - first
        if not len(token):
            return LossSums(*states.new_zeros(4, count))
        text = torch.bucketize(token, batch.plan.cu_seqlens[1:], right=True)
        starts = batch.plan.cu_seqlens[text.unique()].tolist()
        lengths = text.unique(return_counts=True)[1].tolist()  # rows of every text
        ends = [own[0].item() + 1 for own in token.split(lengths)]  # of every document
        pieces = [slice(start, int(end)) for start, end in zip(starts, ends, strict=True)]
        documents = Documents.of([states[piece] for piece in pieces], [batch.tokens[piece] for piece in pieces])
        x = self.decoder.dropout(self.embedding(batch.tokens[token]))  # (R, D)
        place = torch.cat([torch.arange(length, device=x.device) for length in lengths])
        text = torch.arange(len(lengths), device=x.device).repeat_interleave(torch.tensor(lengths, device=x.device))
        hidden = self.decoder.lstm(x, text, place, self.decoder.initial(documents))  # (R, D)
        hidden, x = (pad_sequence(list(part.split(lengths)), batch_first=True) for part in (hidden, x))  # (B, Q, D)
        log_p = self.decoder.log_probabilities(hidden, x, documents, self.embedding.weight)[text, place]  # (R, V)
        loss = -log_p.gather(1, target[:, None]).squeeze(1)
        counted = (weight > 0).to(loss.dtype)
        correct = counted * (log_p.argmax(-1) == target)
        return LossSums(*(sum_by_task(part, task, count) for part in (weight * loss, weight, counted, correct)))

    def score(self, batch: PackedBatch, task: int) -> tuple[LossSums, Tensor]:
        """As `MultiTaskModel.score`."""
        states = self.states(batch)
        writes = task >= len(self.heads.tasks)
        answers = states[:0] if writes else self.logits(self.pooled(states, batch), task)
        return self.losses(states, batch), answers

    def logits(self, x: Tensor, task: int) -> Tensor:
        """As `MultiTaskModel.logits`, for tasks that do not write."""
        return self.heads.logits(x, task)

    def logits_by_task(self, x: Tensor, rows: Mapping[int, int]) -> dict[int, Tensor]:
        """As `MultiTaskModel.logits_by_task`, for tasks that do not write."""
        return self.heads.logits_by_task(x, rows)

    def predict(self, logits: Tensor, task: int) -> Any:
        """As `MultiTaskModel.predict`."""
        return self.heads.predict(logits, task)

    def generate(
        self, prompts: Sequence[np.ndarray], task: int, end: int | Sequence[int], search: Search
    ) -> list[list[int]]:
        """As `MultiTaskModel.generate`. The last token of a prompt is the first that the decoder takes in."""
        with torch.inference_mode():
            examples = [Example(task, tokens, np.array([len(tokens) - 1])) for tokens in prompts]
            batch = pack(examples, len(self.tasks)).to(self.device)
            lengths = batch.plan.cu_seqlens.diff().tolist()
            documents = Documents.of(self.states(batch).split(lengths), batch.tokens.split(lengths))
            order = torch.tensor(batch.order, device=self.device).argsort()
            documents = documents.take(order)
            state = self.decoder.initial(documents)
            last = torch.tensor([int(tokens[-1]) for tokens in prompts], device=self.device)
            writer = writer_of(len(prompts), search, end, self.device)
            while True:
                x = self.embedding(last)[:, None]  # (texts, 1, D)
                hidden, state = nn.LSTM.forward(self.decoder.lstm, x.transpose(0, 1), state)
                log_p = self.decoder.log_probabilities(hidden.transpose(0, 1), x, documents, self.embedding.weight)
                kept = torch.from_numpy(writer.step(log_p[:, 0])).to(self.device)
                if not len(kept):
                    return writer.written()
                documents, last = documents.take(kept), writer.last
                state = state[0][:, kept].contiguous(), state[1][:, kept].contiguous()


Model = MultiTaskModel | BiLSTM


def heads_of(model: Model) -> MultiTaskModel:
    """What holds the heads of a model's tasks that answer, and what was fitted for them."""
    return model.heads if isinstance(model, BiLSTM) else model


def _read(batch: PackedBatch, answering: int) -> tuple[Tensor, Tensor]:
    """Bounds of the sequences, (S + 1,), and the tokens that an encoder may see, ascending.

    Those are all of the sequences that are answered, whose labelled rows come first, and of the others those up to the
    first labelled one.
    """
    bounds = batch.plan.cu_seqlens[: len(batch.order) + 1].long()
    token = torch.arange(batch.real_tokens, device=bounds.device)
    sequence = torch.bucketize(token, bounds[1:], right=True)
    rows = batch.rows.token[answering:]
    ends = bounds[1:].scatter_reduce(0, torch.bucketize(rows, bounds[1:], right=True), rows + 1, "amin")
    return bounds, token[token < ends[sequence]]
