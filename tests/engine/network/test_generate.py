"""Texts written with a cache, many at once, are those of a plain loop that reads everything anew for every token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.engine.network.generate import Search, closed_up, generate
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, END = 40, 3
GPT = TrunkConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_positions=220)
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "num_kv_heads": 2}
SHAPES = {
    "gpt2": GPT,
    "llama": replace(GPT, **LLAMA),
    "qwen3": replace(GPT, **LLAMA, head_dim=16, qk_norm=True),
    "exact match": replace(GPT, exact_match=True),
    "ettin": replace(
        GPT, num_layers=3, positions="rotary", activation="geglu", window=11, global_every=2, rope_theta_local=5.0
    ),
}
LENGTHS = [5, 1, 140, 30, 128, 64, 65, 200, 2]

Beam = tuple[float, list[int]]

every_shape = pytest.mark.parametrize("shape", SHAPES)


class Writer:
    """A trunk with a vocabulary head; its texts end after anything from no token to a dozen and more."""

    def __init__(self, shape: str, seed: int = 0, end_bias: float = 2.5, ends: tuple[int, ...] = (END,)):
        torch.manual_seed(seed)
        self.ends = ends
        self.trunk = Trunk(SHAPES[shape]).double().eval()
        with torch.no_grad():
            for parameter in self.trunk.parameters():
                if parameter.ndim > 1 or parameter is getattr(self.trunk, "match", None):
                    # so large that what comes next depends on all that was before
                    parameter.add_(0.4 * torch.randn_like(parameter))
        self.head = 0.5 * torch.randn(VOCABULARY, 32, dtype=torch.float64)
        self.bias = torch.zeros(VOCABULARY, dtype=torch.float64)
        self.bias[list(ends)] = end_bias

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head, self.bias)

    def log_p(self, tokens: list[int]) -> Tensor:
        """(V,) of the next token, without a cache."""
        batch = pack([Example(0, np.array(tokens), np.array([len(tokens) - 1]))], 1)
        with torch.no_grad():
            x = self.trunk(batch.tokens, batch.positions, batch.plan, batch.rows.token)
            return self.logits(x)[0].float().log_softmax(-1)

    def next_log_p(self, prompt: np.ndarray, text: list[int], search: Search) -> Tensor:
        """(V,) with what the search forbids at -inf."""
        log_p, n = self.log_p([*prompt, *text]), search.no_repeat_ngram
        runs = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if n else set()
        for token in range(VOCABULARY):
            if (*text[len(text) - n + 1 :], token) in runs or (
                token in self.ends and len(text) < search.min_new_tokens
            ):
                log_p[token] = float("-inf")
        return log_p

    def greedy(self, prompt: np.ndarray, search: Search) -> list[int]:
        text: list[int] = []
        while len(text) < search.max_new_tokens:
            token = int(self.next_log_p(prompt, text, search).argmax())
            if token in self.ends:
                break
            text.append(token)
        return text

    def beam(self, prompt: np.ndarray, search: Search) -> Beam:
        """Score and text; of the W best continuations those that end are done, and W others go on."""
        W, going, done = search.beams, [(0.0, [])], []
        for length in range(1, search.max_new_tokens + 1):
            candidates: list[Beam] = []
            for score, text in going:
                log_p = self.next_log_p(prompt, text, search) + score
                candidates += [(float(p), [*text, token]) for token, p in enumerate(log_p)]
            candidates.sort(key=lambda candidate: -candidate[0])
            last = length == search.max_new_tokens
            done += [
                (score / length**search.length_penalty, [token for token in text if token not in self.ends])
                for score, text in candidates[:W]
                if last or text[-1] in self.ends
            ]
            going = [candidate for candidate in candidates if candidate[1][-1] not in self.ends][:W]
            if len(done) >= W:
                break
        return max(done, key=lambda text: text[0])

    def score(self, prompt: np.ndarray, text: list[int], search: Search) -> float:
        """Log-probability of a text, divided by its length; of its END too, if it has one."""
        text = text if len(text) == search.max_new_tokens else [*text, END]
        log_p = [float(self.log_p([*prompt, *text[:i]])[token]) for i, token in enumerate(text)]
        return sum(log_p) / len(text) ** search.length_penalty

    def write(self, prompts: list[np.ndarray], search: Search | None) -> list[list[int]]:
        return generate(self.trunk, self.logits, prompts, END, search)


def prompts(lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, VOCABULARY, length) for length in lengths]


@every_shape
def test_greedy_is_that_of_a_plain_loop(shape):
    writer, search = Writer(shape), Search(max_new_tokens=12)
    texts = writer.write(prompts(), search)
    assert texts == [writer.greedy(prompt, search) for prompt in prompts()]
    assert 12 in map(len, texts)  # some are as long as can be, others have ended
    assert len({len(text) for text in texts}) >= 3
    assert not any(END in text for text in texts)


@every_shape
@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.6), (3, 2.0)])
def test_beams_are_those_of_a_plain_loop(shape, beams, penalty):
    writer = Writer(shape, seed=beams)
    search = Search(max_new_tokens=7, beams=beams, length_penalty=penalty)
    chosen = prompts()[:4]
    expected = [writer.beam(prompt, search)[1] for prompt in chosen]
    assert writer.write(chosen, search) == expected
    assert expected != writer.write(chosen, Search(max_new_tokens=7))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_run_of_tokens_occurs_twice(n, beams):
    writer, chosen = Writer("gpt2", end_bias=0.0), prompts()[:5]
    writer.bias[10:13] = 6.0  # tokens that it likes to write again and again
    free, search = Search(16, beams), Search(16, beams, no_repeat_ngram=n)

    def repeats(text: list[int]) -> bool:
        runs = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        return len(set(runs)) < len(runs)

    assert any(map(repeats, writer.write(chosen, free)))
    texts = writer.write(chosen, search)
    assert not any(map(repeats, texts))
    assert texts == [writer.greedy(p, search) if beams == 1 else writer.beam(p, search)[1] for p in chosen]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_has_the_shortest_length_at_least(beams):
    writer, chosen = Writer("llama"), prompts()[:6]
    free, search = Search(12, beams), Search(12, beams, min_new_tokens=5)
    assert min(map(len, writer.write(chosen, free))) < 5
    texts = writer.write(chosen, search)
    assert min(map(len, texts)) >= 5
    assert texts == [writer.greedy(p, search) if beams == 1 else writer.beam(p, search)[1] for p in chosen]


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_any_of_several_ends_ends_a_text(beams):
    writer, search = Writer("llama", end_bias=1.5, ends=(END, 11, 22)), Search(12, beams, min_new_tokens=1)
    texts = generate(writer.trunk, writer.logits, prompts(), writer.ends, search)
    assert texts == [writer.greedy(p, search) if beams == 1 else writer.beam(p, search)[1] for p in prompts()]
    assert texts != writer.write(prompts(), search)
    assert len({len(text) for text in texts}) > 2


@every_shape
@pytest.mark.parametrize("beams", [1, 3])
def test_many_at_once_are_each_alone(shape, beams):
    writer, search = Writer(shape), Search(max_new_tokens=10, beams=beams)
    texts = writer.write(prompts(), search)
    assert texts == [writer.write([prompt], search)[0] for prompt in prompts()]
    backwards = writer.write(prompts()[::-1], search)
    assert backwards == texts[::-1]


@pytest.mark.parametrize(
    ("going", "places"),
    [([], []), ([0, 1, 2], [0, 1, 2]), ([1, 2, 4, 5], [5, 1, 2, 4]), ([3, 4], [3, 4]), ([0, 4], [0, 4])],
)
def test_what_has_ended_leaves_no_gap_and_little_is_moved(going, places):
    found = closed_up(np.array(going, np.int64)).tolist()
    assert sorted(found) == going
    assert [place for place in going if place < len(going)] == [p for i, p in enumerate(found) if p == i]
    if len(going) < 4:
        assert found == places


def test_greedy_texts_are_those_of_hugging_face():
    """In float32, with prompts of all lengths at once and texts that end at different times."""
    pytest.importorskip("transformers")
    from trunkline.benchmarks.systems.hugging_face import write_texts

    trunk, search = Writer("gpt2", seed=5).trunk.float(), Search(max_new_tokens=12, min_new_tokens=2, no_repeat_ngram=3)
    with torch.no_grad():
        trunk.tokens.weight[END] *= 3.0
    expected = write_texts(trunk.to_hugging_face().eval(), prompts(), END, search)
    assert generate(trunk, lambda x: F.linear(x, trunk.tokens.weight), prompts(), END, search) == expected
    assert len({len(text) for text in expected}) > 2


def test_more_beams_find_texts_that_are_more_likely():
    """On the whole; a single text of beam search can be less likely than the greedy one."""
    greedy, beams = Search(max_new_tokens=6), Search(max_new_tokens=6, beams=5)
    gains = []
    for seed in range(4):
        writer, chosen = Writer("gpt2", seed), prompts()[:4]
        for prompt, a, b in zip(chosen, writer.write(chosen, greedy), writer.write(chosen, beams), strict=True):
            gains.append(writer.score(prompt, b, beams) - writer.score(prompt, a, greedy))
    assert sum(gains) > 0
    assert sum(gain >= 0 for gain in gains) >= 0.75 * len(gains)


def test_as_many_beams_as_there_are_texts_find_the_best_one():
    writer, search = Writer("llama"), Search(max_new_tokens=2, beams=VOCABULARY // 2)
    for prompt in prompts()[:3]:
        first = writer.log_p(list(prompt)).tolist()
        texts = [[a, b] for a in range(VOCABULARY) if a != END for b in range(VOCABULARY)]
        second = {a: writer.log_p([*prompt, a]).tolist() for a in range(VOCABULARY) if a != END}
        scores = [(first[END], [])] + [((first[a] + second[a][b]) / 2, [a, b]) for a, b in texts]
        best = max(scores, key=lambda text: text[0])[1]
        assert writer.write([prompt], search) == [[token for token in best if token != END]]


def test_a_text_may_be_empty():
    assert Writer("gpt2", end_bias=100.0).write(prompts([4, 150]), Search(max_new_tokens=5)) == [[], []]
    assert Writer("gpt2", end_bias=100.0).write(prompts([4, 150]), Search(max_new_tokens=5, beams=3)) == [[], []]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("longest", [1, 2, 9])
def test_a_text_that_does_not_end_has_the_longest_length(beams, longest):
    texts = Writer("gpt2", end_bias=-100.0).write(prompts([4, 150]), Search(max_new_tokens=longest, beams=beams))
    assert [len(text) for text in texts] == [longest, longest]


def test_default_is_greedy_with_64_tokens():
    writer = Writer("gpt2", end_bias=-100.0)
    assert writer.write(prompts([4]), None) == [writer.greedy(prompts([4])[0], Search(64))]


def test_length_penalty_favours_longer_texts():
    writer, chosen = Writer("gpt2"), prompts()[:4]
    short, long = (
        writer.write(chosen, Search(max_new_tokens=9, beams=4, length_penalty=penalty)) for penalty in (0.0, 3.0)
    )
    assert sum(map(len, short)) < sum(map(len, long))


def test_prompts_that_leave_no_room_are_refused():
    writer = Writer("gpt2")
    assert len(writer.write(prompts([200, 3]), Search(max_new_tokens=20))) == 2
    expected = "a prompt of 201 tokens and 20 new ones are more than the trunk's 220 positions"
    with pytest.raises(ValueError, match=expected):
        writer.write(prompts([3, 201]), Search(max_new_tokens=20))


def test_nothing_is_left_to_gradients():
    writer = Writer("gpt2")
    writer.write(prompts([4]), Search(max_new_tokens=3))
    assert all(parameter.grad is None for parameter in writer.trunk.parameters())
