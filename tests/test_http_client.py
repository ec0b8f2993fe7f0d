"""What becomes of a server's answers, and of none."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rksc_sgl import http_client
from rksc_sgl.errors import ServerRefusedError, ServerUnreachableError
from rksc_sgl.http_client import Connection, HttpClient
from rksc_sgl.server_process import free_port
from tests.answering_server import Answering, answering
from tests.serving import serving

WAYS: dict[str, Callable[[HttpClient, str], Any]] = {
    "get": lambda client, path: client.get_json(path),
    "post": lambda client, path: client.post_json(path, {}),
    "stream": lambda client, path: list(client.stream_json(path, {})),
    "request": lambda client, path: client.request("POST", path),
}
every_way = pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS)


@pytest.fixture
def server() -> Iterator[Answering]:
    with answering() as one:
        yield one


def test_json_goes_both_ways_with_parameters_and_key(server: Answering) -> None:
    with HttpClient(server.answers(200, {"a": 1}) + "/", "k") as client:
        assert client.get_json("/x", {"depth": 3}) == client.post_json("/y", {"b": 2}) == {"a": 1}
    assert server.asked == [("/x?depth=3", "Bearer k"), ("/y", "Bearer k")]


@every_way
def test_headers_go_with_every_request_of_who_has_them(
    server: Answering, ask: Callable[[HttpClient, str], Any]
) -> None:
    with HttpClient(server.answers(200, {}), "k") as client:
        ask(client.with_headers({"x-smg-routing-key": "fork"}), "/x")
        ask(client, "/x")
    assert server.keys == ["fork", None] and server.asked == [("/x", "Bearer k")] * 2


@every_way
@pytest.mark.parametrize(
    ("path", "status", "body", "said"),
    [
        (
            "/rksc/info",
            404,
            {"detail": "Not Found"},
            "runs without the rksc plugin, or with an older one; `rksc serve`",
        ),
        ("/nowhere", 404, {"detail": "Not Found"}, "/nowhere answered 404: "),
        ("/generate", 400, {"error": {"message": "rksc.tau: must be a number"}}, "answered 400: rksc.tau: must be"),
        (
            "/generate",
            401,
            {"error": "Unauthorized"},
            "answered 401: Unauthorized; give the server's key with --api-key",
        ),
        ("/generate", 403, b"Forbidden", "answered 403: Forbidden; give the server's key with --api-key"),
        ("/generate", 500, b"Internal Server Error", "answered 500: Internal Server Error"),
        ("/generate", 503, b"", "answered 503: Service Unavailable"),
    ],
)
def test_an_error_status_is_told_with_what_to_do(
    server: Answering, ask: Callable[[HttpClient, str], Any], path: str, status: int, body: object, said: str
) -> None:
    with HttpClient(server.answers(status, body)) as client, pytest.raises(ServerRefusedError) as caught:
        ask(client, path)
    assert caught.value.status == status
    assert said in str(caught.value) and server.url in str(caught.value)


@every_way
@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "nonsense", "http://["])
def test_where_nobody_answers_the_error_says_how_to_start_a_server(
    ask: Callable[[HttpClient, str], Any], url: str
) -> None:
    with pytest.raises(ServerUnreachableError, match=r"cannot be reached or went away.*`rksc serve --model-path M`"):
        ask(HttpClient(url.format(port=free_port())), "/generate")


@pytest.mark.parametrize("way", ["get", "post"])
def test_what_is_no_json_is_of_no_sglang_server(server: Answering, way: str) -> None:
    with pytest.raises(ServerRefusedError, match="not JSON, so this is no SGLang server"):
        WAYS[way](HttpClient(server.answers(200, b"<html>")), "/model_info")


def test_events_are_streamed_until_they_are_done_or_one_is_an_error(server: Answering) -> None:
    events = b'data: {"text": "a"}\n\ndata: {"text": "ab"}\n\n'
    client = HttpClient(server.answers(200, events + b'data: [DONE]\n\ndata: {"text": "never"}\n\n'))
    assert [event["text"] for event in client.stream_json("/generate", {})] == ["a", "ab"]
    server.answers(200, events + b'data: {"error": {"message": "too long", "code": 413}}\n\n')
    stream = client.stream_json("/generate", {})
    assert [next(stream)["text"], next(stream)["text"]] == ["a", "ab"]
    with pytest.raises(ServerRefusedError, match="too long") as caught:
        next(stream)
    assert caught.value.status == 413


@pytest.mark.parametrize("way", ["post", "stream"])
@pytest.mark.parametrize("when", ["before it connects", "while it waits"])
def test_a_request_whose_connection_is_closed_ends_at_once(way: str, when: str) -> None:
    connection = Connection()
    ask = {"post": HttpClient.post_json, "stream": lambda *given: list(HttpClient.stream_json(*given))}[way]
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        client = HttpClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
        if when == "before it connects":
            connection.close()
        answer = pool.submit(ask, client, "/generate", {}, connection)
        peer, _ = silent.accept()
        with peer:
            if when == "while it waits":
                assert peer.recv(4)
                connection.close()
            with pytest.raises(ServerUnreachableError):
                answer.result(20)


def test_a_connection_may_be_closed_after_its_request(server: Answering) -> None:
    with HttpClient(server.answers(200, {"a": 1})) as client:
        connection = Connection()
        assert client.post_json("/x", {}, connection) == {"a": 1}
        connection.close()
        assert client.post_json("/x", {}) == client.post_json("/x", {}, Connection()) == {"a": 1}


def test_an_idle_connection_is_left_before_the_server_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request on a connection that the server just closed is lost; SGLang closes what was idle for 5 s."""
    from sglang.srt.environ import envs

    assert envs.SGLANG_TIMEOUT_KEEP_ALIVE.default > 2 * http_client.KEPT_S
    monkeypatch.setattr(http_client, "KEPT_S", 0.3)
    connections: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.append(self.client_address)

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serving(server), HttpClient(f"http://127.0.0.1:{server.server_port}") as client:
        client.get_json("/")
        client.get_json("/")
        assert len(connections) == 1, "one that was just used is used again"
        time.sleep(0.5)
        client.get_json("/")
        assert len(connections) == 2
