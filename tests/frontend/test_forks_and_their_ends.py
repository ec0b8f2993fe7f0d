"""Executors of branches: nobody waits for a worker that is gone. On a language backend without a server."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from typing import Any

import pytest
import sglang as sgl
from limits import within
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

import rksc_sgl
from rksc_sgl.errors import OptionError, ServerError, UnsupportedBackendError, VerificationError

pytestmark = pytest.mark.filterwarnings("ignore::rksc_sgl.frontend.RkscDegradedWarning", "ignore:Error in stream_exec")


class Speaker(BaseBackend):
    """Says how long the text is, and fails where the text asks for it."""

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        if s.text_.endswith("fail"):
            raise ServerError("it was asked to")
        if s.text_.endswith("exit"):
            raise SystemExit
        return f"The answer is {len(s.text_)}. ", {}

    def generate_stream(self, s: Any, sampling_params: Any) -> Any:
        text, meta_info = self.generate(s, sampling_params)
        for word in text.split(" "):
            yield f"{word} ", meta_info


def speaking_state(stream: bool = False) -> ProgramState:
    s = ProgramState(StreamExecutor(Speaker(), {}, SglSamplingParams(), None, stream))
    s += "Q"
    return s


@sgl.function
def returning(s, appended=None):
    s += "Question. "
    group = sgl.fork_similar(s, 3)
    if appended is not None:
        group += appended
    s["group"] = group


def test_a_program_with_a_thousand_branches_ends() -> None:
    s = speaking_state()
    group = sgl.fork_similar(s, 1100)
    s.stream_executor.end()
    assert all(within(10, branch.text) == "Q" for branch in group)


def test_a_program_with_hundreds_of_forks_ends_and_keeps_none_that_are_gone() -> None:
    s = speaking_state()
    for _ in range(300):
        sgl.fork_similar(s, 4)
    gc.collect()
    assert len(s.stream_executor.end.branches) <= 4
    s.stream_executor.end()


def test_forks_of_forks_end_however_deep_they_are() -> None:
    threads = threading.active_count()
    states = [speaking_state()]
    for _ in range(1100):
        states.append(sgl.fork_similar(states[-1], 1)[0])
    states[0].stream_executor.end()
    for state in states:
        state.stream_executor.worker.join(10)
    assert threading.active_count() <= threads


def test_a_fork_that_a_program_returned_goes_on_after_its_end() -> None:
    group = returning.run(backend=Speaker())["group"]
    group += sgl.gen("a")
    group += "And? "
    group += sgl.gen("b")
    assert within(10, lambda: [branch["a"] for branch in group]) == ["The answer is 10. "] * 3
    assert within(10, group[1].text) == "Question. The answer is 10. And? The answer is 33. "
    assert within(10, lambda: sgl.verify_gated(group, "b")).answers == ["33"] * 3


def test_what_was_appended_before_the_end_is_done_too_and_in_order() -> None:
    group = returning.run(backend=Speaker(), appended=sgl.gen("a") + "then ")["group"]
    group += sgl.gen("b")
    assert within(10, group[2].text) == "Question. The answer is 10. then The answer is 33. "


def test_a_returned_fork_can_be_forked_joined_and_streamed_from() -> None:
    state = returning.run(backend=Speaker())
    inner = within(10, lambda: sgl.fork_similar(state["group"][0], 2))
    inner += sgl.gen("a")
    assert within(10, lambda: [branch["a"] for branch in inner]) == ["The answer is 10. "] * 2
    within(10, inner.join)
    inner += sgl.gen("b")
    assert within(10, lambda: inner[0]["b"]).startswith("The answer")
    again = within(10, lambda: sgl.fork_similar(state, 2))
    assert within(10, again[1].text) == "Question. "
    s = speaking_state(stream=True)
    group = sgl.fork_similar(s, 2)
    s.stream_executor.end()
    group += sgl.gen("a")
    assert within(10, lambda: "".join(group[0].text_iter())) == "QThe answer is 1.  "


def test_a_process_ends_though_it_keeps_a_fork_that_was_used_after_its_program() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import sys; sys.path.insert(0, 'tests/frontend')\n"
        "from test_forks_and_their_ends import Speaker, returning, sgl\n"
        "kept = returning.run(backend=Speaker())['group']\n"
        "kept += sgl.gen('a')\n"
        "inner = sgl.fork_similar(kept[0], 2)\n"
        "print(kept[0]['a'], flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("The answer is 10. \n", 0), done.stderr


@pytest.mark.parametrize("how", ["fail", "exit"])
def test_nobody_waits_for_a_branch_that_failed(how: str) -> None:
    s = speaking_state()
    group = sgl.fork_similar(s, [how, "go on"])
    group += sgl.gen("a")
    assert within(10, group[0].error) is not None
    with pytest.raises(ServerError, match="stopped" if how == "exit" else "asked to"):
        group[0] += sgl.gen("b")
    with pytest.raises(KeyError):
        within(10, lambda: group[0]["a"])
    verdict = within(10, lambda: sgl.verify_gated(group, "a"))
    assert (verdict.index, verdict.errors[1]) == (1, None)


def test_sglangs_own_fork_after_its_end_is_an_error_that_says_why() -> None:
    s = speaking_state()
    group = s.fork(2)
    group += sgl.gen("a")
    within(10, group.join)
    for branch in group:
        branch.stream_executor.worker.join(10)
    group += sgl.gen("b")
    with pytest.raises(VerificationError, match="never run: SGLang's worker of it ended"):
        within(10, lambda: sgl.verify_gated(group, "b"))


def test_texts_of_branches_are_appended_by_a_join() -> None:
    s = speaking_state()
    group = sgl.fork_similar(s, [" one", " two"])
    within(10, lambda: group.join("concate_and_append"))
    assert within(10, s.text) == "Q one two"
    failing = sgl.fork_similar(s, ["fail", " three"])
    failing += sgl.gen("a")
    with pytest.raises(ServerError, match="asked to"):
        within(10, lambda: failing.join("concate_and_append"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"exit": "sometimes"}, r"rksc\.exit: must be one of"),
        ({"risk": 2.0}, r"rksc\.risk: must be above 0"),
        ({"risk": "low"}, r"rksc\.risk: must be a finite number"),
        ({"scope": "everything"}, r"rksc\.scope: must be one of"),
        ({"labels": "YES"}, "labels: must be a list"),
        ({"labels": ["YES", 7]}, "labels: must be at least two"),
        ({"question": 7}, "question: must be a string"),
        ({"select": "luck"}, "select: must be one of vote"),
    ],
)
def test_an_argument_that_is_of_no_use_is_refused_once_and_before_anything_is_sent(
    arguments: dict[str, Any], named: str
) -> None:
    group = sgl.fork_similar(speaking_state(), ["a", "b"])
    group += sgl.gen("a")
    with pytest.raises(OptionError, match=named):
        sgl.verify_gated(group, "a", **arguments)


def voted(answers: list[str], **arguments: Any) -> rksc_sgl.Verdict:
    group = sgl.fork_similar(speaking_state(), len(answers))
    for branch, answer in zip(group, answers, strict=True):
        branch.set_var("a", answer)
    return sgl.verify_gated(group, "a", **arguments)


def test_the_default_is_the_vote_and_needs_a_server_only_where_that_does_not_decide() -> None:
    verdict = voted(["#### 3", "#### 4", "#### 4", "who knows"])
    assert (verdict.index, verdict.skipped, verdict.scores) == (1, True, [None] * 4)
    assert verdict.reason == "vote: 2 of 4 branches answer alike"
    for tied in (["#### 3", "#### 4"], ["who knows", "#### 4"]):
        with pytest.raises(UnsupportedBackendError, match="Speaker"):
            voted(tied)
        assert voted(tied, select="majority").skipped
    alone = voted(["who knows"])
    assert (alone.index, alone.skipped, alone.reason) == (0, True, "1 of 1 branches is left: nothing to choose")
    with pytest.raises(UnsupportedBackendError):
        voted(["#### 4", "#### 4"], skip=rksc_sgl.SkipGate.never())
