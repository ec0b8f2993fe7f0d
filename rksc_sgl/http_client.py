"""The one HTTP client of this package: connections are kept, everything has a time limit, and what goes wrong is a
:class:`~rksc_sgl.errors.ServerError` that says so and how to go on.
"""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import httpx

from rksc_sgl.errors import ServerRefusedError, ServerUnreachableError

CONNECT_TIMEOUT_S = 5.0
DEFAULT_TIMEOUT_S = 1800.0
# An idle connection is used again for so long. SGLang closes one after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE), which is also
# how long httpx would keep it: a request that is sent just then is lost, and may not be sent again.
KEPT_S = 2.0
OUR_ROUTES = "/rksc/"


class Connection:
    """The connection of one request, which another thread may close: the request then ends as if the server was gone.

    Closing a socket does not wake a thread that reads from it; shutting it down does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def close(self) -> None:
        """End the request, now or as soon as it has connected; nothing where it has ended already."""
        with self._lock:
            self._closed = True
            self._shut_down()

    def follow(self, event: str, info: Mapping[str, Any]) -> None:
        """What httpcore tells of a request under ``extensions["trace"]``."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
                if self._closed:
                    self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # a TLS socket's own is not for other threads


class HttpClient:
    """Talks JSON to one SGLang server; a context manager that closes its connections on the way out.

    Every method raises :class:`ServerUnreachableError` where nobody answers or the connection breaks, and
    :class:`ServerRefusedError` at an error status or an answer that is no JSON.

    Args:
        base_url: for example ``http://127.0.0.1:30000``.
        api_key: sent as a bearer token.
        verify: path of a CA bundle.
        timeout: seconds that one request may take.

    Raises:
        ServerUnreachableError: ``base_url`` is no URL.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        verify: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.base_url = base_url.rstrip("/")

        def client(kept: int) -> httpx.Client:
            return httpx.Client(
                base_url=self.base_url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                verify=tls,
                timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S)),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=kept, keepalive_expiry=KEPT_S),
                trust_env=False,
            )

        self._headers: dict[str, str] = {}
        try:
            tls = httpx.create_ssl_context(verify=verify if verify else True, trust_env=False)
            self._client = client(kept=64)
            self._for_one_request = client(kept=0)  # each of its requests has a connection of its own
        except httpx.InvalidURL as error:
            raise self._unreachable(error) from error

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._for_one_request.close()

    def with_headers(self, headers: Mapping[str, str]) -> HttpClient:
        """The same client, over the same connections, whose requests have these headers too."""
        other = copy.copy(self)
        other._headers = {**self._headers, **headers}
        return other

    def get_json(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """The answer to ``GET path``."""
        return self._json(self.request("GET", path, params=params))

    def post_json(self, path: str, body: Any, connection: Connection | None = None) -> Any:
        """The answer to ``POST path``; ``connection`` is what may be closed of it."""
        return self._json(self.request("POST", path, body=body, connection=connection))

    def stream_json(self, path: str, body: Any, connection: Connection | None = None) -> Iterator[dict[str, Any]]:
        """The events of a streamed ``POST path``; ``connection`` is what may be closed of it."""
        client, extensions = self._of(connection)
        try:
            with client.stream("POST", path, json=body, headers=self._headers, extensions=extensions) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._refusal(response)
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    payload = line[5:].strip()
                    if payload == "[DONE]":
                        return
                    event = json.loads(payload)
                    if "error" in event:
                        error = event["error"]
                        raise ServerRefusedError(
                            f"{self.base_url} refused the request: {error.get('message', error)}",
                            int(error.get("code", 400)),
                        )
                    yield event
        except httpx.RequestError as error:
            raise self._unreachable(error) from error

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        connection: Connection | None = None,
    ) -> httpx.Response:
        """The answer, which has status 200; whatever it holds."""
        client, extensions = self._of(connection)
        try:
            response = client.request(
                method, path, json=body, params=params, headers=self._headers, extensions=extensions
            )
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise self._refusal(response)
        return response

    def _of(self, connection: Connection | None) -> tuple[httpx.Client, dict[str, Any]]:
        if connection is None:
            return self._client, {}
        return self._for_one_request, {"trace": connection.follow}

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise ServerRefusedError(
                f"{self.base_url}{response.request.url.path} answered 200 with what is not JSON, so this is no SGLang "
                "server",
                200,
            ) from error

    def _unreachable(self, error: Exception) -> ServerUnreachableError:
        reason = str(error) or type(error).__name__
        return ServerUnreachableError(
            f"the SGLang server at {self.base_url} cannot be reached or went away ({reason}); "
            "is it running? `rksc serve --model-path M` starts one"
        )

    def _refusal(self, response: httpx.Response) -> ServerRefusedError:
        path, status = response.request.url.path, response.status_code
        if status == 404 and path.startswith(OUR_ROUTES):
            return ServerRefusedError(
                f"the server at {self.base_url} has no {path}: it runs without the rksc plugin, or with an older one; "
                "`rksc serve` starts one with it",
                status,
            )
        hint = "; give the server's key with --api-key, or as api_key of an Endpoint" if status in (401, 403) else ""
        return ServerRefusedError(f"{self.base_url}{path} answered {status}: {_reason(response)}{hint}", status)


def _reason(response: httpx.Response) -> Any:
    """What the server says is wrong."""
    try:
        content = response.json()
    except ValueError:
        return response.text.strip() or response.reason_phrase
    detail = content.get("error", content) if isinstance(content, dict) else content
    return detail.get("message", detail) if isinstance(detail, dict) else detail
