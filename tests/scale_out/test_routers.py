"""Real routers before two tiny servers: what a fork is behind them, by one request and by a client of its own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState

import rksc_sgl
from benchmarks.router_process import MODULES, RouterProcess, is_installed
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from tests.one_request.asking import MESSAGES, SEVEN, body, counted, events_of, eventually, in_flight, is_clean

pytestmark = [pytest.mark.server, pytest.mark.slow]

TINY = ("--max-total-tokens", "20000", "--max-running-requests", "32")

FORK = {"branches": 6, "early_stop": False, "verify": False}


@pytest.fixture(scope="module")
def workers(tiny_server: ServerProcess, tiny_model: Path) -> Iterator[list[ServerProcess]]:
    """Two servers, of which the second may be ended."""
    with ServerProcess(server_arguments(["--model-path", str(tiny_model), *TINY])) as second:
        yield [tiny_server, second]


@pytest.fixture(scope="module", params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed; it is in the extra dev")
    return request.param


@pytest.fixture(scope="module")
def router(workers: list[ServerProcess], module: str) -> Iterator[RouterProcess]:
    """One that sends a prompt where its beginning was sent before."""
    with RouterProcess([worker.url for worker in workers], "cache_aware", module=module) as process:
        yield process


@pytest.fixture(scope="module")
def sticky(workers: list[ServerProcess], tiny_model: Path, module: str) -> Iterator[RouterProcess]:
    """One that keeps a routing key on a worker, and gives a new key to any; programs need its tokenizer."""
    flags = ("--tokenizer-path", str(tiny_model))
    with RouterProcess([worker.url for worker in workers], "manual", *flags, module=module) as process:
        yield process


def post(url: str, route: str, asked: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/{route}", json=named(url, asked), headers=headers, timeout=120.0, trust_env=False)


def named(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The request with the name of the model that is there: smg knows no other."""
    models = httpx.get(f"{url}/v1/models", timeout=30.0, trust_env=False).json()
    return {**asked, "model": models["data"][0]["id"]}


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A fork, as a router lets it through."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": 40, "chat_template_kwargs": {"rksc": FORK}, **fields}


def by_worker(workers: list[ServerProcess], **labels: str) -> list[int]:
    return [counted(worker, **labels) for worker in workers]


def grown(workers: list[ServerProcess], before: list[int], **labels: str) -> list[int]:
    """How many more requests of a fork each worker has answered."""
    return [now - then for now, then in zip(by_worker(workers, **labels), before, strict=True)]


def test_a_fork_of_one_request_is_on_one_worker(workers: list[ServerProcess], router: RouterProcess) -> None:
    for route, asked in (
        ("chat/completions", chat("How many cows are left?", regex=SEVEN)),
        ("completions", {"prompt": "How many?", "max_tokens": 40, "regex": SEVEN, "rksc": FORK}),
    ):
        before = by_worker(workers, op="branch")
        answer = post(router.url, route, asked).json()
        assert len(answer["rksc"]["branches"]) == 6
        assert sorted(grown(workers, before, op="branch")) == [0, 6]


def test_a_stream_comes_through_with_its_comments(router: RouterProcess) -> None:
    answer = post(router.url, "chat/completions", chat("How many?", regex=SEVEN, stream=True))
    assert ": rksc " in answer.text
    events = events_of(answer.text)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "The answer is 7."


def test_forks_of_one_prefix_go_where_it_is_cached(workers: list[ServerProcess], router: RouterProcess) -> None:
    for turn in range(2):
        text = f"Text {turn} of {router.router}. A farmer has 12 cows and sells 5 of them on Monday. " * 8
        before = by_worker(workers, op="branch")
        asked = [chat(f"{text} Question {index}?", regex=SEVEN) for index in range(4)]
        told = [post(router.url, "chat/completions", one).json()["rksc"]["tokens"] for one in asked]
        assert sorted(grown(workers, before, op="branch")) == [0, 24]
        computed = [one["prompts_computed"] for one in told]
        assert max(computed[1:]) < computed[0] / 2, computed


def test_a_request_that_asks_for_no_fork_is_sglangs(router: RouterProcess) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 20, "regex": SEVEN}
    answer = post(router.url, "chat/completions", asked).json()
    assert "rksc" not in answer and answer["choices"][0]["message"]["content"] == "The answer is 7."


def test_what_is_wrong_is_said_through_the_router(router: RouterProcess) -> None:
    answer = post(router.url, "chat/completions", {**chat("?"), "chat_template_kwargs": {"rksc": {"branches": 0}}})
    assert answer.status_code == 400 and "rksc.branches: must be 1 to" in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_router_ends_its_fork(
    workers: list[ServerProcess], router: RouterProcess, stream: bool
) -> None:
    asked = named(router.url, chat("Go on for ever.", max_tokens=1500, ignore_eos=True, stream=stream))
    address = urlsplit(router.url)
    payload = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    eventually(lambda: all(map(is_clean, workers)))
    before = sum(by_worker(workers, op="branch", reason="aborted"))
    with socket.create_connection((address.hostname, address.port), timeout=60.0) as connection:
        connection.sendall(head.encode() + payload)
        eventually(lambda: sum(map(in_flight, workers)) >= 6)
    eventually(lambda: all(map(is_clean, workers)))
    assert sum(by_worker(workers, op="branch", reason="aborted")) == before + 6


def test_branches_that_a_client_drives_stay_together_by_their_key(
    workers: list[ServerProcess], sticky: RouterProcess
) -> None:
    """Any client: the key is a header."""
    homes: set[int] = set()
    for group in map(str, range(20)):
        if len(homes) == 2:
            break
        before = by_worker(workers, op="branch")
        for branch in range(4):
            own = {"rksc": {"group": f"{group} of {sticky.router}", "branch": branch, "branches": 4}}
            asked = {**body(route="completions"), "max_tokens": 4, "custom_params": own}
            assert post(sticky.url, "completions", asked, **{"x-smg-routing-key": group}).status_code == 200
        new = grown(workers, before, op="branch")
        assert sorted(new) == [0, 4]
        homes.add(new.index(4))
    assert homes == {0, 1}, "keys are spread"


def test_fork_similar_sends_a_key_with_every_request(workers: list[ServerProcess], sticky: RouterProcess) -> None:
    if sticky.router == "sglang_router":
        pytest.skip("sglang-router drops custom_params on /generate: workers are not told of the fork")
    for _ in range(2):
        before = {op: by_worker(workers, op=op) for op in ("branch", "verify")}
        verdict = fork_and_verify(sticky.url)
        new = {op: grown(workers, before[op], op=op) for op in before}
        assert min(new["branch"]) == 0 and max(new["branch"]) >= 4 + 2 and sorted(new["verify"]) == [0, 4], new
        assert new["branch"].index(0) == new["verify"].index(0)
        assert all(report["op"] == "verify" for report in verdict.reports), verdict.reports


def fork_and_verify(url: str) -> Any:
    """Four branches, all verified, and two more of the first of them."""
    endpoint = rksc_sgl.Endpoint(url, chat_template_name="chatml")
    kept: dict[str, Any] = {}

    @sgl.function
    def program(s: ProgramState) -> None:
        s += sgl.user("How many cows are left? " * 8)
        branches = rksc_sgl.fork_similar(s, 4)
        branches += sgl.assistant(sgl.gen("answer", max_tokens=8, ignore_eos=True))
        kept["verdict"] = rksc_sgl.verify_gated(branches, "answer", select="score", skip=rksc_sgl.SkipGate.never())
        nested = rksc_sgl.fork_similar(branches[0], 2)
        nested += sgl.gen("more", max_tokens=4, ignore_eos=True)
        kept["texts"] = [branch["more"] for branch in nested]

    state = program.run(backend=endpoint)
    assert state.error() is None and len(kept["texts"]) == 2
    return kept["verdict"]


def test_a_worker_that_dies_fails_its_fork_clearly_and_the_next_goes_elsewhere(workers: list[ServerProcess]) -> None:
    """Last, for the second worker does not come back."""
    routers = [module for module in MODULES if is_installed(module)]
    if not routers:
        pytest.skip("no router is installed; they are in the extra dev")
    with ExitStack() as stack:
        urls = [worker.url for worker in workers]
        started = [stack.enter_context(RouterProcess(urls, "round_robin", module=one)) for one in routers]
        # Routers take turns in the order of arrival: the second stream is asked for once the first has said something.
        streamed = [[Call.that_streams(router.url) for _ in urls] for router in started]
        calls = [
            [*streams, *(Call(router.url) for _ in urls)] for router, streams in zip(started, streamed, strict=True)
        ]
        eventually(lambda: all(in_flight(worker) >= 6 for worker in workers))
        workers[1].stop(0.0)
        for router, of_router in zip(started, calls, strict=True):
            for turn in range(3):
                answer = post(router.url, "chat/completions", chat(f"And now, {turn}?", regex=SEVEN))
                assert answer.status_code == 200 and "The answer is 7." in answer.text
            streams, answers = [call.said() for call in of_router[:2]], [call.said() for call in of_router[2:]]
            broken = [text for text in streams if "finish_reason" not in text]
            assert len(broken) == 1, streams
            assert "stream_error" in broken[0] or "broke: RemoteProtocolError" in broken[0]
            # The router asks the other worker where nothing was answered yet.
            assert all(len(json.loads(text)["rksc"]["branches"]) == 6 for text in answers), answers
    eventually(lambda: is_clean(workers[0]))


class Call:
    """A fork that takes some seconds, asked for in a thread."""

    def __init__(self, url: str, *, stream: bool = False) -> None:
        self._text = ""
        self._asked = chat("Go on.", max_tokens=400, ignore_eos=True, stream=stream)
        self._thread = threading.Thread(target=self._ask, args=(url,), daemon=True)
        self._thread.start()

    @classmethod
    def that_streams(cls, url: str) -> Call:
        """One that is with a worker, which has said something."""
        call = cls(url, stream=True)
        eventually(lambda: bool(call._text))
        return call

    def _ask(self, url: str) -> None:
        try:
            asked = named(url, self._asked)
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=120.0) as answer:
                for text in answer.iter_text():
                    self._text += text
        except httpx.HTTPError as error:
            self._text += f"broke: {error!r}"

    def said(self) -> str:
        self._thread.join(60.0)
        assert not self._thread.is_alive()
        return self._text
