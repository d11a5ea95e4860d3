"""Every batch follows from (seed, step); every example is seen once an epoch; shares are kept and batches are full."""

from functools import partial

import numpy as np
import pytest

from trunkline.engine.settings import ADAPTIVE, Mixing
from trunkline.training.data import mixing
from trunkline.training.data.mixing import PROBED, WINDOW, Mixer, shares, spread, windows_of

BUDGET = 2048
METHODS = ("proportional", "temperature", "annealed", "fixed")
every_method = pytest.mark.parametrize("method", METHODS)


def lengths_like(examples: int, mean: float, spread_: float, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths of texts: few are short, most are near the mean, some are very long."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean), spread_, examples)
    return np.clip(drawn, 4, longest).astype(np.int64)


# Lengths of cola, sst2, mrpc, stsb, qqp, qnli, rte and of dialogues of 250 tokens; a twentieth of their sizes
REALISTIC = [
    lengths_like(examples, mean, spread_, longest, seed)
    for seed, (examples, mean, spread_, longest) in enumerate(
        [
            (428, 10, 0.4, 60),
            (3367, 12, 0.7, 80),
            (183, 50, 0.3, 120),
            (287, 28, 0.5, 150),
            (18193, 26, 0.4, 200),
            (5237, 48, 0.4, 512),
            (125, 75, 0.6, 320),
            (623, 250, 0.4, 512),
        ]
    )
]


def mixer(
    lengths: list[np.ndarray], method: str = "temperature", steps: int = 10 * WINDOW, seed: int = 0, **fields
) -> Mixer:
    fixed = [1.0 + t for t in range(len(lengths))]
    return Mixer(lengths, Mixing(method, **fields), fixed, BUDGET, steps, seed)


def tokens_in(mixer: Mixer, step: int) -> int:
    return sum(int(mixer.lengths[task][example]) for task, example in mixer.batch(step))


def waste(mixer: Mixer, steps: int) -> float:
    """Share of the budget that carries nothing."""
    return 1 - sum(tokens_in(mixer, step) for step in range(steps)) / (steps * BUDGET)


def seen(mixer: Mixer, steps: range) -> np.ndarray:
    """(N,) examples of every task in these batches"""
    tasks = [task for step in steps for task, _ in mixer.batch(step)]
    return np.bincount(tasks, minlength=len(mixer.lengths))


# The order


@every_method
def test_a_batch_follows_from_seed_and_step_alone(method):
    through = mixer(REALISTIC, method, steps=1000)
    batches = [through.batch(step) for step in range(1000)]
    assert mixer(REALISTIC, method, steps=1000).batch(777) == batches[777]
    backwards = mixer(REALISTIC, method, steps=1000)
    for step in (999, 777, 778, 31, 32, 0):
        assert backwards.batch(step) == batches[step]


def test_every_seed_is_another_order():
    first, second = (mixer(REALISTIC, seed=seed) for seed in (0, 1))
    for task in range(len(REALISTIC)):
        mine, other = ([e for step in range(32) for t, e in m.batch(step) if t == task] for m in (first, second))
        assert len(set(mine) & set(other)) < 0.9 * len(mine)


def test_tasks_are_not_shuffled_alike():
    plan = mixer([np.full(5000, 20), np.full(5000, 20)]).plan(0)  # a third of each
    first, second = ({e for batch in plan.batches for t, e in batch if t == task} for task in (0, 1))
    assert len(first & second) < 0.5 * len(first)


def test_every_epoch_is_shuffled_anew():
    one = mixer([np.full(WINDOW * BUDGET // 64, 64)])  # about an epoch a window
    batches = [{example for _, example in one.batch(step)} for step in range(2 * WINDOW)]
    assert max(len(batches[0] & later) for later in batches[WINDOW:]) < len(batches[0]) / 2


# Examples


@every_method
@pytest.mark.parametrize(
    "lengths",
    [REALISTIC, [lengths_like(700, 40, 0.5, 300)], [np.array([5, 9, 400]), lengths_like(20_000, 20, 0.5, 200)]],
    ids=["realistic", "one task", "a task of three examples beside a large one"],
)
def test_every_example_is_seen_once_an_epoch(method, lengths):
    planner = mixer(lengths, method, PROBED * WINDOW)
    times = [np.zeros(len(task), np.int64) for task in lengths]
    for window in range(PROBED):
        plan = planner.plan(window)
        assert plan.left_out == 0
        for task, example in (pair for batch in plan.batches for pair in batch):
            times[task][example] += 1
        for count in times:
            assert count.max() - count.min() <= 1
    assert max(count.max() for count in times) >= 2  # there were whole epochs


@pytest.mark.parametrize("examples", [1, 3])
def test_a_tiny_task_has_its_share(examples):
    lengths = [lengths_like(20_000, 30, 0.5, 200), np.full(examples, 25)]
    counts = seen(mixer(lengths, "fixed", 2 * WINDOW), range(2 * WINDOW))  # wanted: 1 to 2
    assert counts[1] / counts.sum() == pytest.approx(2 / 3, rel=0.01)


def test_no_batch_is_over_budget_or_empty():
    for method in METHODS:
        planner = mixer(REALISTIC, method)
        assert all(0 < tokens_in(planner, step) <= BUDGET for step in range(10 * WINDOW))


# Shares


def test_shares_of_a_small_and_a_large_task():
    sizes, fixed = [100, 10_000], [3.0, 1.0]
    expected = {  # method: share of the small task at the start and at the end of the run
        "proportional": (1 / 101, 1 / 101),
        "temperature": (1 / 11, 1 / 11),
        "annealed": (1 / 101, 1 / (1 + 100**0.2)),
        "fixed": (3 / 4, 3 / 4),
    }
    for method, small in expected.items():
        for progress in (0.0, 1.0):
            found = shares(Mixing(method), sizes, fixed, progress)
            np.testing.assert_allclose(found, [small[int(progress)], 1 - small[int(progress)]], rtol=1e-12)


@pytest.mark.parametrize(("temperature", "small"), [(1.0, 1 / 101), (4.0, 1 / (1 + 100**0.25))])
def test_temperature_1_is_proportional_and_larger_is_more_even(temperature, small):
    found = shares(Mixing("temperature", temperature), [100, 10_000], [], 0.0)
    np.testing.assert_allclose(found, [small, 1 - small], rtol=1e-12)


@every_method
def test_seen_examples_have_the_wanted_shares(method):
    windows = 20
    sizes = np.array([len(task) for task in REALISTIC], np.float64)
    means = np.array([task.mean() for task in REALISTIC])
    power = {"proportional": 1.0, "temperature": 0.5}
    wanted = np.zeros(len(sizes))
    for progress in np.linspace(0, 1, windows):
        weights = np.arange(1.0, 9.0) if method == "fixed" else sizes ** power.get(method, 1 - 0.8 * progress)
        wanted += weights / (weights * means).sum()  # every window has as many tokens
    found = seen(mixer(REALISTIC, method, windows * WINDOW), range(windows * WINDOW))
    # 3 %: a task is given tokens, and the mean length of those seen differs from that of all its examples
    np.testing.assert_allclose(found / found.sum(), wanted / wanted.sum(), rtol=0.03)


def test_annealed_goes_from_proportional_towards_even():
    windows = 40
    lengths = [np.full(500, 32), np.full(50_000, 32)]
    planner = mixer(lengths, "annealed", windows * WINDOW)
    counts = [seen(planner, range(w * WINDOW, (w + 1) * WINDOW)) for w in range(windows)]
    small = [count[0] / count.sum() for count in counts]
    per_window = WINDOW * BUDGET / 32
    assert small[0] == pytest.approx(1 / 101, abs=2 / per_window)
    assert small[-1] == pytest.approx(1 / (1 + 100**0.2), abs=2 / per_window)
    assert all(later - earlier > -2 / per_window for earlier, later in zip(small, small[1:], strict=False))


# Shares that may change


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_plan_the_given_shares_or_those_of_the_temperature(method):
    np.testing.assert_allclose(shares(Mixing(method, 2.0), [100, 10_000], [], 0.3), [1 / 11, 10 / 11], rtol=1e-12)
    given = Mixing(method, 2.0, {"a": 3.0, "b": 1.0})
    np.testing.assert_allclose(shares(given, [100, 10_000], [3.0, 1.0], 0.3), [0.75, 0.25], rtol=1e-12)


@pytest.mark.parametrize(
    ("batches", "every", "firsts"),
    [
        (64, None, [0, 32, 64]),
        (65, None, [0, 32, 64, 96]),
        (100, 40, [0, 32, 40, 72, 80, 100]),
        (5, 2, [0, 2, 4, 5]),
        (32, 100, [0, 32]),
    ],
)
def test_windows_end_where_shares_may_change(batches, every, firsts):
    assert windows_of(batches, every).tolist() == firsts


@pytest.mark.parametrize("every", [1, 5, 40])
def test_changes_lose_and_repeat_no_example(every):
    """However often the shares change; a task that was out of the mix goes on where it was."""
    lengths = [lengths_like(70, 40, 0.5, 300), np.full(300, 25), lengths_like(2000, 20, 0.5, 200)]
    steps = 200
    planner = Mixer(lengths, Mixing(), [], 600, steps, 0, every)
    random, times = np.random.default_rng(0), [np.zeros(len(task), np.int64) for task in lengths]
    for step in range(0, steps, every):
        factors = random.random(3) * (random.random(3) < 0.7)
        if factors.any():
            wanted = planner.change(step, factors)
            np.testing.assert_array_equal(wanted > 0, factors > 0)
        for number in range(step, step + every):
            for task, example in planner.batch(number):
                times[task][example] += 1
    lost = planner_left_out = sum(planner.plan(window).left_out for window in range(len(planner.firsts) - 1))
    assert planner_left_out <= (0 if every > 1 else 3)
    for count in times:
        assert count.max() - count.min() <= 1 + lost


def test_a_window_between_two_long_examples_is_not_empty():
    planner = Mixer([np.full(9, 1500)] * 3, Mixing("proportional"), [], BUDGET, 40, 0, every=1)
    batches = [planner.batch(step) for step in range(40)]
    assert all(len(batch) == 1 for batch in batches)
    assert {task for batch in batches for task, _ in batch} == {0, 1, 2}


# Room


@every_method
def test_little_of_a_realistic_mix_is_padding(method):
    assert waste(mixer(REALISTIC, method), 10 * WINDOW) < 0.015


def test_three_hundred_tasks_fill_batches_and_are_planned_fast(effort):
    sizes = np.random.default_rng(0).integers(50, 3000, 300)
    planner = mixer([lengths_like(size, 30, 0.6, 250, seed) for seed, size in enumerate(sizes)])
    assert waste(planner, 10 * WINDOW) < 0.03
    assert (seen(planner, range(10 * WINDOW)) > 0).all()
    assert effort(lambda: [planner.plan(window) for window in range(10)]) < 30


def test_equal_tasks_do_not_all_begin_with_an_example_too_many():
    planner = mixer([np.full(100, 100)] * 1000)  # 0.65 examples of each a window
    counts = [sum(map(len, planner.plan(window).batches)) for window in range(10)]
    assert max(counts) - min(counts) <= 10


def test_a_million_examples_are_planned_in_seconds(effort):
    lengths = np.random.default_rng(0).integers(5, 100, 1_000_000)
    assert effort(lambda: mixer([lengths], steps=100_000).batch(0)) < 60


def test_of_a_large_task_one_chunk_is_held(monkeypatch):
    """And still every example is seen once an epoch, in an order of its own, from any step on."""
    monkeypatch.setattr(mixing, "CHUNK", 100)
    stream = mixing._Stream(lengths_like(450, 30, 0.5, 200), [7, 3], mark=0.4)
    edges = np.linspace(0, 3 * stream.tokens, 1000).astype(int).tolist()
    stretches, held = [], 0
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        stretches.append(stream.between(first, last))
        held = max(held, len(stream.shuffled[1]))
    assert held <= 100
    taken = np.concatenate(stretches).astype(int)
    epochs = taken.reshape(3, 450)
    assert all(sorted(epoch) == list(range(450)) for epoch in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    assert np.ptp(taken[:90]) > 400  # a chunk has examples from everywhere
    fresh = mixing._Stream(stream.lengths, [7, 3], mark=0.4)
    assert fresh.between(*edges[700:702]) == stretches[700]


@pytest.mark.parametrize(
    ("shortest", "longest", "least_fill"),
    [(900, 1100, 0.5), (1000, 1024, 0.9), (600, 700, 0.85), (500, 2048, 0.6)],
)
def test_long_examples_find_room_because_the_fill_falls(shortest, longest, least_fill):
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, 2000)
    planner = mixer([lengths, lengths_like(2000, 40, 0.3, 100)], "fixed", 40 * WINDOW)
    plans = [planner.plan(window) for window in range(PROBED)]
    assert [plan.left_out for plan in plans] == [0] * PROBED
    assert planner.fill >= least_fill


@pytest.mark.parametrize("shortest", [1025, 1300, 2048])
def test_no_batch_is_empty_where_examples_are_longer_than_half_a_batch(shortest):
    lengths = np.random.default_rng(0).integers(shortest, BUDGET + 1, 500)
    planner = mixer([lengths], steps=40 * WINDOW)
    for window in range(40):
        batches, left_out = planner.plan(window)
        assert len(batches) == WINDOW
        assert all(batches)
        assert left_out == 0 or window >= PROBED
        assert np.unique([example for batch in batches for _, example in batch], return_counts=True)[1].max() <= 2


def test_few_examples_are_left_out_in_windows_that_were_not_probed():
    planner = mixer(REALISTIC, steps=100 * WINDOW)
    plans = [planner.plan(window) for window in range(100)]
    left_out = sum(plan.left_out for plan in plans)
    assert left_out < 0.001 * sum(len(batch) for plan in plans for batch in plan.batches)


def test_examples_without_room_are_counted():
    crowded = mixer([np.full(50, 1025)], steps=WINDOW)  # one fits a batch
    crowded.starts[1] = 45 * 1025
    batches, left_out = crowded.plan(0)
    assert ([len(batch) for batch in batches], left_out) == ([1] * WINDOW, 45 - WINDOW)


@pytest.mark.parametrize("capacity", [100, 150, 1000])
def test_spread_is_even_and_leaves_out_only_what_fits_nowhere(capacity):
    lengths = np.random.default_rng(0).integers(1, 101, 80).tolist()
    filled, left_over = spread(lengths, 8, capacity)
    assert sorted(index for part in [*filled, left_over] for index in part) == list(range(80))
    used = [sum(lengths[index] for index in part) for part in filled]
    assert max(used) <= capacity
    assert all(min(used) + lengths[index] > capacity for index in left_over)
    assert bool(left_over) == (capacity < 1000)
    if not left_over:
        assert max(used) - min(used) <= 0.01 * max(used)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"mixing: method must be one of .*, got 'loss-ratio'; did you mean 'loss_ratio'"
    ):
        Mixing("loss-ratio")


def test_the_second_epoch_of_three_million_examples_begins_within_a_second(effort):
    """Every rank plans by itself, so that is what none waits longer than."""
    lengths = [np.random.default_rng(0).integers(8, 120, 3_000_000), np.full(50_000, 30)]
    steps, budget = 20_000, 16_384
    mixer = Mixer(lengths, Mixing(method="proportional"), [0, 0], budget, steps, 0)
    window = int(np.searchsorted(mixer.starts[:, 0], mixer.streams[0].tokens)) - 1  # that begins anew
    first, last = mixer.firsts[window], mixer.firsts[window + 1]
    assert mixer.starts[window, 0] < mixer.streams[0].tokens <= mixer.starts[window + 1, 0]
    assert max(effort(partial(mixer.batch, step)) for step in range(first - WINDOW, last + WINDOW)) < 30
