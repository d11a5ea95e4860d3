"""How much every task counts in a step: one short function for each method, from what the step tells to weights.

A method gets the tasks' losses and, where it asks for them, the inner products of their gradients (the Gram matrix G,
exact, of the layers that the config names); with weights lambda the step follows sum over t of lambda_t g_t. All
methods are on the scale of the plain sum of the losses, where every weight is 1: what a paper defines for the mean of
n tasks, or up to a factor, has weights that add up to n. A task that is absent from a step is left out of it.

N tasks of the run, n of them in the step
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RATE = 0.025  # of the methods whose weights are learnt by gradient descent, as in GradNorm and FAMO
FAMO_DECAY = 1e-3
GRADNORM_ALPHA = 1.5  # strength of the pull towards one rate of training
AVERAGE_WINDOW = 50  # steps that stand for the epoch of dynamic weight averaging: tasks in a mix have none in common
AVERAGE_TEMPERATURE = 2.0
CAGRAD_RADIUS = 0.5  # how far from the mean gradient, in its length
SMALL = 1e-12


class Seen(NamedTuple):
    """What a step tells of the n tasks in it."""

    tasks: np.ndarray  # (n,) int, places among the N tasks
    losses: np.ndarray  # (n,) mean losses, times the fixed weights of the tasks
    counts: np.ndarray  # (n,) sums of row weights
    gram: np.ndarray  # (n, n) inner products of gradients; (0, 0) for methods that do without
    step: int  # from 0
    random: np.random.Generator  # of this step


class State(dict[str, np.ndarray]):
    """What a method remembers from step to step: arrays over all N tasks, by name."""

    def __init__(self, num_tasks: int):
        self.num_tasks = num_tasks

    def of(self, name: str, initially: float) -> np.ndarray:
        """(N,), to be changed in place."""
        return self.setdefault(name, np.full(self.num_tasks, initially))


# From the losses


def fixed(seen: Seen, state: State) -> np.ndarray:
    return np.ones(len(seen.tasks))


def uncertainty(seen: Seen, state: State) -> np.ndarray:
    """A learnt variance exp(s_t) for each task: L_t exp(-s_t) / 2 + s_t / 2 is minimised over s, too.

    Kendall et al., arXiv:1705.07115, section 3.2. s starts where the weights are 1.
    """
    log_variance = state.of("log_variance", -np.log(2))
    weights = np.exp(-log_variance[seen.tasks]) / 2
    log_variance[seen.tasks] -= RATE * (0.5 - weights * seen.losses)
    return weights


def dynamic_average(seen: Seen, state: State) -> np.ndarray:
    """Tasks whose loss fell less from window to window of steps count more: N softmax(L(k - 1) / L(k - 2) / 2).

    Liu et al., arXiv:1803.10704, section 3.3.
    """
    weights, before = state.of("weights", 1.0), state.of("before", 0.0)
    loss, count = state.of("loss", 0.0), state.of("count", 0.0)
    now = weights[seen.tasks]
    loss[seen.tasks] += seen.losses * seen.counts
    count[seen.tasks] += seen.counts
    if (seen.step + 1) % AVERAGE_WINDOW == 0:
        mean = np.where(count > 0, loss / np.maximum(count, SMALL), before)
        ratio = np.where((count > 0) & (before > 0), mean / np.maximum(before, SMALL), 1.0)
        weights[:] = len(weights) * _softmax(ratio / AVERAGE_TEMPERATURE)
        before[:], loss[:], count[:] = mean, 0.0, 0.0
    return now


def famo(seen: Seen, state: State) -> np.ndarray:
    """Weights z_t / L_t, z = softmax(xi), where xi goes after the tasks whose log loss falls least.

    Liu et al., arXiv:2306.03792, algorithm 1; the fall is that since the step before that had the task, which saves the
    second look at the same batch.
    """
    xi, before = state.of("xi", 0.0), state.of("before", 0.0)
    losses, last = np.maximum(seen.losses, SMALL), before[seen.tasks]
    fall = np.where(last > 0, np.log(np.maximum(last, SMALL)) - np.log(losses), 0.0)
    z = _softmax(xi[seen.tasks])
    xi[seen.tasks] -= RATE * (z * (fall - z @ fall) + FAMO_DECAY * xi[seen.tasks])
    before[seen.tasks] = losses
    return _adding_up_to_n(_softmax(xi[seen.tasks]) / losses)


# From the gradients


def gradnorm(seen: Seen, state: State) -> np.ndarray:
    """Weights n softmax(s), where s makes the weighted gradients as long as one another, longer for tasks that lag.

    Minimises sum over t of |lambda_t |g_t| - mean_norm * r_t^alpha|, in units of the mean norm, r_t the rate
    (L_t / L_t(0)) over its mean. Chen et al., arXiv:1711.02257, algorithm 1.
    """
    s, first = state.of("s", 0.0), state.of("first", 0.0)
    first[seen.tasks] = np.where(first[seen.tasks] > 0, first[seen.tasks], seen.losses)
    n, share = len(seen.tasks), _softmax(s[seen.tasks])
    weights, norms = n * share, np.sqrt(seen.gram.diagonal())
    rate = seen.losses / np.maximum(first[seen.tasks], SMALL)
    mean = (weights * norms).mean()
    target = mean * (rate / rate.mean()) ** GRADNORM_ALPHA
    slope = np.sign(weights * norms - target) * norms / mean  # by the weights
    s[seen.tasks] -= RATE * weights * (slope - share @ slope)
    return weights


def pcgrad(seen: Seen, state: State) -> np.ndarray:
    """Every gradient loses what points against another one, the others taken in random order; their sum.

    Yu et al., arXiv:2001.06782, algorithm 1.
    """
    n = len(seen.gram)
    parts = np.eye(n)  # parts[i]: what the gradient of task i has become, in terms of all gradients
    for i in range(n):
        for j in seen.random.permutation(n):
            along = parts[i] @ seen.gram[j]
            if j != i and along < 0:
                parts[i, j] -= along / seen.gram[j, j]
    return parts.sum(0)


def mgda(seen: Seen, state: State) -> np.ndarray:
    """The shortest convex combination of the gradients.

    Sener & Koltun, arXiv:1810.04650, section 3.2.
    """
    return len(seen.gram) * _shortest(seen.gram)


def cagrad(seen: Seen, state: State) -> np.ndarray:
    """The direction near the mean gradient g_0 that does best for the task it does worst for.

    Liu et al., arXiv:2110.14048, section 3: g_0 + r g_w / |g_w|, r = c |g_0|, with w in the simplex that minimises
    g_w . g_0 + r |g_w|; divided by 1 + c, so that gradients that agree keep their length. |g_w| lies below its tangent
    in |g_w|^2: to minimise that instead, again and again, is to look for the shortest combination of the vectors
    g_t + (|g_w| / r) g_0.
    """
    n, G = len(seen.gram), seen.gram
    along = G.mean(1)  # g_t . g_0
    radius = CAGRAD_RADIUS * np.sqrt(max(G.mean(), 0.0))
    w = np.full(n, 1 / n)
    if radius < SMALL * np.sqrt(G.trace()):
        return np.ones(n)
    for _ in range(100):
        length = np.sqrt(max(w @ G @ w, SMALL**2 * G.trace()))
        shift, last = length / radius, w
        w = _shortest(G + shift * (along[:, None] + along) + shift**2 * G.mean())
        if np.abs(w - last).max() < 1e-9:
            break
    length = np.sqrt(max(w @ G @ w, SMALL**2 * G.trace()))
    return (1 + n * radius / length * w) / (1 + CAGRAD_RADIUS)


def imtl_g(seen: Seen, state: State) -> np.ndarray:
    """The combination that reaches equally far along every gradient; its weights may be negative.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, section 3.1.
    """
    n = len(seen.gram)
    along = seen.gram / np.sqrt(seen.gram.diagonal())[:, None]  # [t, q] = g_q . g_t / |g_t|
    equal = np.concatenate([along[:1] - along[1:], along[:1].max() * np.ones((1, n))])
    return n * np.linalg.lstsq(equal, along[:1].max() * np.eye(n)[-1], rcond=None)[0]


def aligned_mtl(seen: Seen, state: State) -> np.ndarray:
    """The gradients with their principal components scaled to the length of the shortest one; their sum.

    Senushkin et al., arXiv:2305.19000, section 4.
    """
    values, vectors = np.linalg.eigh(seen.gram)
    sound = values > values[-1] * len(values) * np.finfo(np.float32).eps  # beyond what G is exact to
    values, vectors = values[sound], vectors[:, sound]
    return vectors @ (np.sqrt(values[0] / values) * vectors.sum(0))


def nash_mtl(seen: Seen, state: State) -> np.ndarray:
    """The bargaining solution: weights with G lambda = 1 / lambda, all above 0.

    Navon et al., arXiv:2202.01017, section 3. They are where lambda G lambda / 2 - sum of log lambda is least, which
    is found by damped Newton steps; a little is added to the diagonal, without which there is no such place where the
    gradients can cancel one another.
    """
    n, norms = len(seen.gram), np.sqrt(seen.gram.diagonal())
    cosines = seen.gram / np.outer(norms, norms) + 1e-6 * np.eye(n)
    x = np.ones(n)  # lambda * norms
    for _ in range(200):
        slope = cosines @ x - 1 / x
        step = np.linalg.solve(cosines + np.diag(x**-2), slope)
        decrement = np.sqrt(slope @ step)
        x = x - step / (1 + decrement)  # stays above 0 and converges from anywhere: the function is self-concordant
        if decrement < 1e-9:
            break
    return _adding_up_to_n(x / norms)


FROM_LOSSES: dict[str, Callable[[Seen, State], np.ndarray]] = {
    "fixed": fixed,
    "uncertainty": uncertainty,
    "dynamic-average": dynamic_average,
    "famo": famo,
}
FROM_GRADIENTS: dict[str, Callable[[Seen, State], np.ndarray]] = {
    "gradnorm": gradnorm,
    "pcgrad": pcgrad,
    "mgda": mgda,
    "cagrad": cagrad,
    "imtl-g": imtl_g,
    "aligned-mtl": aligned_mtl,
    "nash-mtl": nash_mtl,
}


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def _adding_up_to_n(weights: np.ndarray) -> np.ndarray:
    return len(weights) * weights / weights.sum()


def _shortest(gram: np.ndarray) -> np.ndarray:
    """The weights, at least 0 with a sum of 1, of the shortest combination of vectors with these inner products.

    With A^T A = gram, it is that of the x >= 0 for which |A x|^2 + (1 - sum of x)^2 is least: only the length of x
    depends on how the two parts are weighed.
    """
    from scipy.optimize import nnls  # half a second, which a run that does without need not wait for

    n = len(gram)
    values, vectors = np.linalg.eigh(gram / gram.trace())
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T  # (n, n), root^T root = gram / trace
    x, _ = nnls(np.vstack([root, np.ones(n)]), np.eye(n + 1)[-1], maxiter=100 * n)
    return x / x.sum()
