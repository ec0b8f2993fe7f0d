"""A server that speaks as much of SGLang's API as a fork that is stopped needs, and aborts when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.serving import serving

ENDED = {"type": "abort", "message": "Aborted"}


class Aborting:
    """Generations of at most ``SHORT`` tokens are answered at once; longer ones when they are aborted.

    Attributes:
        url: of the server.
        deaf: how many aborts are ignored first, as SGLang ignores those that overtake their request.
        refuses: every abort is answered 401.
        together: the first so many aborts are answered when all of them are there.
        aborts: the ids that were asked to be ended, in order.
        generations: the ids of what was generated.
    """

    SHORT = 16

    def __init__(self, *, deaf: int = 0, refuses: bool = False, together: int = 1) -> None:
        self.deaf, self.refuses, self.together = deaf, refuses, together
        self.came_together = threading.Event()
        self.aborts: list[str] = []
        self.generations: list[str] = []
        self.over = threading.Event()  # lets everything go that still waits
        self._ended: dict[str, threading.Event] = {}
        aborting = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                known = self.path == "/model_info"
                self._say(200 if known else 404, {"model_path": "scripted", "served_model_name": "scripted"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._say(*aborting.answer(self.path, body))

            def _say(self, status: int, body: Any) -> None:
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/abort_request":
            self.aborts.append(body["rid"])
            if len(self.aborts) >= self.together:
                self.came_together.set()
            self.came_together.wait(20)
            if self.refuses:
                return 401, {"error": "Unauthorized"}
            if len(self.aborts) > self.deaf:
                self._ended.setdefault(body["rid"], threading.Event()).set()
            return 200, {}
        if path in ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"):
            return 200, {"tokens": [1], "text": "7"}
        most = body["sampling_params"]["max_new_tokens"]
        if not most:
            return 200, {"text": "", "meta_info": {}}
        rid = body.get("rid", "")
        self.generations.append(rid)
        finish, tokens = {"type": "stop"}, 1
        if most > self.SHORT:
            ended = self._ended.setdefault(rid, threading.Event())
            while not ended.wait(0.05) and not self.over.is_set():
                pass
            finish, tokens = ENDED, 5
        meta_info = {"id": rid, "finish_reason": finish, "completion_tokens": tokens, "prompt_tokens": 1}
        return 200, {"text": "7", "output_ids": [1] * tokens, "meta_info": meta_info}


@contextmanager
def aborting(**options: Any) -> Iterator[Aborting]:
    one = Aborting(**options)
    with serving(one.server, one.over.set):
        yield one
