"""Forks behind a router: prompt tokens that two workers compute, and time, by how a client asks.

    python -m benchmarks.routing --model-path smollm2-135m-instruct     (or --quick)

Two servers of ours and the router ``smg`` before them. Equal forks (the same chats, the same number of branches and
tokens, each branch verified) are asked for in three ways, each on flushed caches and with a fresh router:

* ``one_request``: each fork is one request on ``/v1/chat/completions``; policy ``cache_aware``.
* ``keyed``: the client drives each fork with ``fork_similar`` and ``verify_gated``, which send a routing key; policy
  ``manual``, which keeps a key on one worker.
* ``round_robin``: plain requests, one a branch, and one more for its verification, which repeats the chat; policy
  ``round_robin``.

Each way has ``--turns`` turns, and which begins alternates; the noise of a way is its slowest turn over its fastest.
Several forks share a context, as questions on one document do. What was computed is read from the workers' counters;
its fraction is of the prompt tokens of the plain requests, which without any cache would all be computed. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import sglang as sgl
from sglang.lang.interpreter import ProgramState

import rksc_sgl
from benchmarks.router_process import RouterProcess
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import resolve_model
from rksc_sgl.proof.texts import NOTES
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model
from rksc_sgl.verifying.question import question_with_labels

SYSTEM = "You answer questions on a text."
QUESTIONS = (
    "Who keeps the light, and what must he hand in?",
    "Which basin is the deepest?",
    "Where are the papers kept?",
    "How does one cross to Ostrow?",
)
LABELS = ("YES", "NO")


@dataclass(frozen=True)
class Counted:
    """Of one way to ask.

    Attributes:
        asked: prompt tokens of all requests, cached or not.
        computed: those that were not found cached.
        seconds: until the last fork was answered.
        by_worker: computed tokens of each.
    """

    asked: int
    computed: int
    seconds: float
    by_worker: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What every way has to do.

    Attributes:
        chats: system text and user's turn of each fork.
        branches: of a fork.
        tokens: that each branch generates.
        at_once: forks under way.
    """

    chats: tuple[str, ...]
    branches: int
    tokens: int
    at_once: int


def chats(forks: int, contexts: int) -> tuple[str, ...]:
    """Questions on texts, those on one text not next to each other."""
    paragraphs = NOTES.strip().split("\n\n")
    texts = []
    for index in range(contexts):
        turned = [paragraphs[(index + place) % len(paragraphs)] for place in range(3)]
        texts.append(f"Notebook {index + 1}.\n\n" + "\n\n".join(turned))
    return tuple(
        f"{texts[index % contexts]}\n\n{QUESTIONS[(index // contexts) % len(QUESTIONS)]}" for index in range(forks)
    )


def one_request(url: str, work: Work) -> None:
    """Each fork a request."""

    def ask(chat: str) -> None:
        rksc = {"branches": work.branches, "select": "score", "early_stop": False, "verify": {"exit": "off"}}
        body = {**_body(chat, work), "chat_template_kwargs": {"rksc": rksc}}
        answer = _post(url, body)
        assert len(answer["rksc"]["verified"]) == work.branches, answer["rksc"]["reason"]

    _each(ask, work)


def keyed(url: str, work: Work) -> None:
    """The client drives each fork, and its requests have the fork's key."""
    endpoint = rksc_sgl.Endpoint(url, chat_template_name="chatml")

    @sgl.function
    def fork(s: ProgramState, chat: str) -> None:
        s += sgl.system(SYSTEM)
        s += sgl.user(chat)
        branches = rksc_sgl.fork_similar(s, work.branches)
        branches += sgl.assistant(sgl.gen("answer", max_tokens=work.tokens, temperature=0.7, ignore_eos=True))
        verdict = rksc_sgl.verify_gated(branches, "answer", select="score", skip=rksc_sgl.SkipGate.never(), exit="off")
        assert not any(verdict.errors), verdict.errors

    def ask(chat: str) -> None:
        error = fork.run(chat=chat, backend=endpoint).error()
        if error is not None:
            raise error

    _each(ask, work)


def round_robin(url: str, work: Work) -> None:
    """Plain requests: nobody knows of a fork."""
    question = question_with_labels(None, LABELS)

    def branch(chat: str) -> None:
        body = _body(chat, work)
        said = _post(url, body)["choices"][0]["message"]["content"]
        turns = [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
        _post(url, {**body, "messages": [*body["messages"], *turns], "max_tokens": 1})

    def ask(chat: str) -> None:
        with ThreadPoolExecutor(work.branches) as pool:
            list(pool.map(branch, [chat] * work.branches))

    _each(ask, work)


WAYS: dict[str, tuple[Callable[[str, Work], None], tuple[str, ...]]] = {
    "one_request": (one_request, ("cache_aware",)),
    "keyed": (keyed, ("manual", "--assignment-mode", "min_load")),
    "round_robin": (round_robin, ("round_robin",)),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = _parse(argv)
    work = Work(chats(arguments.forks, arguments.contexts), arguments.branches, arguments.max_tokens, arguments.at_once)
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder) / "tiny-llama")) if arguments.quick else arguments.model_path
        return _result(arguments, _all_ways(model, work, arguments.turns))


def _all_ways(model: str, work: Work, turns: int) -> dict[str, list[Counted]]:
    model = resolve_model(model)  # the router finds its tokenizer by the name that the workers have for the model
    flags = ["--model-path", model, "--max-total-tokens", "30000", "--enable-metrics"]
    counted: dict[str, list[Counted]] = {name: [] for name in WAYS}
    with ServerProcess(server_arguments(flags)) as first, ServerProcess(server_arguments(flags)) as second:
        workers = (first.url, second.url)
        for url in workers:  # what is compiled or loaded at the first request
            one_request(url, Work(work.chats[:1], work.branches, 2, 1))
        print("two workers are up", flush=True)
        for turn in range(turns):
            for name in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
                way, policy = WAYS[name]
                counted[name].append(_measured(workers, way, (*policy, "--tokenizer-path", model), work))
                print(f"turn {turn + 1}: {name}: {counted[name][-1]}", flush=True)
    return counted


def _measured(
    workers: tuple[str, ...], way: Callable[[str, Work], None], policy: tuple[str, ...], work: Work
) -> Counted:
    for url in workers:
        httpx.post(f"{url}/flush_cache", params={"timeout": 30}, timeout=60.0, trust_env=False).raise_for_status()
    with RouterProcess(workers, *policy) as router:
        before = [_tokens(url) for url in workers]
        began = time.perf_counter()
        way(router.url, work)
        seconds = time.perf_counter() - began
        after = [_tokens(url) for url in workers]
    asked = [late[0] - early[0] for early, late in zip(before, after, strict=True)]
    cached = [late[1] - early[1] for early, late in zip(before, after, strict=True)]
    by_worker = tuple(one - other for one, other in zip(asked, cached, strict=True))
    return Counted(sum(asked), sum(by_worker), seconds, by_worker)


def _tokens(url: str) -> tuple[int, int]:
    """Prompt tokens of all requests that a server has answered, and those of them that it found cached."""
    text = httpx.get(f"{url}/metrics/", timeout=60.0, follow_redirects=True, trust_env=False).text
    return _total(text, "sglang:prompt_tokens_total"), _total(text, "sglang:cached_tokens_total")


def _total(text: str, name: str) -> int:
    """The sum of a counter over its labels."""
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0] == name))


def _result(arguments: argparse.Namespace, counted: dict[str, list[Counted]]) -> dict[str, Any]:
    asked = [one.asked for one in counted["round_robin"]]
    full = sum(asked)
    print(f"{arguments.forks} forks of {arguments.branches} branches, {asked[0]} prompt tokens as plain requests")
    shares, seconds, noise = {}, {}, {}
    for name, turns in counted.items():
        shares[name] = sum(one.computed for one in turns) / full
        times = [one.seconds for one in turns]
        seconds[name], noise[name] = round(sum(times) / len(times), 2), round(max(times) / min(times), 3)
        workers = ", ".join(str(one.by_worker) for one in turns)
        print(f"{name:12s} {shares[name]:.1%} computed, by worker {workers}; {seconds[name]} s, noise {noise[name]}")
    result: dict[str, Any] = {f"computed_fraction_{name}": round(share, 4) for name, share in shares.items()}
    result |= {"turns": arguments.turns, "seconds": seconds, "noise": noise}
    print(json.dumps(result))
    return result


def _each(ask: Callable[[str], None], work: Work) -> None:
    with ThreadPoolExecutor(work.at_once) as pool:
        list(pool.map(ask, work.chats))


def _body(chat: str, work: Work) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": chat}]
    return {"messages": messages, "max_tokens": work.tokens, "temperature": 0.7, "ignore_eos": True}


def _post(url: str, body: dict[str, Any]) -> Any:
    models = httpx.get(f"{url}/v1/models", timeout=60.0, trust_env=False).json()
    body = {**body, "model": models["data"][0]["id"]}  # smg knows no other name
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600.0, trust_env=False)
    answer.raise_for_status()
    return answer.json()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="smollm2-135m-instruct", help="the model that both workers serve")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: what is computed, not its time")
    parser.add_argument("--forks", type=int, default=32, help="forks of each way")
    parser.add_argument("--contexts", type=int, default=8, help="texts that they ask about")
    parser.add_argument("--branches", type=int, default=8, help="branches of a fork")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens that each branch generates")
    parser.add_argument("--at-once", type=int, default=4, help="forks under way at the same time")
    parser.add_argument("--turns", type=int, default=2, help="of each way")
    arguments = parser.parse_args(argv)
    if arguments.turns < 1:
        parser.error(f"--turns: must be at least 1, got {arguments.turns}")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except RkscError as error:
        sys.exit(f"routing: {error}")
