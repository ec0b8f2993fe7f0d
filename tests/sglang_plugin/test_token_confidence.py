"""The confidence of tokens from the server: what log-probabilities say too, for those who ask and for nobody else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import sglang as sgl
import torch
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams
from two_wordings import branch, problem, reworded

from rksc_sgl import Endpoint
from rksc_sgl.generated.streamed import StreamedAnswer
from rksc_sgl.options import CONFIDENCE, RequestOptions
from rksc_sgl.sglang_plugin.branch_state import BranchState
from rksc_sgl.sglang_plugin.passes import token_confidence
from rksc_sgl.sglang_plugin.passes.token_confidence import ConfidenceObserver, OnHost, Row, note_rows, top_probability
from tests.six_layers import Served, SixLayers, report_of, server_of

# -- on doubles --------------------------------------------------------------------------------------------------


def request(**options: Any) -> Any:
    return SimpleNamespace(rksc=BranchState(RequestOptions(**options)))


def sampling_info(rows: int, **others: Any) -> Any:
    return SimpleNamespace(grammar_mask=None, logit_bias=None, temperatures=torch.full((rows, 1), 0.5), **others)


def test_the_top_probability_is_that_of_the_softmax() -> None:
    logits, temperatures = torch.randn(5, 40) * 4, torch.rand(5, 1) + 0.2
    expected = (logits / temperatures).softmax(-1).max(-1).values
    torch.testing.assert_close(top_probability(logits, temperatures), expected)


def test_only_rows_that_ask_are_measured_and_others_ask_nothing() -> None:
    runner, observer = SimpleNamespace(sampling_observer=ConfidenceObserver()), ConfidenceObserver()
    asking = request(confidence=True)
    batch = SimpleNamespace(reqs=[SimpleNamespace(rksc=None), asking, request()], sampling_info=sampling_info(3))
    note_rows(runner, batch)
    assert observer.is_active(batch.sampling_info)
    logits = torch.randn(3, 9)
    measured = observer.before_grammar(logits, batch.sampling_info)
    assert [one.req for one in measured.rows] == [asking]
    torch.testing.assert_close(measured.values, (logits[1:2] / 0.5).softmax(-1).max(-1).values)
    none = SimpleNamespace(reqs=[request()], sampling_info=sampling_info(1))
    note_rows(runner, none)
    assert not observer.is_active(none.sampling_info)


def test_what_cannot_be_sampled_is_not_counted_and_the_logits_stay_as_they_are() -> None:
    info = sampling_info(2, **{token_confidence.ROWS: (Row(0, request()), Row(1, request()))})
    info.grammar_mask = SimpleNamespace(apply=lambda logits: logits[:, :4].fill_(-math.inf))
    info.logit_bias = torch.zeros(2, 9).index_fill(1, torch.tensor([5]), 3.0)
    logits = torch.randn(2, 9)
    before = logits.clone()
    measured = ConfidenceObserver().before_grammar(logits, info)
    seen = before + info.logit_bias
    seen[:, :4] = -math.inf
    torch.testing.assert_close(measured.values, (seen / 0.5).softmax(-1).max(-1).values)
    torch.testing.assert_close(logits, before)


def test_only_tokens_that_a_request_really_got_are_kept_wherever_it_is_in_the_batch_by_then() -> None:
    chunk, first, second = (request(confidence=True) for _ in range(3))
    host = OnHost((Row(0, chunk), Row(1, first), Row(2, second)), torch.tensor([0.1, 0.2, 0.3]))
    commit = [SimpleNamespace(output_index=index) for index in (0, 2)]
    host.consume(SimpleNamespace(reqs=[second, chunk, first]), [commit[1], None, commit[0]])
    assert chunk.rksc.confidences == []
    assert first.rksc.confidences == pytest.approx([0.2])
    assert second.rksc.confidences == [None, None, pytest.approx(0.3)]


def test_a_token_that_was_taken_back_is_measured_anew_and_each_is_told_once() -> None:
    state = BranchState(RequestOptions(confidence=True))
    for index, value in enumerate((0.1, 0.2, 0.3)):
        state.note_confidence(index, value)
    assert state.confidences_until(2) == [0.1, 0.2]
    state.note_confidence(2, 0.9)
    assert state.confidences_until(4) == [0.9, None]
    assert state.confidences_until(4) == []


class Scheduler:
    """As much of SGLang's as decides whether confidence is measured."""

    def __init__(self, **facts: Any) -> None:
        self.spec_algorithm = SimpleNamespace(is_none=lambda: not facts.get("speculative"))
        self.server_args = SimpleNamespace(
            enable_pdmux=facts.get("pdmux", False), enable_dp_attention=facts.get("dp_attention", False)
        )
        self.disaggregation_mode = SimpleNamespace(value=facts.get("disaggregation", "null"))
        self.rust_server = facts.get("rust_server")
        runner = SimpleNamespace(
            sampling_observer=facts.get("observer"), supports_sampling_observer=lambda: facts.get("supported", True)
        )
        self.tp_worker = SimpleNamespace(model_runner=runner)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"speculative": True}, "speculative decoding"),
        ({"pp": 2}, "pipeline parallelism"),
        ({"pdmux": True}, "PD multiplexing"),
        ({"disaggregation": "decode"}, "disaggregation"),
        ({"dp_attention": True}, "data-parallel attention"),
        ({"rust_server": object()}, "Rust front end"),
        ({"supported": False}, "this way of sampling"),
        ({"observer": object()}, "a sampling observer of somebody else"),
        ({}, ""),
    ],
)
def test_where_it_cannot_be_measured_it_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], named: str
) -> None:
    import sglang.srt.runtime_context as context

    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(pp_size=facts.get("pp", 1)))
    scheduler = Scheduler(**facts)
    refusal = token_confidence.install(scheduler)
    assert named in refusal and bool(named) == bool(refusal)
    assert token_confidence.described(scheduler) == {"offered": not named, "refusal": refusal}
    observer = scheduler.tp_worker.model_runner.sampling_observer
    assert isinstance(observer, ConfidenceObserver) == (not named), "a second look installs nothing"


# -- on servers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retracting(six_layers: SixLayers) -> Iterator[Served]:
    """Prompts take several passes, requests are retracted while they decode, and streams say only what is new."""
    flags = ("--chunked-prefill-size", "64", "--incremental-streaming-output", "--page-size", "16")
    variables = {
        "XDG_CACHE_HOME": str(six_layers.cache()),
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": "4",
    }
    with server_of(six_layers.path, *flags, tokens=4000, variables=variables) as process:
        yield Served.of(process, six_layers.path)


def top_of(answer: dict[str, Any]) -> list[float]:
    """The same from log-probabilities."""
    return [math.exp(alternatives[0][0]) for alternatives in answer["meta_info"]["output_top_logprobs"]]


def asked(served: Served, prompt: str, tokens: int = 12, **sampling: Any) -> dict[str, Any]:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"rksc": {"confidence": True}}, **sampling}
    body = {"input_ids": served.ids(prompt), "sampling_params": params, "return_logprob": True, "top_logprobs_num": 1}
    answer = served.post(body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.server
@pytest.mark.slow
class TestOnAServer:
    @pytest.mark.parametrize(
        "sampling",
        [
            {"temperature": 0},
            {"temperature": 1.0},
            {"temperature": 0.6, "top_p": 0.8, "top_k": 20},
            {"temperature": 1.0, "frequency_penalty": 1.0, "logit_bias": {"77": 4.0}},
            {"temperature": 1.0, "regex": r"The answer is [0-9]+\.", "ignore_eos": False},
        ],
    )
    def test_it_is_what_log_probabilities_say_of_every_token(self, served: Served, sampling: dict[str, Any]) -> None:
        answer = asked(served, problem(51), **sampling)
        found = answer["meta_info"][CONFIDENCE]
        assert len(found) == answer["meta_info"]["completion_tokens"] > 4
        assert found == pytest.approx(top_of(answer), abs=1e-5)

    def test_neighbours_that_do_not_ask_are_told_nothing(self, served: Served) -> None:
        prompts = [problem(seed) for seed in (52, 53, 54)]
        others = served.ask_together(prompts, [None, None, {}], 8)
        beside = served.ask_together(prompts, [{"confidence": True}, None, {}], 8)
        assert len(beside[0]["meta_info"][CONFIDENCE]) == 8
        for before, after in zip(others[1:], beside[1:], strict=True):
            assert set(after["meta_info"]) == set(before["meta_info"])
            assert after["output_ids"] == before["output_ids"]
        assert CONFIDENCE not in beside[1]["meta_info"] and CONFIDENCE not in beside[2]["meta_info"]

    def test_a_branch_that_reads_another_prompt_is_measured_too(self, served: Served) -> None:
        text = problem(55)
        served.ask(text, branch("measured", 0))
        answer = served.ask(reworded(text), branch("measured", 1, confidence=True), 6)
        assert report_of(answer)["mode"] == "merge"
        assert answer["meta_info"][CONFIDENCE] == pytest.approx(top_of(answer), abs=1e-5)

    def test_several_continuations_have_a_list_each(self, served: Served) -> None:
        params = {"max_new_tokens": 5, "n": 2, "temperature": 1.0, "custom_params": {"rksc": {"confidence": True}}}
        body = {"text": problem(56), "return_logprob": True, "top_logprobs_num": 1}
        answers = served.post({**body, "sampling_params": {**params, "ignore_eos": True}}).json()
        for answer in answers:
            assert answer["meta_info"][CONFIDENCE] == pytest.approx(top_of(answer), abs=1e-5)

    @pytest.mark.parametrize("aborted", [False, True])
    def test_each_event_of_a_stream_has_all_of_its_tokens(self, served: Served, aborted: bool) -> None:
        params = {"max_new_tokens": 600 if aborted else 20, "temperature": 1.0, "ignore_eos": True}
        params["custom_params"] = {"rksc": {"confidence": True, "group": "streamed", "branch": 0}}
        body = {"text": problem(57), "sampling_params": params, "stream": True, "rid": f"streamed {aborted}"}
        with httpx.stream("POST", f"{served.process.url}/generate", json=body, timeout=60.0) as response:
            lines = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
            events = [next(lines)]
            if aborted:
                served.abort(body["rid"])
            events += lines
        assert events[-1]["meta_info"]["finish_reason"]["type"] == ("abort" if aborted else "length")
        for event in events:
            assert len(event["meta_info"][CONFIDENCE]) == event["meta_info"]["completion_tokens"]

    def test_the_frontend_asks_for_no_log_probabilities(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        endpoint, bodies = Endpoint(served.process.url), []
        post = Endpoint.post_json

        def seen(self: Endpoint, path: str, body: Any, *rest: Any) -> Any:
            bodies.append(body)
            return post(self, path, body, *rest)

        monkeypatch.setattr(Endpoint, "post_json", seen)
        state = ProgramState(StreamExecutor(endpoint, {}, SglSamplingParams(temperature=1.0), None, False))
        state += problem(58)
        group = sgl.fork_similar(state, 2)
        group[0] += sgl.gen("a", max_tokens=8, ignore_eos=True)
        group[1] += sgl.gen("a", max_tokens=8, ignore_eos=True, return_logprob=True, top_logprobs_num=1)
        infos = [one.get_meta_info("a") for one in group]
        asked_for = [body.get("return_logprob") for body in bodies if body.get("sampling_params", {}).get("ignore_eos")]
        assert sorted(map(bool, asked_for)) == [False, True]
        assert CONFIDENCE not in infos[0] and "output_top_logprobs" not in infos[0]
        assert 0 < infos[0]["confidence"] <= 1
        assert infos[1]["confidence"] == pytest.approx(sum(top_of({"meta_info": infos[1]})) / 8, abs=1e-5)
        state.stream_executor.end()


@pytest.mark.server
@pytest.mark.slow
class TestOnOtherServers:
    def test_it_is_the_same_however_the_model_is_served(self, variant: Served) -> None:
        answer = asked(variant, problem(59, sentences=10), temperature=0.8)
        assert answer["meta_info"][CONFIDENCE] == pytest.approx(top_of(answer), abs=1e-5)

    def test_every_token_of_a_request_that_is_retracted_has_its_confidence(self, retracting: Served) -> None:
        prompts = [problem(seed, sentences=14) for seed in (61, 62, 63, 64)]
        answers = retracting.ask_together(prompts, [{"confidence": True}] * 4, 24)
        assert any(answer["meta_info"].get("num_retractions") for answer in answers)
        for answer in answers:
            assert answer["meta_info"][CONFIDENCE] == pytest.approx(top_of(answer), abs=1e-4)

    def test_a_stream_that_says_only_what_is_new_adds_up(self, retracting: Served) -> None:
        params = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
        params["custom_params"] = {"rksc": {"confidence": True}}
        body = {"text": problem(65), "sampling_params": params, "stream": True}
        body |= {"return_logprob": True, "top_logprobs_num": 1}
        whole, events = StreamedAnswer(incremental=True), 0
        with httpx.stream("POST", f"{retracting.process.url}/generate", json=body, timeout=60.0) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    events += 1
                    assert len(event["meta_info"][CONFIDENCE]) == len(event["output_ids"])
                    whole.add(event)
        assert events > 2
        assert whole.response["meta_info"][CONFIDENCE] == pytest.approx(top_of(whole.response), abs=1e-4)
