"""Forks that stop when the answer is decided: on a language backend that says what it is told to."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sglang as sgl
from aborting_server import ENDED, Aborting, aborting
from limits import within
from open_states import open_state
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.interpreter import ProgramState

import rksc_sgl
from rksc_sgl import EarlyStop
from rksc_sgl.deciding import Ruling
from rksc_sgl.errors import BranchStoppedError, OptionError, RkscError, ServerError, VerificationError

pytestmark = pytest.mark.filterwarnings("ignore::rksc_sgl.frontend.RkscDegradedWarning", "ignore:Error in stream_exec")


class Scripted(BaseBackend):
    """Gives each branch its answer.

    Args:
        answers: of each branch; an exception is raised.
        held: branches whose answer comes when they are let go.
        cut: branches that their token limit cuts.
    """

    def __init__(self, answers: Sequence[str | Exception], held: Sequence[int] = (), cut: Sequence[int] = ()) -> None:
        super().__init__()
        self.answers, self.cut = answers, set(cut)
        self.asked: list[int] = []
        self.doors = {index: threading.Event() for index in held}

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        index = s.run.index
        self.asked.append(index)
        if index in self.doors:
            assert self.doors[index].wait(60)
        answer = self.answers[index]
        if isinstance(answer, Exception):
            raise answer
        return answer, {"finish_reason": {"type": "length" if index in self.cut else "stop"}}

    def let_go(self, *branches: int) -> None:
        """Let these branches answer, or all of them."""
        for index in branches or self.doors:
            self.doors[index].set()

    def generate_stream(self, s: Any, sampling_params: Any) -> Any:
        text, meta_info = self.generate(s, sampling_params)
        for letter in text:
            yield letter, meta_info


class Unasked(Scripted):
    """Ends every request that nobody asked it to end."""

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        return "7", {"finish_reason": ENDED}


def state_on(backend: BaseBackend, stream: bool = False) -> ProgramState:
    return open_state(backend, "Q", stream)


def forked(backend: Scripted, early_stop: EarlyStop | str = "certain", **options: Any) -> rksc_sgl.BranchGroup:
    group = sgl.fork_similar(state_on(backend, **options), len(backend.answers), early_stop=early_stop)
    group += sgl.gen("answer")
    return group


def eventually_asked(backend: Scripted, count: int) -> None:
    wait_until(lambda: len(backend.asked) >= count)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def fates(group: rksc_sgl.BranchGroup) -> list[str]:
    for branch in group:
        within(20, branch.sync)
    assert group.stopping is not None
    return [branch.fate for branch in group.stopping.branches]


ALIKE = ["The answer is 7."] * 8


def test_branches_that_cannot_change_the_vote_are_never_started_and_say_why() -> None:
    backend = Scripted(ALIKE)
    group = forked(backend)
    verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
    assert sorted(backend.asked) == [0, 1, 2, 3]
    assert (verdict.index, verdict.skipped, verdict.best["answer"]) == (0, True, "The answer is 7.")
    assert verdict.reason.startswith(
        "stopped early (certain): 4 votes for the leader, 0 for the next answer; the other 4"
    )
    assert [error is None for error in verdict.errors] == [True] * 4 + [False] * 4
    assert "branch 5 was not started: 4 votes for the leader" in str(verdict.errors[5])
    assert fates(group) == ["finished"] * 4 + ["not_started"] * 4
    done = group.stopping.done
    assert (done.answer, done.reason, done.probability, done.votes) == ("7", "certain", 0.0, (("7", 4),))


def test_a_branch_that_was_not_started_is_a_state_without_the_variable() -> None:
    group = forked(Scripted(ALIKE))
    group += " And then?"
    group += sgl.gen("then")
    last = group[7]
    assert isinstance(within(20, last.error), BranchStoppedError)
    for name in ("answer", "then"):
        with pytest.raises(BranchStoppedError, match="branch 7 was not started: 4 votes"):
            within(20, lambda: last[name])  # noqa: B023
    assert within(20, lambda: last.get_meta_info("answer")) is None
    assert "answer" not in last
    last += sgl.gen("more")
    with pytest.raises(BranchStoppedError):
        within(20, lambda: last["more"])
    assert within(20, last.text) == "Q"
    assert within(20, lambda: group[0]["then"]) == "The answer is 7."
    assert (len(group), len(list(group))) == (8, 8)


def test_what_is_appended_before_a_branch_starts_is_there_at_once() -> None:
    group = sgl.fork_similar(state_on(Scripted(ALIKE)), 8, early_stop="certain")
    group += [f" {index}" for index in range(8)]
    assert within(20, group[6].text) == "Q 6"
    group += sgl.gen("answer")
    assert within(20, group[3].text) == "Q 3The answer is 7."


def test_joins_take_what_there_is() -> None:
    group = forked(Scripted(ALIKE))
    within(20, group.join)
    assert group.src_state["answer"] == ["The answer is 7."] * 4
    appended = forked(Scripted(["7", "7", "8"]), "certain")
    within(20, lambda: appended.join("concate_and_append"))
    assert within(20, appended.src_state.text) == "Q77"


def test_a_join_gathers_nothing_of_a_branch_that_was_stopped_between_two_variables() -> None:
    backend = Scripted(ALIKE, held=range(8))
    group = sgl.fork_similar(state_on(backend), 8, early_stop=EarlyStop("certain", launch="all"))
    for branch in group.states[4:]:
        branch += sgl.gen("thought")
    eventually_asked(backend, 4)
    backend.let_go(*range(4, 8))
    wait_until(lambda: all("thought" in branch for branch in group.states[4:]))
    for index in range(4):
        backend.doors[index].set()
    for branch in group.states[:4]:
        branch += sgl.gen("answer")
    within(20, group.join)
    assert group.src_state["answer"] == ["The answer is 7."] * 4
    assert "thought" not in group.src_state


@sgl.function
def solve(s, early_stop):
    s += "Question. "
    branches = sgl.fork_similar(s, 8, early_stop=early_stop)
    branches += sgl.gen("answer")
    verdict = sgl.verify_gated(branches, "answer")
    s["best"] = verdict.best["answer"]
    s["stopping"] = branches.stopping


def test_it_works_in_run_run_batch_and_streams() -> None:
    backend = Scripted(ALIKE)
    stop = EarlyStop("certain")
    states = [solve.run(early_stop=stop, backend=backend)]
    states += solve.run_batch([{"early_stop": stop}] * 3, backend=backend, num_threads=3)
    streamed = solve.run(early_stop=stop, backend=backend, stream=True)
    assert within(20, lambda: "".join(streamed.text_iter())) == "Question. "
    for state in [*states, streamed]:
        assert state["best"] == "The answer is 7."
        assert len(state["stopping"].of_fate("not_started")) == 4
    assert len(backend.asked) == 4 * 5


def test_a_streamed_branch_that_never_started_ends_its_readers() -> None:
    group = forked(Scripted(ALIKE), stream=True)
    assert within(20, lambda: "".join(group[0].text_iter("answer"))) == "The answer is 7."
    assert within(20, lambda: "".join(group[7].text_iter())) == "Q"
    within(20, group[6].sync)
    assert within(20, lambda: "".join(group[6].text_iter("answer"))) == ""


@sgl.function
def returning(s, early_stop):
    s += "Question. "
    branches = sgl.fork_similar(s, 8, early_stop=early_stop)
    s["early"] = branches


def test_a_fork_that_a_program_returned_is_decided_after_its_end() -> None:
    backend = Scripted(ALIKE)
    group = returning.run(early_stop="certain", backend=backend)["early"]
    group += sgl.gen("answer")
    verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
    assert (verdict.skipped, len(backend.asked)) == (True, 4)


def test_a_process_ends_though_branches_were_never_started() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import sys; sys.path.insert(0, 'tests/frontend')\n"
        "from test_early_stop import ALIKE, Scripted, returning, sgl\n"
        "kept = returning.run(early_stop='certain', backend=Scripted(ALIKE))['early']\n"
        "kept[7] += sgl.gen('other')\n"  # nobody will ever vote
        "kept += sgl.gen('another')\n"
        "print('done', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


# -- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[""] * 4, ["I do not know."] * 4])
def test_where_no_branch_has_an_answer_all_run_and_the_selection_is_as_ever(texts: list[str]) -> None:
    backend = Scripted(texts)
    group = forked(backend)
    assert fates(group) == ["finished"] * 4
    assert (group.stopping.done.answer, group.stopping.done.branch) == (None, None)
    if texts[0]:
        assert sgl.verify_gated(group, "answer", select="majority").index == 0
    else:
        with pytest.raises(VerificationError, match="'answer' is empty"):
            sgl.verify_gated(group, "answer")


def test_a_tie_goes_to_the_answer_whose_branch_comes_first_and_nobody_is_asked() -> None:
    group = forked(Scripted(["8", "7", "7", "8"]))
    verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
    assert (verdict.index, verdict.answers[0]) == (0, "8")
    assert fates(group) == ["finished"] * 4
    assert verdict.skipped
    assert verdict.reason == "vote: 2 answers have 2 of 4 branches each, and the one whose branch comes first wins"


def test_where_all_ran_and_only_one_has_an_answer_there_is_nothing_to_compare() -> None:
    group = forked(Scripted(["I do not know.", "I do not know.", "#### 8"]))
    assert fates(group) == ["finished"] * 3
    with pytest.raises(RkscError, match="Scripted"):  # which cannot verify
        sgl.verify_gated(group, "answer")
    assert sgl.verify_gated(group, "answer", select="majority").index == 2


def test_one_branch_is_a_fork_too() -> None:
    group = forked(Scripted(["7"]))
    verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
    assert (verdict.index, verdict.skipped, fates(group)) == (0, True, ["finished"])


def test_equal_answers_in_different_spelling_are_one() -> None:
    backend = Scripted(["#### 0.5", "#### 1/2", "#### 3", "#### 3"])
    group = forked(backend)
    verdict = within(60, lambda: sgl.verify_gated(group, "answer"))
    assert (sorted(backend.asked), verdict.index) == ([0, 1], 0)
    assert [votes for _, votes in group.stopping.done.votes] == [2]  # in the spelling that came first


def test_a_branch_that_was_cut_has_no_vote() -> None:
    backend = Scripted(["It may be 7 or", "#### 8", "#### 8", "#### 8"], cut=[0])
    group = forked(backend)
    assert within(20, lambda: sgl.verify_gated(group, "answer")).index == 1
    assert group.stopping.branches[0].truncated and group.stopping.branches[0].answer is None


def test_a_branch_that_fails_has_no_vote_and_the_others_decide() -> None:
    backend = Scripted([ServerError("gone"), *["#### 7"] * 5])
    group = forked(backend)
    verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
    assert (verdict.index, verdict.errors[0]) == (1, "gone")
    assert fates(group)[0] == "failed"
    assert group.stopping.branches[0].why == "gone"


def test_a_branch_that_fails_before_it_is_started_does_not_hold_the_fork_up() -> None:
    group = sgl.fork_similar(state_on(Scripted(["7", "8", "9", "7"])), 4, early_stop=EarlyStop("certain", launch=1))
    group[2] += 7  # no expression
    for index in (0, 1, 3):
        group[index] += sgl.gen("answer")
    assert fates(group) == ["finished", "finished", "failed", "finished"]
    assert group.stopping.branches[2].why == "7"  # SGLang's words for it


def drop_all(standing: Any) -> Ruling:
    return Ruling(drop={index: "hopeless" for index in standing.running})


def test_when_every_branch_was_stopped_the_error_says_so() -> None:
    backend = Scripted(ALIKE[:3], held=range(3))
    group = forked(backend, EarlyStop(drop_all))
    group[0].stream_executor.run.generated(1, 0.5)
    with pytest.raises(VerificationError, match=r"every branch failed: branch 0: branch 0 was stopped: hopeless"):
        within(20, lambda: sgl.verify_gated(group, "answer"))
    assert fates(group) == ["stopped"] * 3
    backend.let_go()


def broken(standing: Any) -> Ruling:
    raise RuntimeError("I am broken")


def asking_for_scores(standing: Any) -> Ruling:
    ended = [index for index, outcome in enumerate(standing.outcomes) if outcome is not None]
    return Ruling(verify=tuple(ended))


@pytest.mark.parametrize(
    ("policy", "said"), [(broken, "RuntimeError: I am broken"), (asking_for_scores, "verifies nothing while branches")]
)
def test_a_policy_that_raises_is_reported_and_all_branches_run(policy: Callable[..., Ruling], said: str) -> None:
    group = forked(Scripted(["7", "8", "8"]), EarlyStop(policy))
    assert fates(group) == ["finished"] * 3
    assert said in str(group.stopping.policy_error)
    assert within(20, lambda: sgl.verify_gated(group, "answer")).index == 1


def test_a_policy_that_looks_at_the_record_is_not_kept_waiting() -> None:
    seen: list[Any] = []

    def looking(standing: Any) -> None:
        seen.append(looked["at"].stopping if "at" in looked else None)

    looked: dict[str, rksc_sgl.BranchGroup] = {}
    backend = Scripted(["7", "8"], held=[0, 1])
    looked["at"] = group = forked(backend, EarlyStop(looking))
    backend.let_go()
    assert fates(group) == ["finished"] * 2
    assert seen[-1] is not None


def test_an_extract_that_raises_takes_the_vote_and_not_the_branch() -> None:
    def picky(text: str) -> str:
        if text == "7":
            raise ValueError("not this one")
        return text

    group = forked(Scripted(["7", "8", "8", "9"]), EarlyStop("certain", extract=picky))
    assert fates(group)[0] == "failed"
    assert group.stopping.branches[0].why == "extract raised ValueError: not this one"
    assert (within(20, lambda: group[0]["answer"]), group[0].error()) == ("7", None)
    assert group.stopping.done.answer == "8"


WAITS = (lambda branch: branch.sync(), lambda branch: branch["a"], lambda branch: branch.text())


@pytest.mark.parametrize("wait", WAITS)
def test_where_no_branch_generates_the_variable_all_run_and_nobody_waits_in_vain(wait: Callable[..., Any]) -> None:
    backend = Scripted(ALIKE)
    group = sgl.fork_similar(state_on(backend), 8, early_stop=EarlyStop("certain", variable="answer"))
    group += sgl.gen("a")
    within(20, lambda: wait(group[7]))
    assert sorted(backend.asked) == list(range(8))
    assert group.stopping.branches[0].why == "it has nothing left to do and no variable 'answer'"
    assert group.stopping.of_fate("not_started") == []
    assert within(20, lambda: sgl.verify_gated(group, "a")).reason == "vote: 8 of 8 branches answer alike"


def test_nobody_waits_for_a_branch_that_is_stopped_where_it_cannot_be_ended() -> None:
    backend = Scripted(ALIKE, held=range(8))
    group = forked(backend, EarlyStop("certain", launch="all"))
    eventually_asked(backend, 8)
    backend.let_go(*range(5))
    verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
    assert verdict.skipped
    assert "branch 6 was stopped" in str(verdict.errors[6])
    assert fates(group)[5:] == ["stopped"] * 3
    with pytest.raises(BranchStoppedError):
        within(20, lambda: group[6]["answer"])
    backend.let_go()
    group[6].stream_executor.worker.join(20)
    assert "answer" not in group[6], "what came too late is not there"


def test_a_branch_that_finishes_while_the_decision_is_carried_out_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted(ALIKE, held=range(8))
    group = forked(backend, EarlyStop("certain", launch="all"))
    group += sgl.gen("then")
    eventually_asked(backend, 8)
    last = group[7].stream_executor
    stop = last.run.stop

    def stop_later(*why: str) -> None:
        backend.let_go(7)
        until = time.monotonic() + 0.5
        while last.queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        stop(*why)

    monkeypatch.setattr(last.run, "stop", stop_later)
    backend.let_go(0, 1, 2, 3)
    for index in range(4):
        within(20, group[index].sync)
    within(20, lambda: last.worker.join())
    assert (group.stopping.branches[7].fate, str(group[7].error())[:20]) == ("stopped", "branch 7 was stopped")
    assert "answer" not in group[7]
    assert backend.asked.count(7) == 1, "it went on to generate"
    backend.let_go()


def test_a_branch_that_finishes_while_it_is_stopped_leaves_nothing_behind() -> None:
    backend = Scripted(ALIKE, held=range(8))
    group = forked(backend, EarlyStop("certain", launch="all"))
    eventually_asked(backend, 8)
    backend.let_go(*range(4))
    for index in range(4):
        within(20, group[index].sync)
    backend.let_go()
    group[7].stream_executor.worker.join(20)
    assert "answer" not in group[7].stream_executor.variables
    assert "answer" not in group[7].stream_executor.meta_info


def test_a_branch_that_finishes_while_it_is_stopped_is_stopped() -> None:
    backend = Scripted(ALIKE, held=range(8))
    group = forked(backend, EarlyStop("certain", launch="all"))
    eventually_asked(backend, 8)
    backend.let_go(*range(7))
    for index in range(7):
        within(20, group[index].sync)
    backend.let_go(7)
    group[7].stream_executor.worker.join(20)
    record = group.stopping.branches[7]
    assert (record.fate, record.answer) == ("stopped", "7")
    assert sgl.verify_gated(group, "answer").errors[7] is not None


# -- requests ----------------------------------------------------------------------------------------------------


def on_aborting(server: Aborting) -> rksc_sgl.BranchGroup:
    """Of two branches the first answers at once, which decides; the other one answers when it is aborted."""
    s = state_on(rksc_sgl.Endpoint(server.url))
    group = sgl.fork_similar(s, 2, early_stop=EarlyStop("certain", launch="all"))
    group[1] += sgl.gen("answer", max_tokens=1000)
    run = group[1].stream_executor.run
    wait_until(lambda: run.request in server.generations)
    group[0] += sgl.gen("answer", max_tokens=Aborting.SHORT)
    return group


def test_a_request_is_ended_under_an_id_of_its_own_and_its_tokens_are_counted() -> None:
    with aborting() as server:
        group = on_aborting(server)
        verdict = within(20, lambda: sgl.verify_gated(group, "answer"))
        assert (verdict.index, verdict.skipped) == (0, True)
        assert len({*server.generations}) == 2
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in server.generations)
        assert {*server.aborts} == {server.generations[0]}
        assert [branch.tokens for branch in group.stopping.branches] == [1, 5]
        assert "branch 1 was stopped" in str(group[1].error())


def test_branches_are_aborted_side_by_side() -> None:
    with aborting(together=3) as server:
        s = state_on(rksc_sgl.Endpoint(server.url))
        group = sgl.fork_similar(s, 4, early_stop=EarlyStop(drop_all, launch="all"))
        group += sgl.gen("answer", max_tokens=1000)
        within(20, lambda: wait_until(lambda: len(server.generations) == 4))
        group[3].stream_executor.run.generated(1, 0.5)
        within(20, lambda: server.came_together.wait())
        assert len({*server.aborts}) >= 3
        assert fates(group) == ["stopped"] * 4


def test_an_abort_that_the_server_did_not_hear_is_sent_again() -> None:
    with aborting(deaf=3) as server:
        group = on_aborting(server)
        assert fates(group) == ["finished", "stopped"]
        assert len(server.aborts) == 4


def test_where_the_server_refuses_to_end_requests_nobody_waits_and_it_is_said() -> None:
    with aborting(refuses=True) as server, pytest.warns(rksc_sgl.frontend.RkscDegradedWarning) as said:
        group = on_aborting(server)
        assert fates(group) == ["finished", "stopped"]
        assert len(server.aborts) == 1
        assert any("which refuses to end them" in str(one.message) for one in said)
        assert any("stopped from here all the same" in str(one.message) for one in said)
        group[1].stream_executor.worker.join(20)
        assert not group[1].stream_executor.worker.is_alive(), "it waits for a request that nobody ends"
        assert "answer" not in group[1]
        record = group.stopping
        assert (record.branches[1].abandoned, record.tokens_saved) == (True, 0)
        server.over.set()


# -- programs that end by an error -------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As Ctrl-C: no Exception."""


@sgl.function
def raising(s, early_stop, error, seen):
    s += "Question. "
    seen["group"] = group = sgl.fork_similar(s, 8, early_stop=early_stop)
    group += sgl.gen("answer")
    group += sgl.gen("then")
    eventually_asked(s.stream_executor.backend, seen["running"])
    raise error


@pytest.mark.parametrize("error", [RuntimeError("no more"), Interrupted("no more")])
def test_a_program_that_raises_starts_no_further_branch_and_ends_those_that_run(error: BaseException) -> None:
    backend = Scripted(["The answer is 7.", *[str(index) for index in range(7)]], held=range(8))
    seen: dict[str, Any] = {"running": 4}
    with pytest.raises(type(error), match="no more"):
        raising.run(early_stop="certain", error=error, seen=seen, backend=backend)
    group = seen["group"]
    assert group.stopping.done.reason == "cancelled"
    assert group.stopping.done.statement == f"the program ended by {type(error).__name__}: no more"
    backend.let_go()
    assert fates(group) == ["stopped"] * 4 + ["not_started"] * 4
    for branch in group.states[:4]:
        branch.stream_executor.worker.join(20)
    assert sorted(backend.asked) == [0, 1, 2, 3], "it went on to generate"


@pytest.mark.parametrize("refuses", [False, True])
def test_a_process_that_is_interrupted_ends_its_requests_and_itself(refuses: bool) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import sys, time; sys.path.insert(0, 'tests/frontend')\n"
        "from test_early_stop import rksc_sgl, sgl, wait_until\n"
        "@sgl.function\n"
        "def interrupted(s):\n"
        "    s += 'Question. '\n"
        "    group = sgl.fork_similar(s, 8, early_stop='certain')\n"
        "    group += sgl.gen('answer', max_tokens=1000)\n"
        "    wait_until(lambda: all(group[i].stream_executor.run.request for i in range(4)))\n"
        "    raise KeyboardInterrupt\n"
        "interrupted.run(backend=rksc_sgl.Endpoint(sys.argv[1]))\n"
    )
    with aborting(refuses=refuses) as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "KeyboardInterrupt" in done.stderr and done.returncode != 0
        assert len(set(server.generations)) <= 4, "it started more branches"
        assert set(server.generations) <= set(server.aborts)


def test_a_cancelled_fork_keeps_what_is_finished() -> None:
    backend = Scripted(ALIKE, held=[1])
    group = sgl.fork_similar(state_on(backend), 2, early_stop=EarlyStop("certain", launch="all"))
    group[1] += sgl.gen("answer")
    group[0] += sgl.gen("answer")
    within(20, group[0].sync)
    assert group.stopping.of_fate("finished") == [0]
    group.cancel("enough")
    group[0] += sgl.gen("then")
    assert within(20, lambda: group[0]["then"]) == "The answer is 7.", "it had nothing to do then"
    backend.let_go()


def test_a_generation_after_the_vote_is_ended_where_the_fork_is_cancelled() -> None:
    with aborting() as server:
        s = state_on(rksc_sgl.Endpoint(server.url))
        group = sgl.fork_similar(s, 2, early_stop=EarlyStop("certain", launch=1))
        group += sgl.gen("answer", max_tokens=Aborting.SHORT)
        group[0] += sgl.gen("then", max_tokens=1000)
        wait_until(lambda: len(server.generations) == 2)
        wait_until(lambda: group[0].stream_executor.run.request in server.generations)
        group.cancel("enough")
        error = within(20, group[0].error)
        assert isinstance(error, BranchStoppedError) and "branch 0 was stopped: enough" in str(error)
        assert "then" not in group[0]
        assert group.stopping.branches[0].fate == "finished", "it had voted"


def test_an_error_that_is_handled_while_a_program_runs_cancels_nothing() -> None:
    try:
        raise ValueError("before")
    except ValueError:
        group = returning.run(early_stop="certain", backend=Scripted(ALIKE))["early"]
    group += sgl.gen("answer")
    assert within(20, lambda: sgl.verify_gated(group, "answer")).skipped
    assert group.stopping.done.reason == "certain"


def test_a_fork_without_early_stop_cannot_be_cancelled_and_says_so() -> None:
    group = sgl.fork_similar(state_on(Scripted([])), 2)
    with pytest.raises(OptionError, match="cancel: only a fork with early_stop"):
        group.cancel()


def test_without_early_stop_too_an_answer_that_somebody_cut_off_is_none() -> None:
    with aborting() as server:
        group = sgl.fork_similar(state_on(rksc_sgl.Endpoint(server.url)), 3)
        group[0] += sgl.gen("answer", max_tokens=1000)
        wait_until(lambda: len(server.generations) == 1)
        server.over.set()
        for branch in group.states[1:]:
            branch += sgl.gen("answer", max_tokens=Aborting.SHORT)
        verdict = within(20, lambda: sgl.verify_gated(group, "answer", select="majority"))
        assert str(verdict.errors[0]) == "the server ended the request: Aborted"
        assert (verdict.index, verdict.answers) == (1, [None, "7", "7"])


@pytest.mark.parametrize("early_stop", [None, "certain"])
def test_an_answer_that_was_cut_off_on_another_backend_is_never_selected(early_stop: str | None) -> None:
    group = sgl.fork_similar(state_on(Unasked(ALIKE[:2])), 2, early_stop=early_stop)
    group += sgl.gen("answer")
    if early_stop:
        assert fates(group) == ["failed"] * 2
    with pytest.raises(VerificationError, match="every branch failed: the server ended the request: Aborted"):
        sgl.verify_gated(group, "answer", select="majority")


# -- what it composes with ---------------------------------------------------------------------------------------


def test_another_variable_or_extraction_is_selected_as_ever_among_those_that_finished() -> None:
    group = forked(Scripted(ALIKE), EarlyStop("certain", extract="text"))
    for branch in group:
        within(20, branch.sync)
    assert sgl.verify_gated(group, "answer").reason.startswith("stopped early (certain)")
    assert sgl.verify_gated(group, "answer", extract="answer").reason == "vote: 4 of 8 branches answer alike"
    with pytest.raises(RkscError, match="Scripted"):
        sgl.verify_gated(group, "answer", select="score")


def test_the_branch_that_is_taken_is_not_one_that_failed_after_its_answer() -> None:
    group = forked(Scripted(["7", "8", "8", "8", "8"]))
    for branch in group:
        within(20, branch.sync)
    group[1].stream_executor.error_ = ServerError("gone")
    assert sgl.verify_gated(group, "answer").index == 2


@pytest.mark.parametrize("how", ["at the fork", "after it"])
def test_wordings_are_launched_in_a_random_order_where_branches_must_be_of_one_kind(how: str) -> None:
    first = set()
    for _ in range(20):
        backend = Scripted(["7"] * 16)
        wordings = [f" {i}" for i in range(16)]
        branches = wordings if how == "at the fork" else 16
        group = sgl.fork_similar(state_on(backend), branches, early_stop=EarlyStop("probable"))
        if how == "after it":
            group += wordings
        group += sgl.gen("answer")
        verdict = within(20, lambda: sgl.verify_gated(group, "answer"))  # noqa: B023
        asked = sorted(backend.asked)
        assert group.stopping.of_fate("finished") == asked
        assert [index for index, error in enumerate(verdict.errors) if error is None] == asked
        assert verdict.index in asked
        first.add(tuple(asked))
    assert len(first) > 1


@pytest.mark.parametrize(
    ("early_stop", "named"),
    [(7, "early_stop: must be an EarlyStop"), ("soon", r"early_stop\.policy: must be one of certain")],
)
def test_what_is_no_early_stop_is_refused(early_stop: Any, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        sgl.fork_similar(state_on(Scripted(["7"])), 2, early_stop=early_stop)
    with pytest.raises(OptionError, match=r"early_stop\.policy"):
        sgl.fork_similar(state_on(Scripted(["7"])), 65, early_stop=EarlyStop("probable"))
