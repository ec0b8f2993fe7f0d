"""What tests of ``/rksc/v1`` ask, and look at."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

from rksc_sgl import metrics
from rksc_sgl.server_process import ServerProcess

STORY = "A farmer has 12 cows and sells 5 of them on Monday. How many cows are left? " * 4
MESSAGES: list[Any] = [{"role": "user", "content": STORY}]
NUMBER = r"The answer is [0-9]{8}\."  # no two branches say the same
SEVEN = r"The answer is 7\."
ENDLESS = {"ignore_eos": True, "max_tokens": 1500}  # runs for seconds; a grammar would be compiled by each branch


def client_of(server: ServerProcess, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/rksc/v1", api_key=key, max_retries=0, timeout=120.0)


def ask(server: ServerProcess, rksc: Any = None, *, route: str = "chat/completions", **fields: Any) -> httpx.Response:
    """The answer to one request."""
    return httpx.post(f"{server.url}/rksc/v1/{route}", json=body(rksc, route=route, **fields), timeout=120.0)


def body(rksc: Any = None, *, route: str = "chat/completions", **fields: Any) -> dict[str, Any]:
    prompt = {"messages": MESSAGES} if "chat" in route else {"prompt": STORY}
    ours = {} if rksc is None else {"rksc": rksc}
    return {"model": "m", "max_tokens": 40, **prompt, **ours, **fields}


@contextmanager
def asking(server: ServerProcess, rksc: Any, key: str = "none", **fields: Any) -> Iterator[None]:
    """A request was sent; leaving the block closes its connection."""
    address = urlsplit(server.url)
    payload = json.dumps(body(rksc, **fields)).encode()
    head = (
        f"POST /rksc/v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=60.0) as connection:
        connection.sendall(head.encode() + payload)
        yield


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def stats(server: ServerProcess) -> dict[str, Any]:
    (scheduler,) = server.get_json("/rksc/stats")["schedulers"]
    return scheduler


def counted(server: ServerProcess, **labels: str) -> int:
    """Requests that the scheduler has counted, by their labels."""
    series = stats(server)["counters"][metrics.REQUESTS]
    return int(sum(one["value"] for one in series if labels.items() <= one["labels"].items()))


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.05)


def in_flight(server: ServerProcess) -> int:
    """Requests that run or wait in the scheduler."""
    return sum(stats(server)["requests"].values())


def is_clean(server: ServerProcess) -> bool:
    """Whether nothing runs or waits, and every slot is free, in the tree, or leased to forks of other tests."""
    now = stats(server)
    pool, tree, leased = now["pool"], now["tree"], now["memory"]["leased_tokens"]
    kept = pool["full_available_size"] + tree["evictable_tokens"] + leased
    idle = not any(now["requests"].values()) and pool["full_num_used"] == tree["protected_tokens"] == leased
    return idle and kept == pool["full_capacity"]
