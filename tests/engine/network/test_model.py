"""Losses of mixed batches are those of every example alone, by the definitions of the heads in plain torch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.model import MultiTaskModel, in_model_order
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.tasks.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 60
GPT = TrunkConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_positions=256)
SHAPES = {
    "gpt2": GPT,
    "llama": replace(GPT, positions="rotary", norm="rms", activation="swiglu", bias=False, num_kv_heads=2),
    "untied": replace(GPT, tie_vocabulary=False),
}
BIDIRECTIONAL = replace(GPT, causal=False, norm_position="post")
ACTIVATIONS = {"": None, "none": lambda z: z, "gelu": F.gelu, "tanh": torch.tanh}


def classify(name: str, classes: int) -> Task:
    return Task(name, "classify", ("text",), "label", tuple(f"class {c}" for c in range(classes)))


SMALL = [
    classify("topic", 5),
    Task("stars", "regress", ("text",), "label"),
    classify("polarity", 2),
    Task("parts", "tag", ("text",), "label", ("noun", "verb", "other")),
    Task("answer", "span", ("question", "text"), "label"),
    Task("place", "span", ("text",), "label"),
]
TEXTS = [
    Task("summary", "generate", ("text",), "label"),
    Task("prose", "language-model", ("text",)),
    Task("title", "generate", ("text",), "label"),
]
TASKS = in_model_order([TEXTS[0], *SMALL, *TEXTS[1:]])

Labelled = tuple[int, np.ndarray, np.ndarray]  # number of a task, tokens and label of one of its examples


def make(shape: TrunkConfig, tasks: Sequence[Task], **settings) -> MultiTaskModel:
    """A model in float64 whose weights are so large that every part of it shows."""
    torch.manual_seed(1)
    model = MultiTaskModel(Trunk(shape), tasks, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def labelled(tasks: Sequence[Task]) -> list[Labelled]:
    """Three examples of every task."""
    random, made = np.random.default_rng(0), []
    for number, task in enumerate(tasks):
        for length in (20, 3, 40 if number % 4 else 140):
            tokens = random.integers(0, VOCABULARY, length)
            match task.head:
                case "classify":
                    label = random.integers(0, len(task.labels), 1)
                case "regress":
                    label = random.normal(size=1)
                case "tag":
                    label = np.where(random.random(length) < 0.4, random.integers(0, len(task.labels), length), -1)
                    label[-2] = 1
                case "span":
                    first = length // 3 if len(task.text) > 1 else 0  # behind the question
                    start = random.integers(first, length - 1)
                    label = np.array([first, length - 1, start, random.integers(start, length - 1)])
                case "generate":
                    label = np.array([max(1, length // 2)])
                case "language-model":
                    label = np.array([])
            made.append((number, tokens, label))
    return made


def examples(of: Sequence[Labelled], tasks: Sequence[Task], causal: bool = True) -> list[Example]:
    return [Example(t, tokens, *HEADS[tasks[t].head].label(tokens, label, causal)) for t, tokens, label in of]


def batch_of(of: Sequence[Labelled], tasks: Sequence[Task], causal: bool = True) -> PackedBatch:
    shuffled = [of[i] for i in np.random.default_rng(1).permutation(len(of))]
    return pack(examples(shuffled, tasks, causal), len(tasks), sum(len(tokens) for _, tokens, _ in of) + 30)


def states(model: MultiTaskModel, of: Sequence[Labelled]) -> list[Tensor]:
    """(L, D) of each example, all its tokens; that no sequence sees another is shown in test_trunk.py."""
    batch = pack([Example(0, tokens, np.array([0])) for _, tokens, _ in of], 1)
    parts = model.trunk(batch.tokens, batch.positions, batch.plan).split([len(of[i][1]) for i in batch.order])
    return [parts[batch.order.index(i)] for i in range(len(of))]


def loss_alone(model: MultiTaskModel, of: Labelled, x: Tensor) -> tuple[Tensor, float, float]:
    """Loss, weight and number of right predictions of one example, from its tokens' hidden states (L, D)."""
    t, tokens, label = of
    task = model.tasks[t]
    if model.activation:
        x = x + ACTIVATIONS[model.activation](x @ model.projection_weight[t] + model.projection_bias[t])
    pooled = x[-1] if model.trunk.config.causal else x[0]
    classes = [len(task.labels) or 1 for task in model.tasks if task.head in ("classify", "regress", "tag")]
    columns = slice(sum(classes[:t]), sum(classes[: t + 1]))

    def entropy(logits: Tensor, targets: np.ndarray, smoothing: float = 0.0) -> tuple[Tensor, float, float]:
        targets = torch.from_numpy(targets).long()
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return loss, len(targets), int((logits.argmax(-1) == targets).sum())

    match task.head:
        case "classify":
            logits = model.weight[columns] @ pooled + model.bias[columns]
            return entropy(logits[None], label, model.label_smoothing)
        case "regress":
            number = (model.weight[columns] @ pooled + model.bias[columns])[0]
            return (number - torch.tensor(label[0], dtype=torch.float32)).square(), 1, 0
        case "tag":
            logits = x[label >= 0] @ model.weight[columns].T + model.bias[columns]
            return entropy(logits, label[label >= 0], model.label_smoothing)
        case "span":
            first, end, start, last = label
            logits = model.span_weight[t - len(classes)] @ x[first:end].T  # (2, tokens of the text)
            (a, _, right), (b, _, also) = (
                entropy(logits[i][None], np.array([place - first])) for i, place in enumerate((start, last))
            )
            return (a + b) / 2, 1, (right and also) if start == last else (right + also) / 2
        case _:
            prompt = int(label[0]) if task.head == "generate" else 1
            vocabulary = model.vocabulary if hasattr(model, "vocabulary") else model.trunk.tokens.weight
            return entropy(x[prompt - 1 : -1] @ vocabulary.T, tokens[prompt:], model.label_smoothing)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_losses_are_those_of_each_alone(
    model: MultiTaskModel, of: Sequence[Labelled], tolerance: float = 1e-9
) -> None:
    N, causal = len(model.tasks), model.trunk.config.causal
    sums = model(batch_of(of, model.tasks, causal))
    loss, weight, correct = torch.zeros(3, N, dtype=torch.float64)
    for one, x in zip(of, states(model, of), strict=True):
        own_loss, own_weight, own_correct = loss_alone(model, one, x)
        loss = loss.index_add(0, torch.tensor(one[0]), own_loss[None])
        weight[one[0]] += own_weight
        correct[one[0]] += own_correct
    spans = [task.head == "span" for task in model.tasks]  # always scored in float32
    for t, is_span in enumerate(spans):
        assert_close(sums.loss[t].double(), loss[t], 1e-5 if is_span else tolerance)
    assert torch.equal(sums.weight.double(), weight)
    assert torch.equal(sums.correct.double(), correct)

    scale = torch.rand(N, dtype=torch.float64) + 0.5
    parameters = list(model.parameters())
    got, expected = (
        torch.autograd.grad((scale * x).sum(), parameters, materialize_grads=True) for x in (sums.loss, loss)
    )
    for own, exact in zip(got, expected, strict=True):
        assert_close(own, exact, 1e-5 if any(spans) else tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", ACTIVATIONS)
def test_losses_and_gradients_are_those_of_each_example_alone(shape, projection):
    model = make(SHAPES[shape], TASKS, projection=projection)
    assert_losses_are_those_of_each_alone(model, labelled(TASKS))


def test_label_smoothing_is_of_classes_and_tokens():
    model = make(GPT, TASKS, label_smoothing=0.1)
    assert_losses_are_those_of_each_alone(model, labelled(TASKS), 1e-7)  # 0.1 / classes is rounded to float32


@pytest.mark.parametrize("head", ["classify", "regress", "tag", "span", "generate", "language-model"])
def test_a_model_may_have_heads_of_one_kind_only(head):
    tasks = [task for task in TASKS if task.head == head]
    assert_losses_are_those_of_each_alone(make(GPT, tasks), labelled(tasks))


def test_bidirectional_trunk():
    tasks = in_model_order(SMALL)
    assert_losses_are_those_of_each_alone(make(BIDIRECTIONAL, tasks, projection="gelu"), labelled(tasks))


@pytest.mark.parametrize("task", TEXTS, ids=lambda task: task.name)
def test_next_tokens_need_a_causal_trunk(task):
    with pytest.raises(ValueError, match=f"task '{task.name}' predicts next tokens, which needs a causal trunk"):
        MultiTaskModel(Trunk(BIDIRECTIONAL), [*in_model_order(SMALL), task])


def test_tasks_out_of_order_are_refused():
    assert [task.name for task in TASKS[-3:]] == ["summary", "prose", "title"]  # within a group the order stays
    with pytest.raises(ValueError, match="in the order of in_model_order, got \\['title', 'topic'\\]"):
        MultiTaskModel(Trunk(GPT), [TEXTS[2], SMALL[0]])


@pytest.mark.parametrize("present", [*range(len(TASKS)), None], ids=[*(t.name for t in TASKS), "no rows"])
def test_absent_tasks_have_no_loss_and_no_gradient(present):
    model = make(GPT, TASKS, projection="gelu")
    if present is None:
        batch = pack([Example(0, np.arange(9), np.array([], np.int64))], len(TASKS))
    else:
        batch = batch_of([one for one in labelled(TASKS) if one[0] == present], TASKS)
    sums = model(batch)
    for values in (sums.loss, sums.weight, sums.count, sums.correct):
        assert values.shape == (len(TASKS),)
        assert [t for t, value in enumerate(values.tolist()) if value != 0 and t != present] == []
    assert present is None or (sums.loss[present] > 0 and sums.weight[present] > 0)
    sums.loss.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    owners = gradients["projection_weight"].flatten(1).any(1).nonzero().flatten().tolist()
    assert owners == ([] if present is None else [present])
    bounds = model.class_offsets.tolist()
    for t in range(model.num_small):
        assert gradients["weight"][bounds[t] : bounds[t + 1]].any() == (t == present)
    assert gradients["trunk.tokens.weight"].any() == (present is not None)


@pytest.mark.parametrize("activation", ["none", "gelu", "tanh"])
def test_projection_starts_as_the_identity_and_can_learn(activation):
    torch.manual_seed(2)
    plain = MultiTaskModel(Trunk(GPT), TASKS)
    torch.manual_seed(2)
    projected = MultiTaskModel(Trunk(GPT), TASKS, projection=activation)
    batch = batch_of(labelled(TASKS), TASKS)
    loss = projected(batch).loss
    assert torch.equal(plain(batch).loss, loss)
    loss.sum().backward()
    assert projected.projection_weight.grad.flatten(1).any(1).all()
    assert projected.projection_bias.grad.any(1).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", ["", "gelu"])
def test_logits_are_those_of_the_losses(shape, projection):
    model = make(SHAPES[shape], TASKS, projection=projection)
    for t, task in enumerate(TASKS):
        of = [one for one in labelled(TASKS) if one[0] == t]
        batch = pack(examples(of, TASKS), len(TASKS))
        x, rows = model.hidden(batch), batch.rows
        logits, loss = model.logits(x, t), model.losses(x, batch).loss[t].double()
        match task.head:
            case "regress":
                assert logits.shape == (3, 1)
                assert_close((logits[:, 0] - rows.value).square().sum(), loss)
            case "span":
                assert logits.shape == (len(rows.token), 2)
                labels = np.array([of[i][2] for i in batch.order])  # first token and end of the text, then the answer
                parts = logits.split((labels[:, 1] - labels[:, 0]).tolist())
                answers = torch.from_numpy(labels[:, 2:] - labels[:, :1])
                alone = [F.cross_entropy(part.T, answer) for part, answer in zip(parts, answers, strict=True)]
                assert_close(torch.stack(alone).sum(), loss, 1e-5)
            case _:
                assert logits.shape == (len(rows.token), len(task.labels) or VOCABULARY)
                assert_close(F.cross_entropy(logits, rows.target, reduction="sum"), loss)


@pytest.mark.parametrize("more", [0, 31])
def test_a_head_is_the_same_among_9_and_among_40(more):
    tasks = [classify(f"task-{i}", 2 + i % 4) for i in range(9)]
    others = [classify(f"other-{i}", 2 + i % 19) for i in range(more)]
    few, many = make(GPT, tasks), make(GPT, [*tasks, *others])
    of = labelled(tasks)
    with torch.no_grad():
        many.trunk.load_state_dict(few.trunk.state_dict())
        many.weight[: len(few.weight)], many.bias[: len(few.bias)] = few.weight, few.bias
    assert_losses_are_those_of_each_alone(few, of)
    expected, got = few(batch_of(of, few.tasks)), many(batch_of(of, many.tasks))
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours[:9], theirs)
        assert not ours[9:].any()


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_micro_batches_add_up_to_the_gradient_of_one_batch(parts):
    """As the loop does it: every sum is divided by the weight of its task in all of them."""
    tasks = [task for task in TASKS if task.head != "span"]  # which are computed in float32
    model, of = make(GPT, tasks, projection="tanh"), labelled(tasks)
    lone = tasks.index(SMALL[0])
    of.sort(key=lambda one: one[0] != lone)  # all of one task are in the first micro-batch
    size = -(-len(of) // parts)
    pieces = [of[i : i + size] for i in range(0, len(of), size)]
    assert len(pieces) == parts
    assert [any(one[0] == lone for one in piece) for piece in pieces] == [True] + [False] * (parts - 1)

    def gradients(batches: list[PackedBatch]) -> list[Tensor]:
        model.zero_grad()
        weight = sum(model(batch).weight for batch in batches).detach()
        for batch in batches:
            (model(batch).loss / weight).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, split = gradients([batch_of(of, tasks)]), gradients([batch_of(piece, tasks) for piece in pieces])
    assert len(whole) == len(split) > 20
    for one, many in zip(whole, split, strict=True):
        assert_close(many, one, 1e-10)


def test_untied_vocabulary_is_a_matrix_of_its_own():
    tied, untied = (MultiTaskModel(Trunk(SHAPES[shape]), TASKS) for shape in ("gpt2", "untied"))
    assert tied.vocabulary_weight is tied.trunk.tokens.weight
    assert untied.vocabulary_weight is untied.vocabulary
    assert "vocabulary" in untied.state_dict()
    assert "vocabulary" not in tied.state_dict()
    without = MultiTaskModel(Trunk(SHAPES["untied"]), in_model_order(SMALL))
    assert "vocabulary" not in without.state_dict()  # nothing would use it


# Units of regressions


def test_a_regression_learns_in_units_of_its_labels_and_answers_in_theirs():
    """The same texts with labels in other units: the same loss, and predictions in those units."""
    texts = [np.array([1, 2, 3, 9]), np.array([4, 5, 9]), np.array([6, 7, 8, 9])]
    labels = np.array([1.0, 2.5, 4.0])

    def losses_and_answers(factor: float, offset: float) -> tuple[Tensor, Tensor]:
        model = make(GPT, [Task("stars", "regress", ("text",), "label")])
        own = factor * labels + offset
        model.set_units({0: own})
        examples = [
            Example(0, t, np.array([len(t) - 1]), values=np.array([v])) for t, v in zip(texts, own, strict=True)
        ]
        batch = pack(examples, 1)
        batch = replace(batch, rows=replace(batch.rows, value=batch.rows.value.double()))
        sums, answers = model.score(batch, 0)
        return sums.loss, (answers[:, 0] - offset) / factor

    loss, answers = losses_and_answers(1.0, 0.0)
    for factor, offset in ((250_000.0, 1e6), (1e-3, 0.0)):
        other, others = losses_and_answers(factor, offset)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)  # a batch has labels in float32
        torch.testing.assert_close(others, answers, rtol=1e-6, atol=1e-6)


def test_labels_that_are_all_the_same_have_no_spread():
    model = make(GPT, [Task("stars", "regress", ("text",), "label")])
    model.set_units({0: np.array([3.0, 3.0])})
    assert (float(model.center[0]), float(model.spread[0])) == (3.0, 1.0)


def test_weights_saved_without_units_are_of_the_labels_own():
    model = make(GPT, SMALL)
    model.set_units({1: np.array([0.0, 10.0])})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ("center", "spread")}
    other = make(GPT, SMALL)
    other.load_state_dict(state)
    assert not other.center.any()
    assert bool((other.spread == 1).all())
