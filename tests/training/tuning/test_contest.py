"""The contest of candidates, by a pretended clock: the fastest right one wins, whatever the wrong ones take."""

import pytest

from trunkline.kernels.decisions import decision, questions, trying, use
from trunkline.training.tuning.contest import MARGIN, Row, Work, contest

SECONDS = {8: 1.0, 4: 0.5, 2: 0.25, 1: 0.125}  # by warps


@decision(lambda width: [{"warps": 4}, {"warps": 2}, {"warps": 1}] if width <= 64 else [])
def tile(width: int) -> dict[str, int]:
    return {"warps": 8}


@decision(lambda: ["theirs"])
def whose() -> str:
    return "ours"


@pytest.fixture(autouse=True)
def nothing_used():
    yield
    use({})


def problem_of(problems: dict[int, Exception | str], width: int = 64):
    def problem() -> str:
        found = problems.get(tile(width)["warps"], "")
        if isinstance(found, Exception):
            raise found
        return found

    return problem


def run(problems: dict[int, Exception | str], seconds: dict[int, float] = SECONDS, **options) -> dict[int, Row]:
    work = Work("op", lambda: tile(64)["warps"], problem_of(problems))
    rows = contest(work, lambda call: seconds[call()], rounds=3, **options)
    return {row.answer["warps"]: row for row in rows}


def chosen(rows: dict[int, Row]) -> list[int]:
    return [warps for warps, row in rows.items() if row.chosen]


def test_fastest_is_chosen_and_every_candidate_is_told():
    rows = run({})
    assert list(rows) == [8, 4, 2, 1]
    assert {warps: row.seconds for warps, row in rows.items()} == SECONDS
    assert chosen(rows) == [1]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("errs by 3 times what is allowed, in the output", "errs by 3 times what is allowed, in the output"),
        (
            MemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            "MemoryError: CUDA out of memory. Tried",
        ),
        (RuntimeError("out of resource: shared memory"), "RuntimeError: out of resource: shared memory"),
    ],
    ids=["wrong", "out of memory", "does not compile"],
)
def test_wrong_one_is_a_row_that_says_so_and_never_chosen(fault, told):
    rows = run({1: fault})
    assert rows[1].problem.startswith(told)
    assert rows[1].seconds is None
    assert chosen(rows) == [2]


def test_one_that_fails_only_when_it_is_timed_is_not_chosen():
    rows = run({}, {8: 1.0, 4: 0.5, 2: 0.25})  # the clock knows no time for 1
    assert rows[1].problem == "KeyError: 1"
    assert chosen(rows) == [2]


def test_default_stays_unless_another_is_clearly_faster():
    assert chosen(run({}, dict.fromkeys((4, 2, 1), MARGIN + 0.01) | {8: 1.0})) == [8]
    assert chosen(run({}, dict.fromkeys((4, 2, 1), MARGIN - 0.01) | {8: 1.0})) == [4]


def test_wrong_default_loses_to_a_slower_right_one():
    assert chosen(run({8: "wrong"}, {8: 1.0, 4: 9.0, 2: 8.0, 1: 9.0})) == [2]


def test_nothing_is_chosen_where_all_are_wrong():
    rows = run(dict.fromkeys(SECONDS, "wrong"))
    assert len(rows) == 4
    assert chosen(rows) == []


def test_median_of_the_turns_counts():
    turns = {8: iter([1.0] * 4), 4: iter([0.9, 0.1, 0.5, 0.5]), 2: iter([0.9, 0.6, 0.6, 0.1]), 1: iter([0.9] * 4)}
    work = Work("op", lambda: tile(64)["warps"], lambda: "" if tile(64) else "")
    rows = contest(work, lambda call: next(turns[call()]), rounds=3)
    assert [row.seconds for row in rows] == [1.0, 0.5, 0.6, 0.9]  # what is first done warms up
    assert chosen({row.answer["warps"]: row for row in rows}) == [4]


def test_what_was_chosen_holds_while_the_next_is_tried():
    seen = set()

    def call() -> tuple[int, str]:
        seen.add((tile(64)["warps"], whose()))
        return tile(64)["warps"], whose()

    work = Work("op", call, lambda: "" if tile(64) and whose() else "")
    times = {
        (warps, who): seconds * (2 if who == "theirs" else 1)
        for warps, seconds in SECONDS.items()
        for who in ("ours", "theirs")
    }
    rows = contest(work, lambda call: times[call()], rounds=1)
    assert [row.answer for row in rows if row.chosen] == [{"warps": 1}, "ours"]
    assert seen == {(8, "ours"), (4, "ours"), (2, "ours"), (1, "ours"), (1, "theirs")}
    assert tile(64) == {"warps": 8}  # afterwards nothing is in use yet


def test_what_cannot_serve_is_told_and_left_out():
    work = Work("op", whose, lambda: "" if whose() else "")
    rows = contest(work, lambda call: {"ours": 1.0, "theirs": 0.1}[call()], rounds=1, leave_out=["theirs"])
    assert [(row.answer, row.chosen, row.problem) for row in rows] == [
        ("ours", True, ""),
        ("theirs", False, "cannot be compiled with the model"),
    ]


def test_decision_without_other_candidates_is_no_contest():
    assert contest(Work("op", lambda: tile(65), problem_of({}, width=65)), lambda call: call() and 1.0, rounds=1) == []


def test_choices_in_use_are_taken_for_their_facts_alone():
    use({"test_contest.tile": {"64": {"warps": 2}}})
    assert (tile(64), tile(32)) == ({"warps": 2}, {"warps": 8})
    with questions() as asked:
        tile(64)
        tile(32)
        tile(64)
    assert [question.place for question in asked] == [("test_contest.tile", "64"), ("test_contest.tile", "32")]
    with trying(asked[0], {"warps": 1}):
        assert (tile(64), tile(32)) == ({"warps": 1}, {"warps": 8})
    assert tile(64) == {"warps": 2}
