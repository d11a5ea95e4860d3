"""Text from a causal trunk: greedy and beam search for many prompts at once, with a key/value cache.

The prompts go through the trunk as one packed batch, whose keys and values fill the cache; then every step puts one
token of each unfinished text through the trunk.

B prompts, W beams, S = B * W texts, L slots of the cache, G key/value heads, E head width, V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.engine.packing import Example, pack
from trunkline.engine.trunk import Trunk, TrunkConfig
from trunkline.kernels.attention import attention


@dataclass(frozen=True)
class Search:
    """How a text is searched for."""

    max_new_tokens: int = 64
    """Longest text, in tokens."""
    beams: int = 1
    """Candidates kept at every step; 1 is greedy."""
    length_penalty: float = 1.0
    """A text's score is its log-probability divided by its length to this power; above 1 favours longer texts."""
    min_new_tokens: int = 0
    """Shortest text, in tokens."""
    no_repeat_ngram: int = 0
    """No run of this many tokens occurs twice in a text; 0: all may."""


class Cache:
    """Keys and values of all layers for the texts being generated."""

    def __init__(self, config: TrunkConfig, texts: int, slots: int, like: Tensor):
        shape = (config.num_layers, texts, config.kv_heads, slots, config.head_width)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(texts, dtype=torch.int64, device=like.device)
        vocabulary = config.vocab_size if config.exact_match else 0
        self.tokens = torch.zeros(texts, vocabulary, dtype=torch.bool, device=like.device)  # that a text has

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token of each text, q (S, H, E) and k, v (S, G, E): stores key and value, attends to all so far."""
        texts = torch.arange(len(q), device=q.device)
        self.keys[layer, texts, :, self.lengths] = k
        self.values[layer, texts, :, self.lengths] = v
        longest = int(self.lengths.max()) + 1
        visible = torch.arange(longest, device=q.device) <= self.lengths[:, None]  # (S, L)
        out = F.scaled_dot_product_attention(
            q[:, :, None],  # (S, H, 1, E)
            self.keys[layer, :, :, :longest],
            self.values[layer, :, :, :longest],
            attn_mask=visible[:, None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.squeeze(2)

    def repeated(self, tokens: Tensor) -> Tensor | None:
        """(S,) whether the text had this token before, for a trunk that asks; it has it now."""
        if not self.tokens.numel():
            return None
        places = (torch.arange(len(tokens), device=tokens.device), tokens)
        repeated = self.tokens[places]
        self.tokens[places] = True
        return repeated

    def keep(self, texts: Tensor) -> None:
        """Continues with these texts, in this order; one may occur several times."""
        self.keys, self.values = self.keys.index_select(1, texts), self.values.index_select(1, texts)
        self.lengths, self.tokens = self.lengths[texts], self.tokens[texts]


def generate(
    trunk: Trunk,
    logits: Callable[[Tensor], Tensor],
    prompts: Sequence[np.ndarray],
    end: int,
    search: Search | None = None,
) -> list[list[int]]:
    """Continues every prompt until its end token or the longest length.

    Args:
        trunk: causal.
        logits: (S, D) -> (S, V), the vocabulary head of the task.
        prompts: token ids of each; at least one token.
        end: token that ends a text; it is not part of the result.
        search: how; default greedy, at most 64 tokens.

    Returns:
        The new tokens of each prompt, in the order of the prompts.

    Raises:
        ValueError: a prompt and the longest text do not fit the trunk's positions.
    """
    search = search or Search()
    longest = max(map(len, prompts)) + search.max_new_tokens
    if longest > trunk.config.max_positions:
        raise ValueError(
            f"generate: a prompt of {max(map(len, prompts))} tokens and {search.max_new_tokens} new ones are more than "
            f"the trunk's {trunk.config.max_positions} positions"
        )
    with torch.inference_mode():
        x, cache = _prefill(trunk, prompts, longest)
        beams = _Beams(len(prompts), search, end, x.device)
        while True:
            parents = beams.step(logits(x).float().log_softmax(-1))
            if not beams.live:
                return [text for _, text in beams.results]
            cache.keep(parents)
            newest = beams.last
            x = trunk(newest, cache.lengths, cache.attend, repeated=cache.repeated(newest))  # (S,) -> (S, D)
            cache.lengths += 1


def _prefill(trunk: Trunk, prompts: Sequence[np.ndarray], slots: int) -> tuple[Tensor, Cache]:
    """Hidden states of the prompts' last tokens, (B, D), and the cache filled with the prompts."""
    examples = [Example(0, tokens, np.array([len(tokens) - 1])) for tokens in prompts]
    batch = pack(examples, num_tasks=1).to(trunk.tokens.weight.device)
    order = torch.tensor(batch.order, device=batch.tokens.device)
    cache = Cache(trunk.config, len(prompts), slots, trunk.tokens.weight)
    text = order.repeat_interleave(batch.plan.cu_seqlens.diff())  # (T,) the prompt that each token belongs to

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.keys[layer, text, :, batch.positions.long()] = k
        cache.values[layer, text, :, batch.positions.long()] = v
        return attention(q, k, v, batch.plan, causal=True)

    x = trunk(batch.tokens, batch.positions, attend, batch.rows.token)
    if trunk.config.exact_match:
        cache.tokens[text, batch.tokens] = True
    cache.lengths[order] = batch.plan.cu_seqlens.diff().long()
    return torch.empty_like(x).index_copy_(0, order, x), cache


class _Beams:
    """The candidates of every prompt: up to W unfinished texts, and the best finished one.

    A prompt is done as soon as W of its texts have ended, or its texts have the longest length.
    """

    def __init__(self, prompts: int, search: Search, end: int, device: torch.device):
        self.search, self.end = search, end
        self.live = list(range(prompts))  # prompts that are not done
        self.scores = torch.zeros(prompts, 1, device=device)  # (live prompts, texts) log-probabilities
        self.texts = torch.zeros(prompts, 1, 0, dtype=torch.int64, device=device)  # (live prompts, texts, length)
        self.ended = [0] * prompts
        self.results: list[tuple[float, list[int]]] = [(float("-inf"), [])] * prompts

    @property
    def last(self) -> Tensor:
        """(S,) the newest token of every unfinished text."""
        return self.texts[:, :, -1].flatten()

    def step(self, log_p: Tensor) -> Tensor:
        """Extends the texts by one token each, from log-probabilities (S, V).

        Returns:
            (S',) which of the S texts each of the texts to go on with comes from; none when all prompts are done.
        """
        prompts, width = self.scores.shape
        W, V = self.search.beams, log_p.shape[1]
        self._forbid(log_p)
        totals = (self.scores[:, :, None] + log_p.view(prompts, width, V)).flatten(1)
        # at most one candidate of every text is its end, so that of 2 W candidates W go on
        scores, places = totals.topk(min(2 * W, totals.shape[1]))
        parents, tokens = places // V, places % V
        length = self.texts.shape[2] + 1
        survivors: list[tuple[int, list[int]]] = []  # row in `live`, its candidates that go on
        for row, (prompt, row_tokens) in enumerate(zip(self.live, tokens.tolist(), strict=True)):
            going = [c for c, token in enumerate(row_tokens) if token != self.end][:W]
            ending = [c for c in range(W) if row_tokens[c] == self.end]
            self.ended[prompt] += len(ending)
            if length == self.search.max_new_tokens:
                ending = list(range(W))
            elif self.ended[prompt] < W:
                survivors.append((row, going))
            for c in ending:
                self._offer(prompt, float(scores[row, c]), row, int(parents[row, c]), row_tokens[c], length)
        rows = torch.tensor([row for row, _ in survivors], dtype=torch.int64, device=log_p.device)
        chosen = torch.tensor([going for _, going in survivors], dtype=torch.int64, device=log_p.device).view(-1, W)
        parents, tokens = parents[rows].gather(1, chosen), tokens[rows].gather(1, chosen)
        self.texts = torch.cat([self.texts[rows[:, None], parents], tokens[..., None]], -1)
        self.scores = scores[rows].gather(1, chosen)
        self.live = [self.live[row] for row, _ in survivors]
        return (rows[:, None] * width + parents).flatten()

    def _forbid(self, log_p: Tensor) -> None:
        """Sets the log-probabilities (S, V) of the tokens that may not come next to -inf."""
        texts, n = self.texts.flatten(0, 1), self.search.no_repeat_ngram  # (S, length so far)
        if texts.shape[1] < self.search.min_new_tokens:
            log_p[:, self.end] = float("-inf")
        if 0 < n <= texts.shape[1]:
            ngrams = texts.unfold(1, n, 1)  # (S, runs, n)
            begun = (ngrams[..., :-1] == texts[:, None, texts.shape[1] - n + 1 :]).all(
                -1
            )  # a run that could be repeated
            text, run = begun.nonzero(as_tuple=True)
            log_p[text, ngrams[text, run, -1]] = float("-inf")

    def _offer(self, prompt: int, score: float, row: int, parent: int, token: int, length: int) -> None:
        """Takes a finished text if it is the prompt's best so far."""
        score /= length**self.search.length_penalty
        if score > self.results[prompt][0]:
            text = self.texts[row, parent].tolist()
            self.results[prompt] = (score, text if token == self.end else [*text, token])
