"""fork_similar and verify_gated on real servers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

import rksc_sgl
from rksc_sgl import Endpoint, SkipGate, Verdict
from rksc_sgl.errors import LabelError, OptionError, UnsupportedBackendError, VerificationError
from rksc_sgl.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

STORY = "A farmer has 12 cows and sells 5 of them on Monday. " * 6


def state_on(backend: Any, stream: bool = False) -> ProgramState:
    defaults = SglSamplingParams(max_new_tokens=8, temperature=0.7)
    return ProgramState(StreamExecutor(backend, {}, defaults, None, stream))


def info_of(branch: ProgramState, var: str = "a") -> dict[str, Any]:
    info = branch.get_meta_info(var)
    assert branch.error() is None
    return info


def test_branches_that_arrive_together_find_the_prefix_computed_once(tiny: Endpoint) -> None:
    tiny.flush_cache()
    s = state_on(tiny)
    s += STORY
    group = sgl.fork_similar(s, 8)
    group += sgl.gen("a", max_tokens=6, ignore_eos=True)
    infos = [info_of(branch) for branch in group.states]
    assert all(info["cached_tokens"] >= info["prompt_tokens"] - 1 for info in infos)
    assert {info["rksc"]["group"] for info in infos} == {group.group_id}
    assert [info["rksc"]["branch"] for info in infos] == list(range(8))
    assert all(info["rksc"]["branches"] == 8 and info["rksc"]["mode"] == "exact" for info in infos)
    assert all(0 < info["confidence"] <= 1 for info in infos)


def test_wordings_share_what_is_equal_and_keep_their_own_words(tiny: Endpoint) -> None:
    tiny.flush_cache()
    s = state_on(tiny)
    s += sgl.system(STORY)
    wordings = ["How many cows are left?", "Count the cows that remain.", "Cows left:"]
    group = s.fork_similar([sgl.user(text) for text in wordings], share="exact")
    group += sgl.assistant(sgl.gen("a", max_tokens=4))
    for branch, text in zip(group.states, wordings, strict=True):
        assert text in branch.text()
        assert info_of(branch)["cached_tokens"] > 0.7 * info_of(branch)["prompt_tokens"]


def test_a_group_behaves_like_sglangs_own(tiny: Endpoint) -> None:
    s = state_on(tiny)
    s += "Go. "
    group = sgl.fork_similar(s, 3)
    group += "same "
    group += ["zero ", "one ", "two "]
    group += lambda index: sgl.gen("a", max_tokens=index + 1, ignore_eos=True)
    assert len(group) == len(list(group)) == 3
    assert [info_of(branch)["completion_tokens"] for branch in group] == [1, 2, 3]
    assert group[1].text().startswith("Go. same one ")
    group.join()
    assert len(s["a"]) == 3


def test_a_branch_can_be_forked_again_and_keeps_its_ids(tiny: Endpoint) -> None:
    s = state_on(tiny)
    s += STORY
    group = sgl.fork_similar(s, 2)
    group += sgl.gen("a", max_tokens=20, ignore_eos=True, temperature=1.5)
    info_of(group[0])
    inner = sgl.fork_similar(group[0], 2)
    inner += sgl.gen("b", max_tokens=4, ignore_eos=True)
    outer = info_of(group[0])
    for branch in inner:
        info = info_of(branch, "b")
        assert info["prompt_tokens"] == outer["prompt_tokens"] + outer["completion_tokens"]
        assert info["cached_tokens"] >= info["prompt_tokens"] - 2


@sgl.function
def forked(s, count, stream_to=None):
    s += STORY
    group = sgl.fork_similar(s, count)
    group += sgl.gen("a", max_tokens=5, ignore_eos=True)
    s["texts"] = [branch["a"] for branch in group]
    s["errors"] = [branch.error() for branch in group]


def test_it_works_inside_run_run_batch_and_streams(tiny: Endpoint) -> None:
    assert len(forked.run(count=3, backend=tiny)["texts"]) == 3
    states = forked.run_batch([{"count": 2}, {"count": 4}], backend=tiny, num_threads=2)
    assert [len(state["texts"]) for state in states] == [2, 4]
    streamed = forked.run(count=2, backend=tiny, stream=True)
    assert "".join(streamed.text_iter()).startswith(STORY)
    assert streamed["errors"] == [None, None]
    assert all(streamed["texts"])


def test_a_streamed_branch_reports_too(tiny: Endpoint) -> None:
    s = state_on(tiny, stream=True)
    s += STORY
    group = sgl.fork_similar(s, 2)
    group += sgl.gen("a", max_tokens=5, ignore_eos=True)
    assert "".join(group[0].text_iter("a")) == group[0]["a"]
    assert info_of(group[0])["rksc"]["group"] == group.group_id


@pytest.mark.parametrize("branches", [0, -1, True, [], "two", [3], 2.0, 10**6])
def test_branches_that_are_none_are_refused(tiny: Endpoint, branches: Any) -> None:
    with pytest.raises(OptionError, match="branches"):
        sgl.fork_similar(state_on(tiny), branches)


def test_an_unknown_way_of_sharing_is_refused(tiny: Endpoint) -> None:
    with pytest.raises(OptionError, match=r"rksc\.share"):
        sgl.fork_similar(state_on(tiny), 2, share="everything")


# -- verification, with a model that knows what yes means --------------------------------------------------------


def asked(smollm: Endpoint, count: int = 4, tokens: int = 24, temperature: float = 1.0) -> rksc_sgl.BranchGroup:
    s = state_on(smollm)
    s += sgl.system("You are a careful mathematician.")
    s += sgl.user("Tom has 3 apples and buys 4 more. How many apples does he have?")
    group = sgl.fork_similar(s, count)
    group += sgl.assistant(sgl.gen("a", max_tokens=tokens, temperature=temperature))
    return group


def test_verification_costs_the_question_only(smollm: Endpoint) -> None:
    group = asked(smollm, count=6, tokens=48, temperature=1.3)
    verdict = sgl.verify_gated(group, "a", skip=SkipGate.never())
    assert isinstance(verdict, Verdict)
    assert not verdict.skipped
    assert verdict.errors == [None] * 6
    assert all(0 < new <= 40 for new in verdict.new_tokens), verdict.new_tokens
    assert verdict.tokens_spent == sum(verdict.new_tokens)
    assert verdict.tokens_saved > verdict.tokens_spent
    assert all(score is not None and 0 < score < 1 for score in verdict.scores)
    assert verdict.best is group[verdict.index]
    assert all(report is not None and report["op"] == "verify" for report in verdict.reports)


def test_a_score_is_what_the_model_says_of_the_same_tokens_alone(smollm: Endpoint) -> None:
    group = asked(smollm, count=3)
    verdict = sgl.verify_gated(group, "a", skip=SkipGate.never())
    smollm.flush_cache()
    again = sgl.verify_gated(group, "a", skip=SkipGate.never())
    assert min(again.new_tokens) > 40  # nothing was cached this time
    assert again.scores == pytest.approx(verdict.scores, abs=1e-3)


def test_the_gate_and_the_selection_do_what_they_say(smollm: Endpoint) -> None:
    group = asked(smollm, count=3)
    agreed = sgl.verify_gated(group, "a", extract=lambda text: "same")
    assert agreed.skipped and "3 of 3" in agreed.reason
    assert agreed.tokens_spent == 0
    assert agreed.tokens_saved > 0
    assert agreed.scores == [None] * 3
    majority = sgl.verify_gated(group, "a", select="majority", extract=lambda text: text[:1])
    assert majority.skipped and "needs no verification" in majority.reason
    last = group.verify_gated("a", select=lambda candidates: candidates[-1].index, skip=SkipGate.never())
    assert last.index == 2
    with pytest.raises(OptionError, match="select"):
        sgl.verify_gated(group, "a", select="luck")
    with pytest.raises(OptionError, match="skip"):
        sgl.verify_gated(group, "a", skip="always")


def test_labels_of_ones_own(smollm: Endpoint) -> None:
    group = asked(smollm, count=2)
    verdict = sgl.verify_gated(group, "a", labels=("right", "wrong"), skip=SkipGate.never())
    assert all(score is not None for score in verdict.scores)
    with pytest.raises(LabelError):
        sgl.verify_gated(group, "a", labels=("1x", "1y"), skip=SkipGate.never())


def test_a_failed_empty_or_overlong_branch_loses_and_the_rest_goes_on(smollm: Endpoint) -> None:
    group = asked(smollm, count=4)
    for branch in group:
        branch.sync()
    group[0].set_var("a", "   ")
    group[1].stream_executor.variables.pop("a")
    group[2].stream_executor.text_ += " and more" * 9000  # beyond the model's context
    verdict = sgl.verify_gated(group, "a", skip=SkipGate.never())
    assert verdict.index == 3
    assert verdict.errors[3] is None
    assert "empty" in str(verdict.errors[0])
    assert "no variable 'a'" in str(verdict.errors[1])
    assert "verification failed" in str(verdict.errors[2])


def test_when_every_branch_failed_there_is_an_error_that_lists_why(smollm: Endpoint) -> None:
    group = asked(smollm, count=2)
    with pytest.raises(VerificationError, match=r"branch 0: .*no variable 'b'.*branch 1: "):
        sgl.verify_gated(group, "b")


# -- servers and backends without us -----------------------------------------------------------------------------


def test_on_a_stock_server_it_works_with_less_and_says_so(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "rksc_cpu")  # the platform stays, our plugin is not loaded
    arguments = ["--model-path", str(tiny_model), "--max-total-tokens", "20000", "--attention-backend", "torch_native"]
    with ServerProcess(arguments) as server:
        stock = Endpoint(server.url)
        s = state_on(stock)
        s += STORY
        with pytest.warns(rksc_sgl.frontend.RkscDegradedWarning, match="without the rksc plugin"):
            group = sgl.fork_similar(s, 3)
        group += sgl.gen("a", max_tokens=6, ignore_eos=True)
        assert group.group_id is None
        for branch in group:
            assert "rksc" not in info_of(branch)
            assert info_of(branch)["cached_tokens"] > 0
        verdict = sgl.verify_gated(group, "a", skip=SkipGate.never())
        assert all(score is not None for score in verdict.scores)
        assert verdict.reports == [None] * 3


class Elsewhere(sgl.lang.backend.base_backend.BaseBackend):
    """A language backend that is not an SGLang server."""

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict]:
        return f"The answer is {len(s.text_) % 3}", {}


def test_another_backend_forks_and_votes_and_says_what_it_cannot() -> None:
    s = state_on(Elsewhere())
    s += "Question. "
    with pytest.warns(rksc_sgl.frontend.RkscDegradedWarning, match="not an SGLang server"):
        group = sgl.fork_similar(s, ["a", "b", "cc"])
    group += sgl.gen("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sgl.verify_gated(group, "a", select="majority").index in (0, 1)
    with pytest.raises(UnsupportedBackendError, match="Elsewhere"):
        sgl.verify_gated(group, "a")
