from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.answers import AnswerClasses, MathWorker, classes_of, normalize_answer, same_answer
from rksc_sgl.answers.mathematics import MAX_FAILURES, MAX_STRIKES

BOMB = "9**9**9**9"


@pytest.fixture(scope="module")
def worker() -> Iterator[MathWorker]:
    worker = MathWorker(deadline_s=10.0)
    yield worker
    worker.close()


def _normal(text: str) -> str:
    answer = normalize_answer(text)
    assert answer is not None
    return answer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0.5", "1/2"),
        ("1,000", "1000.0"),
        ("\\frac{1}{2}", "0.5"),
        ("4/2", "2"),
        ("12/6", "2"),
        ("18 dollars", "$18"),
        ("5 cm", "5"),
        ("5.0 cm", "5 cm"),
        ("1/2 hour", "0.5 hours"),
        ("50%", "50"),
        ("50 percent", "50%"),
        ("5 cm", "5 kg"),
        ("3 1/2", "7/2"),
        ("3 1/2 hours", "3.5"),
        ("-1 3/4", "-1.75"),
        ("5 million", "5,000,000"),
        ("1e50", "10e49"),
        ("room 12", "room 12"),
        ("x = 5", "y = 5"),
        ("2, 2, 3", "3, 2, 2"),
        ("(1, 2)", "(1.0, 2)"),
        ("\\sqrt{16} cm", "4"),
        ("2 π", "2\\pi"),
        ("\\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2"),
        ("x^2 + 3", "3 + x^2"),
        ("\\sqrt{16}", "4"),
        ("2 × 3", "6"),
        ("2**3", "8"),
        ("x = 5", "5"),
        ("{1, 2}", "{2, 1}"),
        ("3, 5", "5, 3"),
    ],
)
def test_one_value_in_two_spellings_is_one_answer(first: str, second: str, worker: MathWorker) -> None:
    assert same_answer(_normal(first), _normal(second), worker)
    assert same_answer(_normal(second), _normal(first), worker)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0.5", "1/3"),
        ("5", "-5"),
        ("5 cm", "50 mm"),
        ("50%", "1/2"),
        ("50%", "0.5"),
        ("1/3", "0.333333"),
        ("\\sqrt{2}", "1.414214"),
        ("5 pm", "5 am"),
        ("5 or more", "5"),
        ("5th", "5"),
        ("5 x", "5"),
        ("5 squared", "5"),
        ("1/0", "0"),
        ("2, 2, 3", "2, 3"),
        ("(1, 2)", "1, 2"),
        ("[1, 2]", "(1, 2)"),
        ("12:30", "12"),
        ("room 12", "12"),
        ("2**3", "2"),
        ("3 1/2", "2"),
        ("3 1/2", "31/2"),
        ("1e50", "50e1"),
        ("(1, 2)", "(2, 1)"),
        ("friday", "monday"),
        ("yes", "no"),
        ("a", "b"),
        ("pi", "3"),
    ],
)
def test_different_values_are_different_answers(first: str, second: str, worker: MathWorker) -> None:
    assert not same_answer(_normal(first), _normal(second), worker)
    assert not same_answer(_normal(second), _normal(first), worker)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("b", "c"),
        ("yes", "no"),
        ("12", "15"),
        ("1/2", "1/2"),
        ("friday", "7"),
        ("1" * 300, "x+1"),
        ("1/2", "0.75"),
        ("1 1/2", "5 cm"),
        ("1, 2", "x + 1"),
    ],
)
def test_no_worker_is_started_for_what_needs_none(first: str, second: str) -> None:
    idle = MathWorker()
    assert same_answer(first, second, idle) == (first == second)
    assert idle.pid is None


@pytest.mark.parametrize("bomb", [BOMB, "9^{9^{9^9}}", "2^{10000000000}", "1000000000!"])
def test_an_answer_that_never_ends_is_compared_as_a_string_and_the_next_one_by_a_new_worker(bomb: str) -> None:
    worker = MathWorker(deadline_s=1.0)
    try:
        began = time.monotonic()
        assert not same_answer(bomb, "7/2", worker)
        assert time.monotonic() - began < 60.0  # it ended at all
        assert same_answer("x + 1", "1 + x", worker)
        assert psutil.Process(worker.pid).memory_info().rss < 1 << 30
    finally:
        worker.close()


def test_an_answer_that_brings_the_worker_down_again_and_again_is_no_longer_compared() -> None:
    worker = MathWorker(deadline_s=0.3, command=[sys.executable, "-c", _BROKEN])
    for other in range(MAX_STRIKES):
        assert worker.same("bomb", str(other)) is None
    assert worker.pid is None
    assert worker.same("bomb", "another") is None
    assert worker.pid is None  # not even started


def test_after_many_failures_in_a_short_time_nothing_is_compared() -> None:
    worker = MathWorker(deadline_s=0.3, command=[sys.executable, "-c", _ENDING])
    for index in range(MAX_FAILURES + 1):
        assert worker.same(f"a{index}", f"b{index}") is None
    assert worker._failures.maxlen == len(worker._failures)
    assert worker._strikes[f"a{MAX_FAILURES}"] == 0  # the last pair was not tried


_BROKEN = "import time; print('ready', flush=True); time.sleep(60)"
_ENDING = "print('ready', flush=True)"


def test_a_worker_that_is_killed_from_outside_is_started_again(worker: MathWorker) -> None:
    assert worker.same("0.5", "8/16")
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert worker.same("0.5", "2/4")
    assert worker.pid not in (None, pid)


@pytest.mark.parametrize("busy", [False, True])
def test_the_worker_ends_with_its_parent_even_in_the_middle_of_a_comparison(busy: bool) -> None:
    program = textwrap.dedent(
        f"""
        import os, signal, threading, time
        from rksc_sgl.answers import MathWorker
        worker = MathWorker(deadline_s=2.0)
        worker.same("0.5", "1/2")
        print(worker.pid, flush=True)
        if {busy}:
            threading.Thread(target=worker.same, args=("9^{{9^{{9^9}}}}", "7/2"), daemon=True).start()
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    pid = int(found.stdout)
    until = time.monotonic() + 30.0
    while time.monotonic() < until and psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_many_threads_may_ask_at_once(worker: MathWorker) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: worker.same(f"{n}/2", f"{2 * n}/4"), range(1, 33)))
    assert found == [True] * 32


def test_a_process_that_is_forked_off_starts_a_worker_of_its_own(worker: MathWorker) -> None:
    assert worker.same("0.5", "32/64")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = worker.same("1.5", "3/2")
            os.write(writing, f"{found} {worker.pid}".encode())
            worker.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found, pid = os.read(reading, 100).decode().split()
    assert found == "True"
    assert int(pid) != worker.pid
    assert worker.same("2.5", "5/2")


_NUMBERS = st.one_of(
    st.integers(-40, 40).map(str),
    st.integers(-4000, 4000).map("{:,}".format),
    st.decimals(-20, 20, places=2).map(str),
    st.builds("{}/{}".format, st.integers(-12, 12), st.integers(0, 6)),
    st.builds("{} {}/{}".format, st.integers(-4, 4), st.integers(0, 5), st.integers(1, 6)),
    st.builds("{}e{}".format, st.integers(1, 30), st.integers(-3, 3)),
)
_WRITTEN = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "$", "x = "]),
    _NUMBERS,
    st.sampled_from(
        ["", "", "%", " percent", " cm", "cm", " m", " apples", " dollars per day", " million", " pm", "th"]
    ),
).map(_normal)
_ANSWERS = _WRITTEN | st.lists(_NUMBERS, min_size=2, max_size=3).map(", ".join).map(_normal) | st.sampled_from("ab")


class _Unasked(MathWorker):
    def same_as(self, answer: str, others: Sequence[str]) -> list[bool | None]:
        raise AssertionError(f"{answer} was compared with {others} by the worker")


@settings(deadline=None)  # a busy machine fails no test
@given(_ANSWERS, _ANSWERS, _ANSWERS)
def test_equality_of_numbers_is_an_equivalence_relation(first: str, second: str, third: str) -> None:
    idle = _Unasked()
    assert same_answer(first, first, idle)
    assert same_answer(first, second, idle) == same_answer(second, first, idle)
    if same_answer(first, second, idle) and same_answer(second, third, idle):
        assert same_answer(first, third, idle)


def _spellings(value: Fraction) -> st.SearchStrategy[str]:
    """Ways to write it; its denominator divides 20."""
    sign, whole, rest = "-" if value < 0 else "", abs(value) // 1, abs(value) % 1
    plain = [f"{float(value):.2f}", f"{float(value):,.3f}", f"{value.numerator * 3}/{value.denominator * 3}"]
    plain.append(f"{sign}{whole} {rest.numerator}/{rest.denominator}" if whole else str(value))
    after = ["", "%", " cm", " m", " percent", " apples in all"]
    before = ["", "$", "x = "]
    return st.builds("{}{}{}".format, st.sampled_from(before), st.sampled_from(plain), st.sampled_from(after))


@settings(deadline=None)
@given(st.data(), st.integers(-200, 200), st.integers(-200, 200), st.sampled_from([1, 2, 4, 20]))
def test_numbers_are_equal_where_their_values_are_however_they_are_written(
    data: st.DataObject, first: int, second: int, denominator: int
) -> None:
    values = Fraction(first, denominator), Fraction(second, denominator)
    one, same, other = (_normal(data.draw(_spellings(value))) for value in (values[0], values[0], values[1]))
    assert same_answer(one, same, _Unasked())
    assert same_answer(one, other, _Unasked()) == (values[0] == values[1])


_VALUES = ("50%", "50", "0.5", "1/2", "5 cm", "5 m", "5", "3 1/2", "7/2", "3.5 hours", "31/2", "2, 3", "3, 2", "5 pm")


def _parts(answers: list[str], names: list[str | None]) -> set[frozenset[str]]:
    return {frozenset(answer for answer, name in zip(answers, names, strict=True) if name == one) for one in names}


@settings(deadline=None)
@given(st.permutations(_VALUES))
def test_classes_of_numbers_do_not_depend_on_the_order_in_which_they_come(answers: list[str]) -> None:
    expected = {
        frozenset(part)
        for part in (
            ("50%", "50"),
            ("0.5", "1/2"),
            ("5 cm", "5 m", "5"),
            ("3 1/2", "7/2", "3.5 hours"),
            ("31/2",),
            ("2, 3", "3, 2"),
            ("5 pm",),
        )
    }
    classes = AnswerClasses()
    assert _parts(answers, [classes.of(answer) for answer in answers]) == expected
    assert _parts(answers, classes_of(answers)) == expected


def test_classes_of_expressions_and_numbers_do_not_depend_on_the_order_in_which_they_come() -> None:
    given = ["\\sqrt{2}", "1.414214", "1.41421", "\\sqrt{16}", "4 cm", "2 × 2", "x + 1", "1 + x"]
    expected = {frozenset(part) for part in (given[:1], given[1:2], given[2:3], given[3:6], given[6:])}
    for order in itertools.islice(itertools.permutations(given), 0, 40_320, 997):
        answers = list(order)
        classes = AnswerClasses()
        assert _parts(answers, [classes.of(answer) for answer in answers]) == expected
        assert _parts(answers, classes_of(answers)) == expected


def test_classes_are_named_by_the_spelling_that_came_first() -> None:
    classes = AnswerClasses()
    given = ["0.5", None, "3", "1/2", "3 apples", "2/4", "friday"]
    assert [classes.of(answer) for answer in given] == ["0.5", None, "3", "0.5", "3", "0.5", "friday"]
    assert classes_of(given) == [classes.of(answer) for answer in given]


def _near(first: str, second: str) -> bool:
    return abs(int(first) - int(second)) <= 1


def test_a_relation_that_is_not_transitive_moves_no_vote_that_was_counted() -> None:
    near = AnswerClasses(_near)
    assert [near.of(answer) for answer in ("1", "3", "2", "1", "3")] == ["1", "3", "1", "1", "3"]
    assert near.of("4") == "3"  # compared with every member, not only with those that name a class


def test_answers_that_are_all_there_are_one_class_where_they_hang_together_in_any_order() -> None:
    for order in itertools.permutations(("1", "2", "3", "4", "7")):
        parts = _parts(list(order), classes_of(order, _near))
        assert parts == {frozenset("1234"), frozenset("7")}
        assert set(classes_of(order, _near)) == {next(one for one in order if one != "7"), "7"}


def test_an_answer_is_compared_with_all_others_in_one_request_and_never_again(worker: MathWorker) -> None:
    others = [f"x + {index}" for index in range(60)]
    before = worker.requests
    assert worker.same_as("7 + x", others) == [index == 7 for index in range(60)]
    assert worker.requests == before + 1
    assert worker.same_as("7 + x", [*others[:5], "x + 7"]) == [False] * 5 + [True]
    assert worker.same("x + 3", "7 + x") is False
    assert worker.requests == before + 1
    assert worker.same_as("7 + x", ["x + 2", "x + 99"]) == [False, False]
    assert worker.requests == before + 2


def test_what_comes_after_an_answer_that_brings_the_worker_down_is_compared_all_the_same() -> None:
    worker = MathWorker(deadline_s=2.0)
    try:
        assert worker.same_as("x + 1", ["x + 2", "2^{10000000000}", "1 + x"]) == [False, None, True]
    finally:
        worker.close()


def test_many_comparisons_that_together_take_longer_than_the_deadline_are_made_all_the_same() -> None:
    worker = MathWorker(deadline_s=1.0, command=[sys.executable, "-c", _SLOW])
    try:
        assert worker.same_as("a", [str(index) for index in range(8)]) == [True] * 8
        assert worker._strikes == {}
    finally:
        worker.close()


_SLOW = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    for _ in json.loads(line)[1:]:
        time.sleep(0.3)
        print("true", flush=True)
"""


def test_who_waits_for_the_worker_of_others_waits_only_so_long() -> None:
    worker = MathWorker(deadline_s=30.0, wait_s=0.1, command=[sys.executable, "-c", _BROKEN])
    holder = threading.Thread(target=worker.same, args=("a", "b"))
    holder.start()
    try:
        while worker.pid is None or worker._starting:
            time.sleep(0.01)
        assert worker.same("c", "d") is None
        assert holder.is_alive()
        assert worker._strikes == {}  # nobody brought anything down
    finally:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        holder.join()


def test_equal_lists_of_answers_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        MathWorker, "same_as", lambda self, answer, others: asked.append(answer) or [False] * len(others)
    )
    given = [f"y + {index}" for index in range(8)]
    first = classes_of(given)
    first[0] = "what a caller does to its list"
    assert classes_of(tuple(given)) == given
    assert len(asked) == 7


def test_classes_may_be_asked_from_many_threads() -> None:
    asked: list[tuple[str, str]] = []
    classes = AnswerClasses(lambda first, second: bool(asked.append((first, second))))
    barrier = threading.Barrier(8)

    def ask(index: int) -> str | None:
        barrier.wait()
        return classes.of(str(index % 4))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [str(index % 4) for index in range(8)]
    assert len(asked) == 6  # each pair once
