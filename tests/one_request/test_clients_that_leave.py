"""A client that leaves ends every request of its fork, also those that wait; other clients lose nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from rksc_sgl import metrics
from rksc_sgl.server_process import ServerProcess
from tests.one_request.asking import ENDLESS, SEVEN, ask, asking, counted, eventually, in_flight, is_clean

pytestmark = [pytest.mark.server, pytest.mark.slow]

BRANCHES, RUNNING = 40, 32  # of the server at most


@pytest.fixture(autouse=True)
def idle(tiny_server: ServerProcess) -> None:
    """Whoever used the server before may have left requests behind, which are none of ours."""
    eventually(lambda: is_clean(tiny_server))


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_run_and_wait_end_with_their_client(tiny_server: ServerProcess, stream: bool) -> None:
    aborted = counted(tiny_server, op="branch", reason="aborted")
    rksc = {"branches": BRANCHES, "early_stop": False}
    with asking(tiny_server, rksc, stream=stream, **ENDLESS):
        eventually(lambda: in_flight(tiny_server) > RUNNING)
    eventually(lambda: is_clean(tiny_server))
    assert counted(tiny_server, op="branch", reason="aborted") == aborted + BRANCHES, "none ran to its end"


def test_a_client_that_leaves_a_fork_that_was_to_be_verified_ends_it(tiny_server: ServerProcess) -> None:
    with asking(tiny_server, {"branches": 16, "early_stop": False, "select": "score"}, max_tokens=400, ignore_eos=True):
        eventually(lambda: in_flight(tiny_server) > 0)
    eventually(lambda: is_clean(tiny_server))


def test_others_go_on_while_a_client_leaves(tiny_server: ServerProcess) -> None:
    with ThreadPoolExecutor(4) as pool:
        with asking(tiny_server, {"branches": 8, "early_stop": False}, **ENDLESS):
            eventually(lambda: in_flight(tiny_server) >= 8)
            answers = [pool.submit(ask, tiny_server, {"branches": 3}, regex=SEVEN) for _ in range(4)]
        said = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
    assert said == ["The answer is 7."] * 4
    eventually(lambda: is_clean(tiny_server))


def test_the_http_process_counts_forks_by_what_ended_them(tiny_server: ServerProcess) -> None:
    before = Forks(tiny_server)
    ask(tiny_server, {"branches": 4, "early_stop": "certain"}, regex=SEVEN).raise_for_status()
    certain = Forks(tiny_server).since(before)
    assert certain[metrics.FORKS] == {"certain": 1}
    assert certain[metrics.STOPPED_FORK_BRANCHES] == {"not_started certain": 2}
    assert certain[metrics.STOPPED_FORK_TOKENS]["certain"] > 0
    with asking(tiny_server, {"branches": 2, "early_stop": False}, **ENDLESS):
        eventually(lambda: in_flight(tiny_server) == 2)
    eventually(lambda: Forks(tiny_server).since(before)[metrics.FORKS].get("client") == 1)
    assert Forks(tiny_server).since(before)[metrics.STOPPED_FORK_BRANCHES]["stopped client"] == 2
    ask(tiny_server, {"branches": 2, "deadline_s": 0.3}, **ENDLESS)
    assert Forks(tiny_server).since(before)[metrics.FORKS]["deadline"] == 1


class Forks:
    """What the HTTP process has counted: by name, values by their labels."""

    def __init__(self, server: ServerProcess) -> None:
        counted = server.get_json("/rksc/stats")["http"]["counters"]
        self.values = {
            name: {" ".join(one["labels"].values()): one["value"] for one in series} for name, series in counted.items()
        }

    def since(self, before: Forks) -> dict[str, dict[str, int]]:
        return {
            name: {key: more for key, value in series.items() if (more := value - before.values[name].get(key, 0))}
            for name, series in self.values.items()
        }
