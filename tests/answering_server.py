"""A server that answers every request alike, and remembers them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

from tests.serving import serving


class Answering:
    """
    Attributes:
        url: of the server.
        asked: path and ``Authorization`` of each request.
        keys: its ``x-smg-routing-key``.
    """

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.asked: list[tuple[str, str | None]] = []
        self.keys: list[str | None] = []
        answering = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answering.asked.append((self.path, self.headers.get("Authorization")))
                answering.keys.append(self.headers.get("x-smg-routing-key"))
                self.send_response(answering.status)
                self.end_headers()
                self.wfile.write(answering.body)

            do_POST = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answers(self, status: int, body: object) -> str:
        """Answer like this from now on; the URL."""
        self.status, self.body = status, body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.url


@contextmanager
def answering() -> Iterator[Answering]:
    one = Answering()
    with serving(one.server):
        yield one
