"""Every balancing method against what its paper asks of it, and training with each."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from conftest import Finished
from trunkline import Engine
from trunkline.engine import checkpoint
from trunkline.engine.settings import Balancing, Evaluation
from trunkline.training.balancing import methods as balancing
from trunkline.training.balancing.methods import FROM_GRADIENTS, FROM_LOSSES, Seen, State
from trunkline.training.config_file import load_config

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = [*FROM_LOSSES, *FROM_GRADIENTS]


def gradients(kind: str, n: int = 5) -> np.ndarray:
    """(n, 40) of tasks that agree, that are in conflict, or that are of very different lengths."""
    g = np.random.default_rng(3).normal(size=(n, 40))
    match kind:
        case "agreeing":
            return g + 2
        case "in conflict":
            return g - 0.95 * g.mean(0) + 0.05
        case "of different lengths":
            return g * np.logspace(-2, 1, n)[:, None]
    raise ValueError(kind)


KINDS = ["agreeing", "in conflict", "of different lengths"]


def seen(g: np.ndarray, losses: np.ndarray | None = None, tasks: np.ndarray | None = None, step: int = 0) -> Seen:
    n = len(g)
    return Seen(
        np.arange(n) if tasks is None else tasks,
        np.ones(n) if losses is None else losses,
        np.ones(n),
        g @ g.T,
        step,
        np.random.default_rng(step),
    )


def solved(function, n: int) -> np.ndarray:
    """The least of a function over the simplex, by a solver that knows nothing else of it."""
    starts = [np.full(n, 1 / n), *(0.9 * np.eye(n) + 0.1 / n)]
    equal = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = [
        minimize(function, s, bounds=[(0, 1)] * n, constraints=[equal], options={"ftol": 1e-15, "maxiter": 1000})
        for s in starts
    ]
    return min(found, key=lambda result: result.fun).x


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_finds_the_shortest_combination(kind):
    g = gradients(kind)
    weights = balancing.mgda(seen(g), State(5)) / 5
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    best = solved(lambda w: np.square(w @ g).sum(), 5)
    assert np.square(weights @ g).sum() <= np.square(best @ g).sum() * (1 + 1e-9)
    assert (g @ (weights @ g)).min() == pytest.approx(np.square(weights @ g).sum(), rel=1e-6)  # helps every task


@pytest.mark.parametrize("kind", KINDS)
def test_cagrad_is_the_best_for_the_worst_task(kind):
    """In a ball around the mean gradient."""
    g, c = gradients(kind), balancing.CAGRAD_RADIUS
    mean = g.mean(0)
    direction = balancing.cagrad(seen(g), State(5)) @ g * (1 + c) / 5
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(direction - mean) == pytest.approx(radius, rel=1e-6)
    dual = lambda w: w @ g @ mean + radius * np.linalg.norm(w @ g)  # noqa: E731
    assert (g @ direction).min() == pytest.approx(dual(solved(dual, 5)), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nash_mtl_is_the_bargaining_solution(kind):
    g = gradients(kind)
    weights = balancing.nash_mtl(seen(g), State(5))
    assert weights.min() > 0
    assert weights.sum() == pytest.approx(5)
    product = weights * (g @ (weights @ g))  # the same for all tasks where G w = 1 / w, up to the scale of w
    np.testing.assert_allclose(product / product.mean(), 1, rtol=1e-2 if kind == "in conflict" else 1e-4)
    found = minimize(lambda s: 0.5 * np.square(np.exp(s) @ g).sum() - s.sum(), np.zeros(5), method="BFGS", tol=1e-9).x
    np.testing.assert_allclose(weights, 5 * np.exp(found) / np.exp(found).sum(), rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_imtl_g_goes_equally_far_along_every_gradient(kind):
    g = gradients(kind)
    weights = balancing.imtl_g(seen(g), State(5))
    assert weights.sum() == pytest.approx(5)
    along = g @ (weights @ g) / np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(along, along.mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_aligned_mtl_evens_out_the_principal_components(kind):
    g = gradients(kind)
    left, lengths, right = np.linalg.svd(g, full_matrices=False)
    expected = (left @ np.diag(np.full(5, lengths[-1])) @ right).sum(0)
    np.testing.assert_allclose(balancing.aligned_mtl(seen(g), State(5)) @ g, expected, rtol=1e-7, atol=1e-9)


def test_aligned_mtl_leaves_out_what_is_only_rounding():
    """Two tasks with the same gradient."""
    g = np.repeat(gradients("agreeing", 1), 2, 0)
    np.testing.assert_allclose(balancing.aligned_mtl(seen(g), State(2)), [1, 1], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pcgrad_projects_one_gradient_after_the_other(kind):
    g = gradients(kind)
    random, total = np.random.default_rng(0), np.zeros(40)
    for i in range(5):
        part = g[i].copy()
        for j in random.permutation(5):
            if j != i and part @ g[j] < 0:
                part -= (part @ g[j]) / (g[j] @ g[j]) * g[j]
        total += part
    np.testing.assert_allclose(balancing.pcgrad(seen(g), State(5)) @ g, total, rtol=1e-9, atol=1e-12)
    assert kind == "in conflict" or balancing.pcgrad(seen(gradients("agreeing")), State(5)).tolist() == [1.0] * 5


def repeated(method: str, g: np.ndarray, steps: int, losses=lambda step: None) -> np.ndarray:
    state, function = State(len(g)), (FROM_LOSSES | FROM_GRADIENTS)[method]
    for step in range(steps):
        weights = function(seen(g, losses(step), step=step), state)
    return weights


def test_gradnorm_makes_gradients_equally_long():
    g = gradients("of different lengths", 4)[:, :] + 0
    weights = repeated("gradnorm", g, 4000)
    lengths = weights * np.linalg.norm(g, axis=1)
    assert weights.sum() == pytest.approx(4)
    assert lengths.max() / lengths.min() < 1.2
    assert np.linalg.norm(g, axis=1).max() / np.linalg.norm(g, axis=1).min() > 100


def test_gradnorm_gives_more_to_a_task_that_lags():
    g = gradients("agreeing", 3)
    weights = repeated("gradnorm", g, 300, lambda step: np.array([1.0, 1.0, 1.0 if step == 0 else 0.3]))
    assert weights[2] < weights[:2].min()


def test_uncertainty_ends_at_the_variance_of_each_loss():
    """Where exp(s) = L, which is least for L exp(-s) + s."""
    losses = np.array([0.2, 1.0, 6.0])
    assert repeated("uncertainty", np.eye(3), 1, lambda _: losses).tolist() == pytest.approx([1, 1, 1])
    np.testing.assert_allclose(repeated("uncertainty", np.eye(3), 3000, lambda _: losses), 0.5 / losses, rtol=1e-3)


def test_dynamic_average_favours_what_stands_still():
    window = balancing.AVERAGE_WINDOW
    fall = lambda step: np.array([2.0 ** -(step // window), 1.0])  # noqa: E731  the first halves every window
    assert repeated("dynamic-average", np.eye(2), 2 * window, fall).tolist() == [1, 1]
    weights = repeated("dynamic-average", np.eye(2), 2 * window + 1, fall)
    np.testing.assert_allclose(weights, 2 * np.exp([0.25, 0.5]) / np.exp([0.25, 0.5]).sum())


def test_famo_starts_by_the_losses_and_goes_after_the_slowest():
    losses = np.array([4.0, 1.0])
    np.testing.assert_allclose(repeated("famo", np.eye(2), 1, lambda _: losses), [0.4, 1.6])
    fall = lambda step: losses * [0.9**step, 1]  # noqa: E731
    first, later = (repeated("famo", np.eye(2), steps, fall) * fall(steps - 1) for steps in (1, 50))
    assert later[1] / later[0] > 1.05 * first[1] / first[0]


@pytest.mark.parametrize("method", METHODS)
def test_an_absent_task_keeps_its_state(method):
    function, state, g = (FROM_LOSSES | FROM_GRADIENTS)[method], State(4), gradients("in conflict", 3)
    function(seen(gradients("agreeing", 4), np.array([1.0, 2.0, 3.0, 4.0])), state)
    before = {name: array.copy() for name, array in state.items()}
    weights = function(seen(g, np.array([1.0, 2.5, 3.5]), np.array([0, 2, 3]), step=1), state)
    assert weights.shape == (3,)
    assert np.isfinite(weights).all()
    assert all(array[1] == before[name][1] for name, array in state.items())


@pytest.mark.parametrize("method", METHODS)
def test_one_task_alone_keeps_its_weight(method):
    weights = repeated(method, gradients("agreeing", 1), 3)
    assert weights == pytest.approx([1.0], abs=0.07)


def test_cagrad_where_the_gradients_cancel_out():
    g = np.array([[1.0, 0.0], [-1.0, 0.0]])
    for method in ("cagrad", "mgda", "nash-mtl", "pcgrad"):
        weights = repeated(method, g, 1)
        assert weights[0] == pytest.approx(weights[1], rel=1e-3), method


@pytest.mark.parametrize(("settings", "message"), [({"method": "pc"}, "method must be one of"), ({"watch": -1}, "wat")])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Balancing(**settings)


# In training


def train(finished: Finished, run: Path, method: str, **changes) -> tuple[dict, list[dict]]:
    config = load_config(finished.config, [f"run={run}", f"balancing={method}"])
    summary = Engine.from_config(replace(config, evaluation=Evaluation(12, 8, 0), **changes)).fit()
    return summary, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_and_resumes_with(method, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(balancing, "AVERAGE_WINDOW", 3)
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    summary, lines = train(finished, run, method)
    for name in ("parts", "where", "retell", "prose"):  # what so few steps can teach
        assert summary["tasks"][name]["last_loss"] < 0.9 * summary["tasks"][name]["first_loss"], name
    logged = [line for line in lines if line["event"] == "step"]
    assert all(("cosines" in line) == (method in FROM_GRADIENTS) for line in logged)
    assert all(("task_weights" in line) == (method != "fixed") for line in logged)
    weights = [*logged[-1].get("task_weights", {}).values()]
    assert method == "fixed" or max(weights) > 1.001 * min(weights)

    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-24")
    config = load_config(finished.config, [f"run={resumed}", f"balancing={method}"])
    Engine.from_config(replace(config, evaluation=Evaluation(12, 8, 0))).fit(resume=True)
    (tensors, state), (expected, expected_state) = (
        checkpoint.load(folder / "checkpoints" / "step-24") for folder in (resumed, run)
    )
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    assert state["balancing"] == expected_state["balancing"]
    assert bool(state["balancing"]) == (method in ("uncertainty", "dynamic-average", "famo", "gradnorm"))


@pytest.mark.parametrize("given", ["pcgrad", Balancing("pcgrad"), {"method": "pcgrad"}], ids=["name", "own", "fields"])
def test_an_engine_takes_what_a_config_takes(given):
    engine = Engine(tasks=["sentiment"], balancing=given)
    assert engine.config.balancing == Balancing("pcgrad")
    with pytest.raises(
        ValueError, match=r"balancing.method: expected one of 'fixed', .*, got 'pc'; did you mean 'pcgrad'"
    ):
        Engine(tasks=["sentiment"], balancing="pc")


def test_the_cosines_are_those_of_the_gradients(finished, tmp_path):
    _, lines = train(finished, tmp_path / "run", "{method: fixed, watch: 4}")
    cosines = np.array(next(line["cosines"] for line in lines if "cosines" in line))
    np.testing.assert_allclose(cosines, cosines.T)
    np.testing.assert_allclose(cosines.diagonal(), 1, atol=1e-3)
    assert np.abs(cosines).max() <= 1.001
    assert np.ptp(cosines) > 0.1


def test_watching_changes_nothing_else(finished, tmp_path):
    (plain, _), (watched, _) = (
        train(finished, tmp_path / name, text, steps=4) for name, text in (("a", "fixed"), ("b", "{watch: 1}"))
    )
    weights = [checkpoint.load(tmp_path / name / "checkpoints" / "step-4")[0]["model"] for name in ("a", "b")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_not_there(finished, tmp_path):
    config = load_config(finished.config, [f"run={tmp_path / 'run'}", "balancing=mgda", "balancing.layers=blocks.7"])
    with pytest.raises(ValueError, match=r"'blocks.7' names no linear layer"):
        Engine.from_config(config).fit()
