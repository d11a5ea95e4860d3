"""The Bi-LSTM that the trunk is compared with, and what it shares with a bidirectional trunk that picks sentences."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encoded import BYTES, CLASSIFY, END, GENERATE, REGRESS, SPAN, SUMMARY, TAG, TEXT, changed, ids, made
from trunkline.engine.heads.extract import oracle
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import AdditiveAttention, BiLSTM, Documents, Lstm
from trunkline.engine.network.generate import Search
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.sentences import sentences_of
from trunkline.training.data.encoded import Encoded
from trunkline.training.flops import training_flops
from trunkline.training.scoring.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

EXTRACT = changed(GENERATE, name="pick", head="extract")
MASKED = changed(TEXT, name="hidden", head="masked-language-model")
TASKS = [CLASSIFY, REGRESS, TAG, EXTRACT, SPAN, GENERATE]  # in the order of in_model_order
SHAPE = TrunkConfig(vocab_size=BYTES.vocab_size, hidden_size=16, num_layers=2, num_heads=2, exact_match=True)
TALK = "a: hello there\nb: the red hen is in the barn\na: bye"


def splits() -> list[Encoded]:
    """Examples of every task, of several lengths."""
    texts = ["red", "black hen and fox", "a b"]
    return [
        made(CLASSIFY, text=texts, label=[0, 1, 2]),
        made(REGRESS, text=texts, label=[0.5, 1.5, 2.5]),
        made(TAG, text=texts, label=["noun", "noun verb noun verb", "other noun"]),
        made(EXTRACT, text=[TALK, "one. two."], label=["the red hen", "two"]),
        made(SPAN, question=["who?", "what?"], text=["a hen", "the red fox"], label=["hen", "red fox"]),
        made(GENERATE, text=[TALK, "fox"], label=["hen barn", "a"]),
    ]


def batch_of(data: list[Encoded], budget: int | None = None) -> PackedBatch:
    examples = [split.example(i, task) for task, split in enumerate(data) for i in range(len(split))]
    return pack(examples, len(data), budget)


@pytest.fixture
def model() -> BiLSTM:
    model = BiLSTM(SHAPE, TASKS).eval()
    with torch.no_grad():  # large enough that every part of it makes a difference
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("lengths", [[4, 1, 7, 7, 2], [3], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_lstm_is_that_of_every_sequence_alone(lengths, bidirectional):
    lstm = Lstm(6, 5, num_layers=2, bidirectional=bidirectional).double()
    x = torch.randn(sum(lengths), 6, dtype=torch.float64)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    layers = 4 if bidirectional else 2
    state = tuple(torch.randn(2, layers, len(lengths), 5, dtype=torch.float64))
    for start in (None, state):
        alone = [
            nn.LSTM.forward(lstm, own[:, None], start and tuple(s[:, i : i + 1].contiguous() for s in start))[0][:, 0]
            for i, own in enumerate(x.split(lengths))
        ]
        torch.testing.assert_close(lstm(x, sequence, position, start), torch.cat(alone), rtol=0, atol=1e-12)


def test_additive_attention_is_a_softmax_over_each_sequence():
    attention, states = AdditiveAttention(6).double(), 3 * torch.randn(7, 6, dtype=torch.float64)
    sequence = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for of in (0, 2):
        own = states[sequence == of]
        weight = attention.score(attention.hidden(own).tanh()).squeeze(1).softmax(0)
        expected[of] = weight @ own
    torch.testing.assert_close(attention(states, sequence, 3), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_losses_are_those_of_every_example_alone(model):
    """So nothing leaks from one sequence of a batch to another, and a budget that is not filled changes nothing."""
    data = splits()
    together = model(batch_of(data, budget=600))
    alone = [
        [model(pack([split.example(i, task)], len(data))) for i in range(len(split))] for task, split in enumerate(data)
    ]
    for task, sums in enumerate(alone):
        for name in ("loss", "weight", "count", "correct"):
            total = sum(float(getattr(one, name)[task]) for one in sums)
            assert float(getattr(together, name)[task]) == pytest.approx(total, rel=1e-5), (TASKS[task], name)


def test_every_parameter_gets_a_gradient(model):
    model(batch_of(splits())).loss.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_absent_tasks_have_sums_of_zero(model):
    sums = model(pack([splits()[0].example(0, 0)], len(TASKS)))
    assert sums.count.tolist() == [1, 0, 0, 0, 0, 0]
    sums.loss.sum().backward()


def test_gradients_of_the_writer_are_right():
    """Against finite differences, through attention, switch and copying."""
    model = BiLSTM(replace(SHAPE, hidden_size=8, num_layers=1), [GENERATE]).double()
    batch = batch_of([made(GENERATE, text=["a b", "b"], label=["b", "c a"])])
    loss = model(batch).loss.sum()
    loss.backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in (model.embedding.weight, model.decoder.switch.weight, model.heads.trunk.lstm.weight_hh_l0_reverse):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(float(model(batch).loss.sum()))
                parameter.sub_(sign * step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_the_encoder_sees_nothing_of_the_text_that_is_to_be_written(model):
    """A character has the same probability whatever follows it. (The first token of every text is a space.)"""

    def loss_of_first(target: str) -> float:
        example = made(GENERATE, text=[TALK], label=[target]).example(0, 5)
        only_first = replace(example, weights=np.eye(len(example.rows))[1])
        return float(model(pack([only_first], len(TASKS))).loss[5].detach())

    assert loss_of_first("xy") == pytest.approx(loss_of_first("xz and more"), rel=1e-6)
    assert loss_of_first("xy") != pytest.approx(loss_of_first("zy"), rel=1e-3)


def test_a_word_of_the_document_can_be_copied(model):
    """With the switch at copying, all probability is on the document's tokens."""
    with torch.no_grad():
        model.decoder.switch.weight.zero_()
        model.decoder.switch.bias.fill_(-50.0)
    documents = Documents.of([torch.randn(3, 16), torch.randn(2, 16)], [torch.tensor([5, 9, 5]), torch.tensor([7, 8])])
    x = torch.randn(2, 4, 16)
    p = model.decoder.log_probabilities(x, x, documents, model.embedding.weight).exp()
    assert p[0, :, [5, 9]].sum(-1).detach().tolist() == pytest.approx([1.0] * 4)
    assert p[1, :, [7, 8]].sum(-1).detach().tolist() == pytest.approx([1.0] * 4)


def greedy(model: BiLSTM, prompt: list[int], length: int) -> list[int]:
    """Word by word, each time from the losses of all continuations, which is what training looks at."""
    made_up: list[int] = []
    for _ in range(length):
        tokens = np.array([*prompt, *made_up, 0], np.int32)
        rows = np.arange(len(prompt) - 1, len(tokens) - 1)
        weights = np.eye(len(rows))[-1]
        losses = []
        for word in range(BYTES.vocab_size):
            targets = np.array([*made_up, word])
            example = Example(5, tokens, rows, targets, weights=weights)
            losses.append(float(model(pack([example], len(TASKS))).loss[5]))
        made_up.append(int(np.argmin(losses)))
        if made_up[-1] == END:
            return made_up[:-1]
    return made_up


@torch.no_grad()
def test_generation_writes_what_training_finds_likeliest(model):
    prompts = [[*ids("fox"), SUMMARY], [*ids("a hen"), SUMMARY]]
    search = Search(max_new_tokens=3)
    arrays = [np.array(prompt) for prompt in prompts]
    written = model.generate(arrays, 5, END, search)
    assert written == [greedy(model, prompt, 3) for prompt in prompts]
    assert written == [model.generate([prompt], 5, END, search)[0] for prompt in arrays]
    beams = model.generate(arrays, 5, END, Search(max_new_tokens=5, beams=3, min_new_tokens=2, no_repeat_ngram=2))
    assert all(2 <= len(text) <= 5 for text in beams)


def test_language_models_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match="'books' is a language model"):
        BiLSTM(SHAPE, [TEXT])
    with pytest.raises(ValueError, match="must be even, half for each direction; got 15"):
        BiLSTM(replace(SHAPE, hidden_size=15, num_heads=1), [CLASSIFY])


@pytest.mark.parametrize(
    ("text", "expected"), [(TALK, TALK.split("\n")), ("One. Two three. ", ["One.", "Two three."]), ("x", ["x"])]
)
def test_sentences_end_with_their_last_token(text, expected):
    ((tokens, offsets),) = BYTES.encode([text])
    found = sentences_of(text, offsets, len(offsets))
    assert [sentence for sentence, _ in found] == expected
    assert all(text[: offsets[token][1]].endswith(sentence) for sentence, token in found)
    assert len(tokens) >= found[-1][1]


def test_sentences_that_were_cut_off_are_left_out():
    ((_, offsets),) = BYTES.encode([TALK])
    assert [sentence for sentence, _ in sentences_of(TALK, offsets, 20)] == ["a: hello there"]
    assert sentences_of(TALK, offsets, 5) == [("a: he", 4)]  # there is always one


def test_oracle_takes_sentences_as_long_as_they_help():
    sentences = ["nothing here", "the red hen", "a barn", "the red fox"]
    assert oracle(sentences, "the red hen in a barn") == [1, 2]
    assert oracle(sentences, "the red hen") == [1]
    assert oracle(sentences, "quite different") == [0]
    assert len(oracle(["a b", "c d", "e f", "g h"], "a b c d e f g h")) == 3


@pytest.mark.parametrize("causal", [True, False])
def test_extraction_is_learnt_and_comes_back_as_text(causal):
    data = made(EXTRACT, causal=causal, text=[TALK], label=["the red hen"])
    example = data.example(0, 0)
    assert example.targets.tolist() == [0, 1, 0]
    laid = Layout(BYTES, 64, causal).lay([TALK])
    assert HEADS["extract"].rows(laid) == example.rows.tolist()
    assert HEADS["extract"].describe(EXTRACT, [0, 2], laid) == "a: hello there\na: bye"

    class Sure(nn.Module):
        """Always says the second sentence."""

        tasks, device = (EXTRACT,), torch.device("cpu")

        def score(self, batch: PackedBatch, task: int):
            logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
            return model_of_ones(batch), logits

        def predict(self, logits: Tensor, task: int):
            return HEADS["extract"].predict(logits)

    scored = evaluate(Sure(), BYTES, [data], tokens=200, search=Search())["pick"]  # type: ignore[arg-type]
    assert scored.predictions == ["b: the red hen is in the barn"]
    assert scored.metrics["rouge1"] == pytest.approx(2 * 3 / (3 + 8))


def model_of_ones(batch: PackedBatch):
    from trunkline.kernels.tasks.task_loss import LossSums

    ones = torch.ones(1)
    return LossSums(ones, ones, ones, ones)


def test_masked_tokens_are_the_targets_and_hidden():
    text = "the quick brown fox jumps over the lazy dog"
    data = made(MASKED, causal=False, tokenizer=masking_tokenizer(), text=[text, text])
    example = data.example(0, 0)
    mask = masking_tokenizer().mask()
    assert (example.tokens == mask).sum() == len(example.rows) == round(0.15 * len(text))
    restored = example.tokens.copy()
    restored[example.rows] = example.targets
    assert restored.tolist() == [END, *ids(text)]
    assert data.tokens_of(1).tolist() == example.tokens.tolist()  # the same whenever the text is met
    assert data.reference(0) == len(example.rows)


def masking_tokenizer():
    from trunkline.engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([], 259)
    tokenizer.mask()
    return tokenizer


def test_bidirectional_trunk_has_no_leak_between_sequences(lively_bert):
    """Changing one sequence leaves the states of the others as they are."""
    model, data = lively_bert
    batch = batch_of(data)
    x = model.hidden(batch)
    first, last = batch.plan.cu_seqlens[:2].tolist()
    changed_tokens = batch.tokens.clone()
    changed_tokens[first + 1 : last] = (changed_tokens[first + 1 : last] + 1) % 250
    y = model.hidden(replace(batch, tokens=changed_tokens))
    own = (batch.rows.token >= first) & (batch.rows.token < last)
    assert torch.equal(x[~own], y[~own])
    assert not torch.equal(x[own], y[own])


@pytest.fixture
def lively_bert():
    from trunkline.engine.network.model import MultiTaskModel

    shape = TrunkConfig(
        vocab_size=300,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        norm_position="post",
        embedding_norm=True,
        causal=False,
        token_types=2,
    )
    tasks = [CLASSIFY, EXTRACT, MASKED]
    data = [
        made(CLASSIFY, causal=False, text=["red", "black hen"], label=[0, 1]),
        made(EXTRACT, causal=False, text=[TALK], label=["the red hen"]),
        made(MASKED, causal=False, tokenizer=masking_tokenizer(), text=["a masked text of some length"]),
    ]
    model = MultiTaskModel(Trunk(shape), tasks).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, data


def test_bidirectional_trunk_learns_masked_tokens(lively_bert):
    model, data = lively_bert
    model(batch_of(data)).loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model.weight, model.trunk.tokens.weight))


def counted_by_torch(model: nn.Module, batch: PackedBatch) -> float:
    """Multiply-adds of the linear layers in a forward pass, two operations each, as hooks see them."""
    total = 0.0

    def count(module: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal total
        total += 2.0 * inputs[0].numel() * module.out_features

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Linear)]
    model(batch)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_operations_of_a_trunk(activation):
    from trunkline.engine.network.model import MultiTaskModel

    shape = replace(SHAPE, activation=activation)
    model, data = MultiTaskModel(Trunk(shape), TASKS), splits()
    batch = batch_of(data)
    pairs = sum(length * (length + 1) / 2 for split in data for length in split.lengths.tolist())
    labelled = (
        row for task, split in enumerate(data) for i in range(len(split)) for row in split.example(i, task).rows
    )
    row_pairs = sum(int(row) + 1 for row in labelled)  # of the last block
    rows = batch.rows.counts[5]
    expected = counted_by_torch(model, batch) + 2 * 2 * 16 * (pairs + row_pairs) + 2 * 16 * shape.vocab_size * rows
    assert training_flops(model, batch) == pytest.approx(3 * expected)
    with_tail = batch_of(data, budget=700)
    assert training_flops(model, with_tail) == training_flops(model, batch)


def test_operations_of_a_bilstm(model):
    data = splits()
    batch = batch_of(data)
    documents = [len(data[5].prompt_of(i)) for i in range(2)]
    rows = [int(data[5].lengths[i]) - documents[i] for i in range(2)]
    read = sum(int(split.lengths.sum()) for split in data[:5]) + sum(documents)
    lstm = 2 * 2 * (4 * 8 * (16 + 8)) * read
    attention = 16 * 8 * sum(int(split.lengths.sum()) for split in data[:2])
    decoder = sum(rows) * (4 * 16 * 32 + 16 * 16 + 2 * 16 * 16 + 16 * SHAPE.vocab_size)
    attended = 2 * 16 * sum(rows) * sum(documents) / 2
    assert training_flops(model, batch) == pytest.approx(6 * (lstm + attention + decoder + attended))
    assert math.isfinite(training_flops(model, pack([data[0].example(0, 0)], len(TASKS))))
