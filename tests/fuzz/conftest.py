"""Fuzzing with Hypothesis: the same few inputs in every run of the tests, and new ones for as long as one asks.

    make fuzz MINUTES=30      # sets TRUNKLINE_FUZZ_MINUTES; the tests share the time evenly

A fuzz test is a test with `@given` in this folder. It says what may come out: a right result, or an error of its own
kind with a text. A long run prints how many inputs each test has seen, and the inputs that failed as code to copy.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps

import pytest

MINUTES = float(os.environ.get("TRUNKLINE_FUZZ_MINUTES") or 0)
inputs_seen: Counter[str] = Counter()

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:  # a machine with what the kernels need, and no more: each file says that it is skipped
    pass
else:
    common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile(
        "bounded", derandomize=True, max_examples=40, phases=[Phase.explicit, Phase.generate], **common
    )
    settings.register_profile("long", max_examples=500, print_blob=True, **common)
    settings.load_profile("long" if MINUTES else "bounded")


def _counted(name: str, test: Callable) -> Callable:
    @wraps(test)
    def counting(*arguments, **keywords):
        inputs_seen[name] += 1
        return test(*arguments, **keywords)

    return counting


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Repeats a fuzz test, each time with other inputs, until its share of the time is over."""
    test = pyfuncitem.obj
    if not MINUTES or not hasattr(test, "hypothesis"):
        return None
    inner = test.hypothesis.inner_test  # which tests that differ in a parameter share
    test.hypothesis.inner_test = _counted(pyfuncitem.name, inner)
    tests = [item for item in pyfuncitem.session.items if hasattr(getattr(item, "obj", None), "hypothesis")]
    end = time.monotonic() + 60 * MINUTES / len(tests)
    try:
        while time.monotonic() < end:
            test(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    finally:
        test.hypothesis.inner_test = inner
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in inputs_seen.items():
        terminalreporter.write_line(f"{name}: {count:,} inputs")
    if inputs_seen:
        terminalreporter.write_line(f"{inputs_seen.total():,} inputs")
