"""A program's ``verify_gated`` and a request's fork come to the same verdict about the same branches.

Both get the same recorded completions and replies; a server samples anew each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

import rksc_sgl
from rksc_sgl import Endpoint
from rksc_sgl.deciding import Abort, Start
from rksc_sgl.one_request.fork import Ask, Chosen, Completion, Fork, ForkAction
from rksc_sgl.one_request.options import ForkOptions
from rksc_sgl.verifying.labels import LabelTokens
from rksc_sgl.verifying.reading import read_reply
from tests.serving import serving

YES, NO, OTHER = 1, 2, 3
TOKENS = LabelTokens(("YES", "NO"), ((YES,), (NO,)))

Recorded = tuple[str, float, float, bool]
"""Text, confidence, P(YES), and whether it was cut by its token limit."""

FORKS: dict[str, tuple[Recorded, ...]] = {
    "one answer leads": (
        ("It is 4. The answer is 7.", 0.9, 0.2, False),
        ("The answer is 8.", 0.8, 0.9, False),
        ("The answer is 7.", 0.7, 0.3, False),
        ("The answer is 7.0.", 0.95, 0.1, False),
    ),
    "two tie": (
        ("The answer is 7.", 0.9, 0.2, False),
        ("The answer is 8.", 0.4, 0.6, False),
        ("The answer is 8.", 0.5, 0.5, False),
        ("The answer is 7.", 0.7, 0.3, False),
    ),
    "all differ": tuple((f"The answer is {n}.", 0.5 + n / 20, 0.9 - n / 10, False) for n in range(4)),
    "nobody answers": (
        ("I cannot say.", 0.9, 0.4, False),
        ("Who knows", 0.3, 0.8, False),
        ("It may be 12 or", 0.7, 0.6, True),
        ("Hm.", 0.6, 0.5, False),
    ),
    "some are empty": (
        ("  ", 0.9, 0.4, False),
        ("The answer is \\boxed{1/2}.", 0.3, 0.8, False),
        ("The answer is 0.5.", 0.7, 0.6, False),
        ("", 0.6, 0.5, False),
    ),
    "all agree": tuple(("The answer is 7.", 0.5 + n / 10, 0.5, False) for n in range(4)),
}


def meta_info_of(one: Recorded) -> dict[str, Any]:
    """What SGLang's server says of a completion."""
    _, confidence, _, cut = one
    return {
        "id": "recorded",
        "finish_reason": {"type": "length" if cut else "stop"},
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "cached_tokens": 4,
        "output_top_logprobs": [[[math.log(confidence), 9, None]]] * 2,
    }


def reply_of(one: Recorded) -> dict[str, Any]:
    """What it says of the completion's verification; a fifth of the probability is of other replies."""
    yes = one[2] * 0.8
    logprobs = [[math.log(yes), YES, None], [math.log(0.8 - yes), NO, None]]
    return {"prompt_tokens": 30, "cached_tokens": 10, "output_token_ids_logprobs": [logprobs]}


class Replay:
    """
    Attributes:
        fork: what is replayed.
        url: of the server that does.
    """

    fork: tuple[Recorded, ...] = ()
    url = ""


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    """A server that answers with what was recorded."""
    replay = Replay()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            scheduler = {"exit": {"profiles": []}}
            self._say({"model_path": "recorded", "schedulers": [scheduler]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(self._answer(asked))

        def _answer(self, asked: dict[str, Any]) -> Any:
            if self.path == "/v1/tokenize":
                word = str(asked.get("prompt", "")).strip().upper()
                return {"tokens": [{"YES": YES, "NO": NO}.get(word, OTHER)]}
            if self.path == "/v1/detokenize":
                return {"text": "no chat template"}
            params = asked["sampling_params"]
            if isinstance(params, list):
                return [{"text": "", "meta_info": reply_of(replay.fork[_branch(one)])} for one in params]
            if not params["max_new_tokens"]:
                return {"text": "", "meta_info": {}}
            one = replay.fork[_branch(params)]
            return {"text": one[0], "output_ids": [OTHER, OTHER], "meta_info": meta_info_of(one)}

        def _say(self, body: Any) -> None:
            payload = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    replay.url = f"http://127.0.0.1:{server.server_port}"
    with serving(server):
        yield replay


def _branch(params: dict[str, Any]) -> int:
    return int(params["custom_params"]["rksc"].get("branch", 0))


def of_a_program(replay: Replay, select: str, early_stop: str | None) -> rksc_sgl.Verdict:
    s = ProgramState(StreamExecutor(Endpoint(replay.url), {}, SglSamplingParams(max_new_tokens=8), None, False))
    s += "How many?"
    group = sgl.fork_similar(s, len(replay.fork), early_stop=early_stop)
    group += sgl.gen("answer")
    return sgl.verify_gated(group, "answer", select=select)


def of_a_request(fork: tuple[Recorded, ...], select: str, early_stop: str | None) -> tuple[Fork, Chosen]:
    options = {"branches": len(fork), "select": select, "early_stop": early_stop}
    one = Fork(ForkOptions.from_mapping(options))
    waiting: list[ForkAction] = one.start()
    while waiting:
        action = waiting.pop(0)
        assert not isinstance(action, Abort), "branches end in the order in which they were started"
        if isinstance(action, Start):
            for branch in action.branches:
                text, confidence, _, cut = fork[branch]
                waiting += one.finished(branch, Completion(text, truncated=cut, confidence=confidence))
        elif isinstance(action, Ask):
            for branch in action.branches:
                waiting += one.verified(branch, read_reply(reply_of(fork[branch]), TOKENS))
    assert isinstance(one.end, Chosen)
    return one, one.end


@pytest.mark.parametrize("early_stop", [None, "certain"])
@pytest.mark.parametrize("select", ["vote", "score", "weighted_majority", "majority"])
@pytest.mark.parametrize("name", FORKS)
def test_a_program_and_a_request_select_the_same_branch_for_the_same_reason(
    replay: Replay, name: str, select: str, early_stop: str | None
) -> None:
    fork = replay.fork = FORKS[name]
    verdict = of_a_program(replay, select, early_stop)
    one, chosen = of_a_request(fork, select, early_stop)
    assert chosen.order[0] == verdict.index
    assert chosen.reason == verdict.reason
    assert list(chosen.verified) == [index for index, score in enumerate(verdict.scores) if score is not None]
    readings = [one.reading(index) for index in range(len(fork))]
    assert [reading and pytest.approx(reading.score) for reading in readings] == verdict.scores
    assert [reading and pytest.approx(reading.label_mass) for reading in readings] == verdict.label_mass
    members = one.members()
    assert [member.answer if member.error is None else None for member in members] == [
        answer if error is None else None for answer, error in zip(verdict.answers, verdict.errors, strict=True)
    ]
    assert [member.error is None for member in members] == [error is None for error in verdict.errors]
