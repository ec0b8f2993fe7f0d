"""One request is one fork, on a real server with a random model whose answers a grammar decides."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from rksc_sgl.server_process import ServerProcess
from tests.one_request.asking import (
    ENDLESS,
    MESSAGES,
    NUMBER,
    SEVEN,
    STORY,
    ask,
    body,
    client_of,
    counted,
    events_of,
    is_clean,
)

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_an_openai_client_gets_the_selected_answer_by_its_base_url_alone(tiny_server: ServerProcess) -> None:
    answer = client_of(tiny_server).chat.completions.create(model="m", messages=MESSAGES, max_tokens=4)
    assert answer.object == "chat.completion" and len(answer.choices) == 1
    assert answer.choices[0].message.role == "assistant"
    rksc: dict[str, Any] = answer.model_extra["rksc"]
    assert len(rksc["branches"]) == 8 and rksc["selected"] == rksc["order"][0]


def test_branches_that_agree_decide_early_and_usage_keeps_its_meaning(tiny_server: ServerProcess) -> None:
    ask(tiny_server, {"branches": 1}, regex=SEVEN)  # the prompt is cached from here on
    answer = ask(tiny_server, {"branches": 6}, regex=SEVEN).json()
    assert answer["choices"][0]["message"]["content"] == "The answer is 7."
    assert answer["choices"][0]["finish_reason"] == "stop"
    rksc, usage = answer["rksc"], answer["usage"]
    assert rksc["answer"] == "7" and rksc["decided"]["reason"] == "certain" and rksc["verified"] == []
    fates = [branch["fate"] for branch in rksc["branches"]]
    assert fates == ["finished"] * 3 + ["not_started"] * 3
    assert usage["completion_tokens"] == sum(branch["tokens"] for branch in rksc["branches"]) > 0
    assert usage["prompt_tokens"] == rksc["branches"][0]["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 2
    assert {branch["report"]["group"] for branch in rksc["branches"][:3]} == {rksc["group"]} == {answer["id"]}
    assert [branch["report"]["branch"] for branch in rksc["branches"][:3]] == [0, 1, 2]
    assert rksc["tokens"]["not_generated"] > 0


def test_a_tie_is_verified_in_place_and_costs_the_question_only(tiny_server: ServerProcess) -> None:
    verified = counted(tiny_server, op="verify")
    answer = ask(tiny_server, {"branches": 2, "early_stop": False}, regex=NUMBER).json()
    rksc = answer["rksc"]
    assert rksc["verified"] == [0, 1] and "2 answers have 1 of 2 branches each" in rksc["reason"]
    assert counted(tiny_server, op="verify") == verified + 2
    best = max(rksc["branches"], key=lambda branch: branch["score"] * branch["confidence"] ** 0.5)
    assert rksc["selected"] == best["branch"] and 0.0 < best["label_mass"] < 1.0
    assert best["answer"] in answer["choices"][0]["message"]["content"]
    question = rksc["tokens"]["verifications_computed"] / 2
    assert question < 50 < answer["usage"]["prompt_tokens"], "neither the prompt nor the answer is computed again"


def test_every_request_of_a_fork_is_counted_once(tiny_server: ServerProcess) -> None:
    before = counted(tiny_server, op="branch")
    ask(tiny_server, {"branches": 5, "early_stop": False, "verify": False}, regex=SEVEN)
    assert counted(tiny_server, op="branch") == before + 5
    assert is_clean(tiny_server)


def test_choices_come_in_the_order_of_the_selection(tiny_server: ServerProcess) -> None:
    several = ask(tiny_server, {"branches": 4, "verify": False}, n=3, regex=NUMBER).json()
    rksc = several["rksc"]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    said = [choice["message"]["content"] for choice in several["choices"]]
    assert said == [f"The answer is {_written(rksc, branch, said)}." for branch in rksc["order"][:3]]
    confidences = [rksc["branches"][branch]["confidence"] for branch in rksc["order"]]
    assert confidences == sorted(confidences, reverse=True)
    every = ask(tiny_server, {"branches": 4, "verify": False, "return": "all"}, regex=NUMBER).json()
    assert len(every["choices"]) == 4


def _written(rksc: dict[str, Any], branch: int, texts: list[str]) -> str:
    """The number of a branch as its text has it: answers lose leading zeros."""
    numbers = [re.findall("[0-9]{8}", text)[0] for text in texts]
    return next(number for number in numbers if int(number) == int(rksc["branches"][branch]["answer"]))


def test_wordings_are_branches_of_their_own(tiny_server: ServerProcess) -> None:
    wordings = [STORY + "Count them.", STORY + "How many, then?", STORY + "Say it."]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    answer = ask(tiny_server, {"branches": wordings, "early_stop": False}, regex=SEVEN, messages=turns).json()
    prompts = {branch["prompt_tokens"] for branch in answer["rksc"]["branches"]}
    assert len(answer["rksc"]["branches"]) == 3 and len(prompts) > 1 and min(prompts) > 50
    text = ask(tiny_server, {"branches": wordings}, route="completions", regex=SEVEN).json()
    assert text["choices"][0]["text"] == "The answer is 7."


def test_text_completions_are_forks_too(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, {"branches": 2, "early_stop": False}, route="completions", regex=NUMBER, echo=True).json()
    assert answer["object"] == "text_completion"
    text = answer["choices"][0]["text"]
    assert re.fullmatch(re.escape(STORY) + NUMBER, text)
    assert answer["rksc"]["verified"] == [0, 1]
    assert client_of(tiny_server).completions.create(model="m", prompt=[STORY], max_tokens=3).choices[0].text


def test_models_are_the_servers(tiny_server: ServerProcess) -> None:
    served = httpx.get(f"{tiny_server.url}/v1/models").json()["data"][0]["id"]
    client = client_of(tiny_server)
    assert [model.id for model in client.models.list()] == [served]
    assert client.models.retrieve(served).id == served


def test_options_also_come_in_the_templates_arguments_and_in_a_header(tiny_server: ServerProcess) -> None:
    arguments = {"rksc": {"branches": 3, "select": "majority"}}
    headers = {"x-rksc-fork": json.dumps({"branches": 5, "verify": False, "early_stop": False})}
    asked = body({"select": "vote"}, chat_template_kwargs=arguments, regex=SEVEN)
    url = f"{tiny_server.url}/rksc/v1/chat/completions"
    rksc = httpx.post(url, json=asked, headers=headers, timeout=60.0).json()["rksc"]
    assert len(rksc["branches"]) == 3 and rksc["reason"] == "vote: 3 of 3 branches answer alike"


WRONG = [
    ({"rksc": {"branch": 3}}, 400, "rksc.branch"),
    ({"rksc": {"branches": 65}}, 400, "rksc.branches"),
    ({"rksc": {"verify": {"labels": ["a", "b", "a"]}}}, 400, "rksc.verify.labels"),
    ({"rksc": {"verify": {"risk": 5}}}, 400, "rksc.verify.risk"),
    ({"rksc": 3}, 400, "rksc"),
    ({"n": 9}, 400, "n"),
    ({"n": 0}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 400, "rksc": {"branches": 64}, "temperature": "hot"}, 400, "temperature"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": []}, 400, None),
    ({"custom_params": {"rksc": {"group": "mine"}}}, 400, "custom_params.rksc"),
    ({"session_id": "s"}, 400, "session_id"),
    ({"extra_key": "x\x1frksc-blended"}, 400, "extra_key"),
    ({"rid": ["a"]}, 400, "rid"),
    ({"regex": "("}, 400, None),
    ({"top_p": 7}, 400, None),
    ({"lora_path": "nobody"}, 400, None),
    ({"extra_key": ["a"]}, 400, None),
    ({"cache_salt": ["a"]}, 400, None),
    ({"logit_bias": {"x": 1}}, 400, None),
    ({"stream_options": 3}, 400, "stream_options"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("wrong", "status", "param"), WRONG)
def test_an_error_has_openais_format_and_names_the_field(
    tiny_server: ServerProcess, wrong: dict[str, Any], status: int, param: str | None, stream: bool
) -> None:
    rksc = wrong.get("rksc")
    answer = ask(tiny_server, **{**wrong, "rksc": rksc, "stream": stream})
    if answer.status_code == 200:  # a branch found it, when the stream had begun
        assert stream and param is None
        (error,) = [event["error"] for event in events_of(answer.text)]
    else:
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_answers_400(tiny_server: ServerProcess, content: bytes) -> None:
    url, headers = f"{tiny_server.url}/rksc/v1/chat/completions", {"content-type": "application/json"}
    answer = httpx.post(url, content=content, headers=headers, timeout=30.0)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]
    form = httpx.post(url, content=json.dumps(body()), headers={"content-type": "text/plain"}, timeout=30.0)
    assert form.status_code == 400 and form.json()["error"]["param"] == "content-type"


def test_an_openai_client_reads_the_field_of_an_error(tiny_server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(tiny_server).chat.completions.create(
            model="m", messages=MESSAGES, extra_body={"rksc": {"share": "all"}}
        )
    assert caught.value.param == "rksc.share"
    assert "must be one of auto, exact, blend, merge" in caught.value.message


def test_a_prompt_that_is_too_long_is_the_requests_fault(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, {"branches": 2}, messages=[{"role": "user", "content": STORY * 200}])
    assert answer.status_code == 400 and "longer than" in answer.json()["error"]["message"]


def test_at_the_deadline_what_has_finished_is_returned_and_said_to_be_partial(tiny_server: ServerProcess) -> None:
    either = {"regex": r"([A-Z]\.|[a-z]{900})", "max_tokens": 1000}  # ends at once, or runs for long
    ask(tiny_server, {"branches": 2, "deadline_s": 30.0}, **either | {"max_tokens": 2})  # the grammar is compiled once
    for deadline_s in (0.5, 1.0, 2.0, 4.0):  # a busy machine takes its time, and a random model its choice
        rksc = {"branches": 12, "early_stop": False, "deadline_s": deadline_s}
        told = ask(tiny_server, rksc, **either).json()
        if told.get("rksc", {}).get("partial"):
            break
    fates = [branch["fate"] for branch in told["rksc"]["branches"]]
    assert "finished" in fates and "stopped" in fates
    assert told["rksc"]["branches"][told["rksc"]["selected"]]["fate"] == "finished"
    assert told["rksc"]["reason"].startswith(f"the deadline of {deadline_s:g} s passed")
    assert re.fullmatch(r"[A-Z]\.", told["choices"][0]["message"]["content"])
    assert is_clean(tiny_server)


def test_a_deadline_before_any_branch_finished_answers_504(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, {"branches": 2, "deadline_s": 0.3}, **ENDLESS)
    assert answer.status_code == 504
    assert answer.json()["error"]["message"] == "the deadline of 0.3 s passed, and no branch had finished"
    assert answer.json()["error"]["code"] == "deadline"
    assert is_clean(tiny_server)


def test_a_stream_says_progress_in_comments_and_then_the_answer(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, {"branches": 3}, regex=SEVEN, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    comments = [line for line in answer.text.splitlines() if line.startswith(": rksc ")]
    assert json.loads(comments[0].removeprefix(": rksc "))["tokens"] == 0
    assert json.loads(comments[-1].removeprefix(": rksc "))["finished"] >= 2
    events = events_of(answer.text)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "The answer is 7."
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == "stop" and events[-2]["rksc"]["answer"] == "7"
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0
    without = events_of(ask(tiny_server, {"branches": 2}, regex=SEVEN, stream=True).text)
    assert not any("usage" in event for event in without)


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_several_choices_stream_one_after_the_other(tiny_server: ServerProcess, route: str) -> None:
    asked = {"regex": NUMBER, "stream": True, "n": 2}
    events = events_of(ask(tiny_server, {"branches": 2, "verify": False}, route=route, **asked).text)
    texts = ["", ""]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice.get("text", "") or choice.get("delta", {}).get("content", "")
    assert all(re.fullmatch(NUMBER, text) for text in texts) and texts[0] != texts[1]
    assert [("rksc" in event) for event in events].index(True) == len(events) - 1


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_that_were_asked_for(tiny_server: ServerProcess, stream: bool) -> None:
    for asked, alternatives in (({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 2}, 2)):
        answer = ask(tiny_server, {"branches": 2, "early_stop": False}, regex=SEVEN, stream=stream, **asked)
        choices = [event["choices"][0] for event in events_of(answer.text)] if stream else answer.json()["choices"]
        tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
        assert tokens and all(len(token["top_logprobs"]) == alternatives for token in tokens)
        assert "".join(token["token"] for token in tokens).startswith("The answer is 7.")


def test_a_branchs_confidence_is_what_log_probabilities_say(tiny_server: ServerProcess) -> None:
    (scheduler,) = tiny_server.get_json("/rksc/info")["schedulers"]
    assert scheduler["confidence"]["offered"]
    rksc = {"branches": 3, "verify": False, "return": "all"}
    sampling = {"temperature": 0.8, "ignore_eos": True, "max_tokens": 20}
    told = ask(tiny_server, rksc, **sampling, logprobs=True, top_logprobs=1).json()
    said = []
    for choice in told["choices"]:
        tokens = choice["logprobs"]["content"]
        said.append(sum(math.exp(token["top_logprobs"][0]["logprob"]) for token in tokens) / len(tokens))
    order, branches = told["rksc"]["order"], told["rksc"]["branches"]
    assert [branches[branch]["confidence"] for branch in order] == pytest.approx(said, abs=1e-5)
    quiet = ask(tiny_server, rksc, **sampling).json()
    assert all(0.0 < branch["confidence"] < 1.0 for branch in quiet["rksc"]["branches"])
    assert all(choice["logprobs"] is None for choice in quiet["choices"])


def test_a_seed_does_not_make_branches_alike(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, {"branches": 3, "early_stop": False, "verify": False}, regex=NUMBER, seed=7).json()
    assert len({branch["answer"] for branch in answer["rksc"]["branches"]}) == 3


def test_a_clients_own_id_may_be_used_by_several_forks(tiny_server: ServerProcess) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask(tiny_server, {"branches": 2}, rid="mine", regex=SEVEN), range(3)))
    assert [one.json()["choices"][0]["message"]["content"] for one in answers] == ["The answer is 7."] * 3
