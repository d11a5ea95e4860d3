"""Text from a causal trunk: greedy and beam search for many prompts at once, with a key/value cache.

The prompts go through the trunk as one packed batch, whose keys and values fill the cache; then every step puts one
token of each unfinished text through the trunk. Texts lie in the cache longest prompt first, and those of like lengths
attend together, so that a long one costs the short ones nothing. When a text ends, the last one takes its place.

B prompts, W beams, S = B * W texts, L slots of the cache, G key/value heads, E head width, V vocabulary
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.engine.checks import at_least, check
from trunkline.engine.network.packing import Example, batches_of, pack
from trunkline.engine.network.trunk import Adapt, Trunk, TrunkConfig
from trunkline.kernels.attention.attention import attention


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

    def __post_init__(self):
        check(
            self,
            "search.",
            max_new_tokens=at_least(1, 1_000_000),
            beams=at_least(1, 1024),
            length_penalty=at_least(-20, 20),
            min_new_tokens=at_least(0),
            no_repeat_ngram=at_least(0),
        )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"search.min_new_tokens {self.min_new_tokens} is more than search.max_new_tokens {self.max_new_tokens}"
            )


AT_ONCE = 64  # prompts that are continued together, so that there are not too many logits
CACHED = 8  # tokens of the cache for one of a training batch, which takes more memory: its activations are kept
PARTS = 4  # in which texts attend: more would leave out more of the shorter texts' unused slots, but cost calls


class Cache:
    """Keys and values of all layers for the texts being generated.

    Args:
        lengths: (S,) tokens of each text, which are to be put into `keys` and `values`.
        slots: longest text there may be.
        like: for device and dtype.
    """

    def __init__(self, config: TrunkConfig, lengths: np.ndarray, slots: int, like: Tensor):
        shape = (config.num_layers, len(lengths), config.kv_heads, slots, config.head_width)  # by head: read in one go
        self.config = config
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = lengths  # on the host, so that no step has to wait for the device to know its shapes
        vocabulary = config.vocab_size if config.exact_match else 0
        self.tokens = like.new_zeros(len(lengths), vocabulary, dtype=torch.bool)  # that a text has

    def advance(self) -> Tensor:
        """Makes room for one more token of each text: (S,) int64, its place in the text."""
        texts, device = len(self.lengths), self.keys.device
        self.texts = torch.arange(texts, device=device)
        places = torch.from_numpy(self.lengths).to(device)
        self.newest = self.slots(self.texts, places)
        self.lengths = self.lengths + 1
        # texts, longest of them, what each sees of that, and in a local layer
        self.parts: list[tuple[slice, int, Tensor | None, Tensor | None]] = []
        size = max(-(-texts // PARTS), PARTS)
        for first in range(0, texts, size):
            part = slice(first, min(first + size, texts))
            longest = int(self.lengths[part].max())
            slots = torch.arange(longest, device=device)
            beyond = slots > places[part, None]  # (texts of the part, L)
            before = slots < places[part, None] - self.config.window
            mask = None if self.lengths[part].min() == longest else self._mask(beyond)
            local = self._mask(beyond | before) if self.config.window else None
            self.parts.append((part, longest, mask, local))
        return places

    def _mask(self, hidden: Tensor) -> Tensor:
        """(texts, L) -> (texts, 1, 1, L), what is added to scores."""
        mask = torch.zeros(hidden.shape, dtype=self.keys.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def slots(self, texts: Tensor, places: Tensor) -> Tensor:
        """Of tokens (T,) at these places of these texts: (T * G,), counted over the slots of all heads and texts."""
        _, _, G, slots, _ = self.keys.shape
        heads = torch.arange(G, device=texts.device)
        return ((texts[:, None] * G + heads) * slots + places[:, None]).flatten()

    def put(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (T, G, E) in `slots` of theirs; returns all of the layer, (S, G, L, E)."""
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 2).index_copy_(0, slots, k.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, slots, v.flatten(0, 1))
        return keys, values

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: None, whole: Tensor | None) -> Tensor:
        """One token of each text, q (S, H, E) and k, v (S, G, E): stores key and value, attends to all so far."""
        keys, values = self.put(layer, self.newest, k, v)
        is_local = self.config.window_of(layer) is not None
        out = [
            F.scaled_dot_product_attention(
                q[part, :, None],  # (texts of the part, H, 1, E)
                keys[part, :, :longest],
                values[part, :, :longest],
                attn_mask=local if is_local else mask,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for part, longest, mask, local in self.parts
        ]
        return torch.cat(out).squeeze(2)

    def repeated(self, tokens: Tensor) -> Tensor | None:
        """(S,) whether the text had this token before, for a trunk that asks; it has it now."""
        if not self.tokens.numel():
            return None
        repeated = self.tokens[self.texts, tokens]
        self.tokens[self.texts, tokens] = True
        return repeated

    def join(self, other: "Cache") -> None:
        """Takes in the texts of another cache of the same trunk, behind its own."""
        S, slots = len(self.lengths), max(self.keys.shape[3], other.keys.shape[3])

        def joined(own: Tensor, others: Tensor) -> Tensor:
            both = own[:, :S], others[:, : len(other.lengths)]
            return torch.cat([F.pad(store, (0, 0, 0, slots - store.shape[3])) for store in both], 1)

        self.keys, self.values = joined(self.keys, other.keys), joined(self.values, other.values)
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.tokens = torch.cat([self.tokens[:S], other.tokens])

    def keep(self, texts: np.ndarray) -> None:
        """Continues with these texts, in this order; one may occur several times."""
        if self.tokens.numel():
            self.tokens = self.tokens[torch.from_numpy(texts).to(self.tokens.device)]
        if len(texts) > self.keys.shape[1]:
            chosen = torch.from_numpy(texts).to(self.keys.device)
            self.keys, self.values = self.keys.index_select(1, chosen), self.values.index_select(1, chosen)
        elif len(moved := np.flatnonzero(texts != np.arange(len(texts)))):
            to, source = (torch.from_numpy(places).to(self.keys.device) for places in (moved, texts[moved]))
            longest = int(self.lengths[texts[moved]].max())
            for store in (self.keys, self.values):
                store[:, to, :, :longest] = store[:, source, :, :longest]
        self.lengths = self.lengths[texts]


def check_room(trunk: Trunk, prompt: int, new: int) -> None:
    """
    Raises:
        ValueError: a prompt and what is to be written, in tokens, do not fit the trunk's positions.
    """
    if prompt + new > (most := trunk.config.max_positions):
        raise ValueError(
            f"generate: a prompt of {prompt} tokens and {new} new ones are more than the trunk's {most} positions"
        )


def generate(
    trunk: Trunk,
    logits: Callable[[Tensor], Tensor],
    prompts: Sequence[np.ndarray],
    end: int | Sequence[int],
    search: Search | None = None,
    adapt: Callable[[int, int], Adapt] | None = None,
) -> list[list[int]]:
    """Continues every prompt until its end token or the longest length.

    Args:
        trunk: causal.
        logits: (S, D) -> (S, V), the vocabulary head of the task.
        prompts: token ids of each; at least one token.
        end: token that ends a text, or several any of which does; it is not part of the result.
        search: how; default greedy, at most 64 tokens.
        adapt: of a trunk with adapters, what gives the task's for so many tokens, and rows of them.

    Returns:
        The new tokens of each prompt, in the order of the prompts.

    Raises:
        ValueError: an empty prompt, a search that cannot be, or a prompt and the longest text that do not fit the
            trunk's positions.
    """
    search = search or Search()
    check_search(search, trunk.config.vocab_size)
    if not len(prompts):
        return []
    lengths = np.array([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError(f"generate: the prompt at place {lengths.argmin()} has no tokens")
    slots = int(lengths.max()) + search.max_new_tokens
    check_room(trunk, int(lengths.max()), search.max_new_tokens)
    longest_first = np.argsort(-lengths, kind="stable")
    # who has switched gradients off already may be unable to do so in this way: FSDP2 cannot gather what it then trains
    with torch.inference_mode() if torch.is_grad_enabled() else nullcontext():
        x, cache = prefill(trunk, [prompts[i] for i in longest_first], slots, adapt)
        writer = writer_of(len(prompts), search, end, x.device)
        while len(kept := writer.step(logits(x).float())):
            cache.keep(kept)
            places = cache.advance()
            texts = len(places)
            own = adapt and adapt(texts, texts)
            x = trunk(writer.last, places, cache.attend, repeated=cache.repeated(writer.last), adapt=own)  # -> (S, D)
    written = writer.written()
    return [written[place] for place in np.argsort(longest_first)]


def prompts_at_once(lengths: Sequence[int], search: Search, tokens: int) -> list[list[int]]:
    """Places of the prompts that are continued together, longest first, so that what does not fit shows at once.

    Args:
        lengths: of the prompts.
        search: its longest text and its beams take room beside the prompts.
        tokens: budget of a training batch.
    """
    room = [(length + search.max_new_tokens) * search.beams for length in lengths]
    batches = batches_of(room, CACHED * tokens)[::-1]
    return [batch[first : first + AT_ONCE] for batch in batches for first in range(0, len(batch), AT_ONCE)]


def check_search(search: Search, vocab_size: int) -> None:
    """Refuses a search that cannot be.

    Raises:
        ValueError: more beams than the vocabulary has continuations.
    """
    if search.beams >= vocab_size:
        raise ValueError(f"search.beams must be fewer than the vocabulary's {vocab_size} entries, got {search.beams}")


def writer_of(prompts: int, search: Search, end: int | Sequence[int], device: torch.device) -> "_Greedy | _Beams":
    """What chooses the tokens of so many texts: `step` by `step` from logits, until none goes on."""
    ends = [end] if isinstance(end, int) else list(end)
    return (_Greedy if search.beams == 1 else _Beams)(prompts, search, ends, device)


def prefill(
    trunk: Trunk, prompts: Sequence[np.ndarray], slots: int, adapt: Callable[[int, int], Adapt] | None = None
) -> tuple[Tensor, Cache]:
    """Hidden states of the prompts' last tokens, (B, D), and the cache filled with the prompts."""
    examples = [Example(0, tokens, np.array([len(tokens) - 1])) for tokens in prompts]
    weight = trunk.tokens.weight
    batch = pack(examples, num_tasks=1).to(weight.device)
    if torch.is_autocast_enabled(weight.device.type):
        weight = weight.new_empty(0, dtype=torch.get_autocast_dtype(weight.device.type))
    cache = Cache(trunk.config, np.array([len(prompt) for prompt in prompts]), slots, weight)
    order = torch.tensor(batch.order, device=batch.tokens.device)
    text = order.repeat_interleave(batch.plan.cu_seqlens.diff())  # (T,) the prompt that each token belongs to
    filled = cache.slots(text, batch.positions)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, whole: Tensor | None) -> Tensor:
        cache.put(layer, filled, k, v)
        return attention(q, k, v, batch.plan, causal=True, window=trunk.config.window_of(layer), rows=rows)

    own = adapt and adapt(len(batch.tokens), len(prompts))
    x = trunk(batch.tokens, batch.positions, attend, batch.rows.token, adapt=own)
    if trunk.config.exact_match:
        cache.tokens[text, batch.tokens] = True
    return torch.empty_like(x).index_copy_(0, order, x), cache


def forbid(scores: Tensor, texts: Tensor, search: Search, ends: list[int]) -> None:
    """Sets the scores (S, V) of the tokens that may not follow the texts (S, length so far) to -inf."""
    n = search.no_repeat_ngram
    if texts.shape[1] < search.min_new_tokens:
        scores[:, ends] = float("-inf")
    if 0 < n <= texts.shape[1]:
        ngrams = texts.unfold(1, n, 1)  # (S, runs, n)
        begun = (ngrams[..., :-1] == texts[:, None, texts.shape[1] - n + 1 :]).all(-1)  # a run that could be repeated
        text, run = begun.nonzero(as_tuple=True)
        scores[text, ngrams[text, run, -1]] = float("-inf")


def closed_up(going: np.ndarray) -> np.ndarray:
    """Ascending places of what goes on, with the last of them moved to where something has ended."""
    places = np.arange(len(going))
    gaps = np.setdiff1d(places, going)
    places[gaps] = going[len(going) - len(gaps) :]
    return places


class _Greedy:
    """The most likely token of every text, until its end."""

    def __init__(self, prompts: int, search: Search, ends: list[int], device: torch.device):
        self.search, self.ends, self.length = search, ends, 0
        self.end_tokens = torch.tensor(ends, device=device)
        self.prompts = torch.arange(prompts, device=device)  # (S,) of the unfinished texts
        self.last = torch.empty(0, dtype=torch.int64, device=device)  # (S,) the newest token of each
        self.texts = torch.full(
            (prompts, search.max_new_tokens), ends[0], device=device
        )  # of all prompts, in their order

    def step(self, logits: Tensor) -> np.ndarray:
        """Extends the texts by one token each, from logits (S, V).

        Returns:
            (S',) which of the S texts go on, in their new order.
        """
        if self.search.min_new_tokens or self.search.no_repeat_ngram:
            forbid(logits, self.texts[self.prompts, : self.length], self.search, self.ends)
        token = logits.argmax(-1)  # (S,)
        self.texts[self.prompts, self.length] = token
        self.length += 1
        if self.length == self.search.max_new_tokens:
            return np.empty(0, np.int64)
        going = np.flatnonzero((token[:, None] != self.end_tokens).all(1).cpu().numpy())
        places = closed_up(going)
        if len(going) < len(token):
            chosen = torch.from_numpy(places).to(token.device)
            self.prompts, token = self.prompts[chosen], token[chosen]
        self.last = token
        return places

    def written(self) -> list[list[int]]:
        """The text of every prompt."""
        return [list(takewhile(lambda token: token not in self.ends, text)) for text in self.texts.tolist()]


class _Beams:
    """The candidates of every prompt: up to W unfinished texts, and the best finished one.

    A prompt is done as soon as W of its texts have ended, or its texts have the longest length.
    """

    def __init__(self, prompts: int, search: Search, ends: list[int], device: torch.device):
        self.search, self.ends = search, ends
        self.live = list(range(prompts))  # prompts that are not done
        self.scores = torch.zeros(prompts, 1, device=device)  # (live prompts, texts) log-probabilities
        self.texts = torch.zeros(prompts, 1, 0, dtype=torch.int64, device=device)  # (live prompts, texts, length)
        self.ended = [0] * prompts
        self.results: list[tuple[float, list[int]]] = [(float("-inf"), [])] * prompts

    @property
    def last(self) -> Tensor:
        """(S,) the newest token of every unfinished text."""
        return self.texts[:, :, -1].flatten()

    def step(self, logits: Tensor) -> np.ndarray:
        """Extends the texts by one token each, from logits (S, V).

        Returns:
            (S',) which of the S texts each of the texts to go on with comes from; none when all prompts are done.
        """
        log_p = logits.log_softmax(-1)
        prompts, width = self.scores.shape
        W, V = self.search.beams, log_p.shape[1]
        forbid(log_p, self.texts.flatten(0, 1), self.search, self.ends)
        totals = (self.scores[:, :, None] + log_p.view(prompts, width, V)).flatten(1)
        # at most as many candidates of every text as there are ends are one, so that W of these candidates go on
        scores, places = totals.topk(min((1 + len(self.ends)) * W, totals.shape[1]))
        parents, tokens = places // V, places % V
        length = self.texts.shape[2] + 1
        survivors: dict[int, list[int]] = {}  # row in `live`, its candidates that go on
        for row, (prompt, row_tokens) in enumerate(zip(self.live, tokens.tolist(), strict=True)):
            going = [c for c, token in enumerate(row_tokens) if token not in self.ends][:W]
            ending = [c for c in range(W) if row_tokens[c] in self.ends]
            self.ended[prompt] += len(ending)
            if length == self.search.max_new_tokens:
                ending = list(range(W))
            elif self.ended[prompt] < W:
                survivors[row] = going
            for c in ending:
                self._offer(prompt, float(scores[row, c]), row, int(parents[row, c]), row_tokens[c], length)
        order = closed_up(np.array([*survivors], np.int64)).tolist()
        rows = torch.tensor(order, dtype=torch.int64, device=log_p.device)
        chosen = torch.tensor([survivors[row] for row in order], dtype=torch.int64, device=log_p.device).view(-1, W)
        parents, tokens = parents[rows].gather(1, chosen), tokens[rows].gather(1, chosen)
        self.texts = torch.cat([self.texts[rows[:, None], parents], tokens[..., None]], -1)
        self.scores = scores[rows].gather(1, chosen)
        self.live = [self.live[row] for row in order]
        return (rows[:, None] * width + parents).flatten().cpu().numpy()

    def written(self) -> list[list[int]]:
        """The text of every prompt."""
        return [text for _, text in self.results]

    def _offer(self, prompt: int, score: float, row: int, parent: int, token: int, length: int) -> None:
        """Takes a finished text if it is the prompt's best so far."""
        score /= length**self.search.length_penalty
        if score > self.results[prompt][0]:
            text = self.texts[row, parent].tolist()
            self.results[prompt] = (score, text if token in self.ends else [*text, token])
