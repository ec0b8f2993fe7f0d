"""fork_similar and verify_gated on real servers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sglang as sgl
from limits import within
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams
from test_early_stop_on_a_server import MEANING_LESS, check_stopped, first_four_short

import rksc_sgl
from rksc_sgl import Endpoint, SkipGate, Verdict
from rksc_sgl.errors import LabelError, OptionError, UnsupportedBackendError, VerificationError
from rksc_sgl.frontend.verify import verification_suffix
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.verifying.labels import resolve_labels
from rksc_sgl.verifying.question import question_with_labels

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
    first, *others = sorted(infos, key=lambda info: info["cached_tokens"])
    assert first["cached_tokens"] <= 1, "it computes what all have in common"
    assert all(info["cached_tokens"] >= info["prompt_tokens"] - 1 for info in others)
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
    assert all(text in branch.text() for branch, text in zip(group.states, wordings, strict=True))
    first, *others = sorted(map(info_of, group.states), key=lambda info: info["cached_tokens"])
    assert first["cached_tokens"] <= 1, "it computes what all have in common"
    assert all(info["cached_tokens"] > 0.7 * info["prompt_tokens"] for info in others)


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


LETTERS = "[a-z ]{500}"  # no special tokens, whose ids the text does not show, so that ids are kept by right


def test_a_branch_can_be_forked_again_and_keeps_its_ids(tiny: Endpoint) -> None:
    s = state_on(tiny)
    s += STORY
    group = sgl.fork_similar(s, 2)
    group += sgl.gen("a", max_tokens=20, regex=LETTERS, temperature=1.5)
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


def test_a_stream_is_what_comes_without_streaming(tiny: Endpoint) -> None:
    _check_streams(tiny)


def test_several_continuations_are_a_list_and_cannot_be_streamed_into_one_text(tiny: Endpoint) -> None:
    for stream in (False, True):
        s = state_on(tiny, stream=stream)
        s += STORY
        group = sgl.fork_similar(s, 2)
        for state in (group[0], s):
            state += sgl.gen("a", max_tokens=4, n=3, regex=LETTERS)
            error = within(60, state.error)
            if stream:
                assert isinstance(error, OptionError) and "n: 3 continuations cannot be streamed" in str(error)
            else:
                assert error is None and len(state["a"]) == 3
                assert state.text() == STORY + state["a"][0]
        if not stream:
            group[0] += sgl.gen("b", max_tokens=2)
            info = info_of(group[0], "b")
            assert info["cached_tokens"] >= info["prompt_tokens"] - 2


def test_a_program_without_a_prompt_is_told_so_and_the_server_lives(tiny: Endpoint) -> None:
    for expression in (sgl.gen("a", max_tokens=2), sgl.select("a", ["x", "y"])):
        for s in (state_on(tiny), sgl.fork_similar(state_on(tiny), 2)[0]):
            s += expression
            error = within(60, s.error)
            assert isinstance(error, OptionError) and "no text yet" in str(error)
    assert tiny.tokenize("alive")


def test_a_join_appends_texts_on_a_server_too(tiny: Endpoint) -> None:
    for fork in (lambda s: sgl.fork_similar(s, 2), lambda s: s.fork(2)):
        s = state_on(tiny)
        s += "Go."
        group = fork(s)
        group += [" one", " two"]
        within(60, lambda: group.join("concate_and_append"))  # noqa: B023
        assert (s.text(), s.error()) == ("Go. one two", None)


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


@pytest.mark.parametrize("chat", [True, False])
def test_a_score_is_what_sglangs_own_score_route_says_of_the_same_prompt(smollm: Endpoint, chat: bool) -> None:
    labels = ("correct", "wrong")
    s = state_on(smollm)
    s += sgl.user("Tom has 3 apples and buys 4 more. How many?") if chat else "3 apples and 4 more are how many? "
    group = sgl.fork_similar(s, 3)
    group += sgl.assistant(sgl.gen("a", max_tokens=12)) if chat else sgl.gen("a", max_tokens=12)
    verdict = sgl.verify_gated(group, "a", labels=labels, skip=SkipGate.never(), exit="off")
    prompts = []
    for branch in group:
        executor = branch.stream_executor
        question = question_with_labels(None, labels)
        suffix = verification_suffix(question, executor.chat_template, executor.messages_)
        prompts.append(executor.backend.prompt_ids(branch.text() + suffix))
    tokens = resolve_labels(labels, smollm.tokenize)
    body = {"items": prompts, "label_token_ids": tokens.all_ids, "apply_softmax": True, "return_token_logprobs": True}
    answer = smollm.post_json("/v1/score", {"query": [], **body})
    first = len(tokens.ids[0])
    assert 1 < first < len(tokens.all_ids) - 1, "both labels have several spellings"
    assert verdict.scores == pytest.approx([sum(row[:first]) for row in answer["scores"]], abs=1e-5)
    masses = [sum(map(math.exp, row)) for row in answer["token_logprobs"]]
    assert verdict.label_mass == pytest.approx(masses, abs=1e-5)


def test_the_gate_and_the_selection_do_what_they_say(smollm: Endpoint) -> None:
    group = asked(smollm, count=3)
    agreed = sgl.verify_gated(group, "a", extract=lambda text: "same")
    assert agreed.skipped and agreed.reason == "vote: 3 of 3 branches answer alike"
    assert agreed.label_mass == [None] * 3
    gated = sgl.verify_gated(group, "a", extract=lambda text: "same", select="score")
    assert gated.skipped and "agreement: 3 of 3" in gated.reason
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


def in_order(*answers: str | None) -> Callable[[str], str | None]:
    """An ``extract`` that finds these answers in the branches, whatever they say."""
    rest = iter(answers)
    return lambda text: next(rest)


def test_a_tie_is_verified_and_nobody_else(smollm: Endpoint) -> None:
    group = asked(smollm, count=6, tokens=12)
    verdict = sgl.verify_gated(group, "a", extract=in_order("3", "4", "4", "3", "5", None))
    assert not verdict.skipped
    assert [score is not None for score in verdict.scores] == [True] * 4 + [False] * 2
    assert [mass is not None for mass in verdict.label_mass] == [True] * 4 + [False] * 2
    assert verdict.new_tokens[4:] == [0, 0] and min(verdict.new_tokens[:4]) > 0
    assert verdict.reason.startswith("vote: 2 answers have 2 of 6 branches each, and the scores of these decide")
    tied = zip(verdict.scores[:4], verdict.confidences[:4], strict=True)
    worth = [score * confidence**0.5 for score, confidence in tied]
    by_three, by_four = worth[0] + worth[3], worth[1] + worth[2]
    assert verdict.answers[verdict.index] == ("3" if by_three > by_four else "4")


def test_where_answers_cannot_be_compared_the_score_decides_and_the_reason_says_what_it_is_worth(
    smollm: Endpoint,
) -> None:
    group = asked(smollm, count=3, tokens=12)
    verdict = sgl.verify_gated(group, "a", extract=in_order(None, "4", None))
    assert all(score is not None for score in verdict.scores)
    assert "1 of 3 branches have an answer" in verdict.reason
    assert "a score whose worth on this model is unknown until it is measured" in verdict.reason
    worth = [score * confidence**0.5 for score, confidence in zip(verdict.scores, verdict.confidences, strict=True)]
    assert verdict.index == worth.index(max(worth))
    never = sgl.verify_gated(group, "a", extract=in_order(None, "4", None), skip=SkipGate.never())
    assert (never.index, "worth on this model is unknown" in never.reason) == (verdict.index, True)


def test_scores_that_are_asked_for_do_not_change_a_vote(smollm: Endpoint) -> None:
    group = asked(smollm, count=3, tokens=12)
    verdict = sgl.verify_gated(group, "a", extract=in_order("3", "4", "4"), skip=SkipGate.never())
    assert all(score is not None for score in verdict.scores)
    assert verdict.answers[verdict.index] == "4"


def test_labels_of_ones_own(smollm: Endpoint) -> None:
    group = asked(smollm, count=2)
    verdict = sgl.verify_gated(group, "a", labels=("right", "wrong"), skip=SkipGate.never())
    assert all(score is not None for score in verdict.scores)
    with pytest.raises(LabelError):
        sgl.verify_gated(group, "a", labels=("1x", "1y"), skip=SkipGate.never())


def test_labels_that_the_model_would_never_say_are_named_once(
    smollm: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    group = asked(smollm, count=2)
    question = "Say something about the weather, please. Is it {labels}?"
    for _ in range(2):
        verdict = sgl.verify_gated(group, "a", question=question, labels=("zebra", "walrus"), skip=SkipGate.never())
        assert all(mass is not None and mass < 0.05 for mass in verdict.label_mass)
        assert "of the probability in 2 of 2 verifications, less than 0.05: these scores say little" in verdict.reason
    assert sum("these scores say little" in record.message for record in caplog.records) == 1
    likely = sgl.verify_gated(group, "a", skip=SkipGate.never())
    assert all(mass is not None and 0.05 < mass <= 1 for mass in likely.label_mass)
    assert "say little" not in likely.reason


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


def test_when_every_branch_failed_there_is_an_error_that_lists_why_and_says_nothing_twice(smollm: Endpoint) -> None:
    group = asked(smollm, count=2)
    with pytest.raises(VerificationError, match=r"^every branch failed: the branch has no variable 'b'; it has"):
        sgl.verify_gated(group, "b")
    group[0].set_var("b", " ")
    with pytest.raises(VerificationError, match=r"branch 0: 'b' is empty; branch 1: .*no variable 'b'"):
        sgl.verify_gated(group, "b")


def test_an_open_turn_is_closed_before_the_question(smollm: Endpoint) -> None:
    def verified(is_open: bool) -> tuple[str, Verdict]:
        s = state_on(smollm)
        s += sgl.user("Tom has 3 apples and buys 4 more. How many apples does he have?")
        gen = sgl.gen("a", max_tokens=12, temperature=0)
        if is_open:
            s += sgl.assistant_begin()
        group = sgl.fork_similar(s, 2)
        group += gen if is_open else sgl.assistant(gen)
        return group[0]["a"], sgl.verify_gated(group, "a", skip=SkipGate.never())

    (open_text, opened), (closed_text, closed) = verified(True), verified(False)
    assert open_text == closed_text
    assert opened.scores == pytest.approx(closed.scores, abs=1e-4)


def test_special_tokens_that_were_sampled_are_not_read_later(smollm: Endpoint) -> None:
    s = state_on(smollm)
    s += sgl.user("What is the capital of France?")
    group = sgl.fork_similar(s, 2)
    group += sgl.assistant(sgl.gen("a", max_tokens=40, temperature=0, ignore_eos=True, return_logprob=True))
    for branch in group:
        sampled = [one[1] for one in info_of(branch)["output_token_logprobs"]]
        assert smollm.spell(sampled) != branch["a"], "no special token was sampled"
        later = f"{branch.text()}And so?"
        ids = branch.stream_executor.backend.prompt_ids(later)
        assert ids is not None and smollm.spell(ids) == later


# -- merged branches ---------------------------------------------------------------------------------------------

TOLD = (
    "Anna has 3 cows and sells 2 of the cows. Boris has 11 hens and buys 4 hens. Clara has 7 books and lends 5 of "
    "the books. Dmitri has 9 lamps and breaks 6 of the lamps. Elena has 8 coins and finds 10 coins. Felix has 5 "
    "boats and sells 4 of the boats. How many hens does Boris have now?"
)
REWORDED = f"Think step by step. {TOLD}"
CHOICES = [" yes", " no, certainly not at all", " maybe"]
MERGING = {"share": "merge", "tau": -1.0}


def choose_on(state: ProgramState) -> dict[str, Any]:
    state += sgl.select("c", choices=CHOICES)
    assert within(120, state.error) is None
    return {"decision": state["c"], **state.get_meta_info("c")}


def chosen_after(backend: Any, text: str) -> dict[str, Any]:
    """What SGLang's own choice after a text is."""
    s = state_on(backend)
    s += text
    return choose_on(s)


def assert_same_choice(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["decision"] == expected["decision"]
    lengths = [len(one) for one in expected["input_token_logprobs"]]
    assert [len(one) for one in found["input_token_logprobs"]] == lengths
    values = expected["normalized_prompt_logprobs"]
    assert found["normalized_prompt_logprobs"] == pytest.approx(values, abs=2e-3)


def test_a_choice_is_made_on_the_branchs_own_words_where_nothing_was_merged_yet(smollm: Endpoint) -> None:
    smollm.flush_cache(30)
    group = sgl.fork_similar(state_on(smollm), [TOLD, REWORDED], **MERGING)
    for branch, text in zip(group, (TOLD, REWORDED), strict=True):
        assert_same_choice(choose_on(branch), chosen_after(smollm, text))


def merged_pair(smollm: Endpoint) -> rksc_sgl.BranchGroup:
    """Two wordings, the second of which was merged with the first and said the same."""
    smollm.flush_cache(30)
    group = sgl.fork_similar(state_on(smollm), [TOLD, REWORDED], **MERGING)
    for branch in group:
        branch += sgl.gen("a", max_tokens=8, temperature=0, ignore_eos=True)
        branch.sync()
    first, second = info_of(group[0]), info_of(group[1])
    assert (second["rksc"]["mode"], second["rksc"]["donor"]) == ("merge", first["id"])
    assert group[0]["a"] == group[1]["a"]
    return group


def test_whatever_a_merged_branch_is_asked_later_reads_the_prompt_that_it_took(smollm: Endpoint) -> None:
    group = merged_pair(smollm)
    verdict = sgl.verify_gated(group, "a", skip=SkipGate.never())
    assert verdict.scores[1] == pytest.approx(verdict.scores[0], abs=1e-4)
    inner = [sgl.fork_similar(branch, 2)[0] for branch in group]
    for one in inner:
        one += " So"
        one += sgl.gen("b", max_tokens=4, temperature=0)
    assert info_of(inner[0], "b")["prompt_tokens"] == info_of(inner[1], "b")["prompt_tokens"]
    smollm.flush_cache(30)  # nor does it hang on what the server still has
    group += " So?"
    expected = chosen_after(smollm, f"{TOLD}{group[0]['a']} So?")
    for branch in group:
        assert_same_choice(choose_on(branch), expected)
    group += sgl.gen("d", max_tokens=4, temperature=0)
    assert info_of(group[0], "d")["prompt_tokens"] == info_of(group[1], "d")["prompt_tokens"]


def test_choices_on_the_words_of_somebody_elses_prompt_are_refused_by_name(smollm: Endpoint) -> None:
    smollm.flush_cache(30)
    options = {**MERGING, "share_scope": "cache"}
    sampling = {"max_new_tokens": 1, "custom_params": {"rksc": options}}
    theirs = smollm.post_json("/generate", {"text": TOLD, "sampling_params": sampling})
    group = sgl.fork_similar(state_on(smollm), [REWORDED], **options)
    group += sgl.gen("a", max_tokens=4, ignore_eos=True)
    assert info_of(group[0])["rksc"]["donor"] == theirs["meta_info"]["id"]
    with pytest.warns(rksc_sgl.frontend.RkscDegradedWarning, match="its own wording again"):
        sgl.fork_similar(group[0], 2)
    group += sgl.select("c", choices=CHOICES)
    error = within(120, group[0].error)
    assert isinstance(error, UnsupportedBackendError) and theirs["meta_info"]["id"] in str(error)


# -- servers and backends without us -----------------------------------------------------------------------------


def test_on_a_stock_server_it_works_with_less_and_says_so(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "rksc_cpu")  # the platform stays, our plugin is not loaded
    arguments = ["--model-path", str(tiny_model), "--max-total-tokens", "20000", "--attention-backend", "torch_native"]
    arguments.append("--incremental-streaming-output")
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
        _check_streams(stock)
        with pytest.warns(rksc_sgl.frontend.RkscDegradedWarning, match="stopped from here all the same"):
            stopping = first_four_short(stock, MEANING_LESS)
        check_stopped(stopping)
        check_stopped(first_four_short(stock, MEANING_LESS, stream=True))


def _check_streams(endpoint: Endpoint) -> None:
    """What is streamed is what comes without streaming, in the branches too."""
    said = {}
    for stream in (False, True):
        s = state_on(endpoint, stream=stream)
        s += STORY
        group = sgl.fork_similar(s, 2)
        group += sgl.gen("a", max_tokens=12, ignore_eos=True, temperature=0, return_logprob=True)
        s += sgl.gen("b", max_tokens=12, ignore_eos=True, temperature=0, return_logprob=True)
        for branch, var in ((group[0], "a"), (group[1], "a"), (s, "b")):
            assert branch.error() is None
            assert branch.text() == STORY + branch[var]
            ids = [one[1] for one in branch.get_meta_info(var)["output_token_logprobs"]]
            said.setdefault(var, []).append((branch[var], ids, branch.get_meta_info(var).get("confidence")))
        assert endpoint.spell(group[0].stream_executor.backend.prompt_ids(group[0].text())) == group[0].text()
    assert len(said["b"][0][1]) == 12
    assert all(text == said["b"][0][0] and ids == said["b"][0][1] for text, ids, _ in said["a"] + said["b"])
    assert [confidence for *_, confidence in said["a"]] == pytest.approx([said["a"][0][2]] * 4, abs=1e-4)


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
        assert sgl.verify_gated(group, "a").index in (0, 1)
        assert sgl.verify_gated(group, "a", select="majority").index in (0, 1)
    with pytest.raises(UnsupportedBackendError, match="Elsewhere"):
        sgl.verify_gated(group, "a", select="score")
