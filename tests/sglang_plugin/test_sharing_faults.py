"""What may go wrong while branches share: on real servers, none of which may lose a slot, hang or say nonsense."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from two_wordings import branch, problem, reworded

from rksc_sgl.metrics import REQUESTS
from rksc_sgl.placement.choose import ANCHOR_GONE
from tests.six_layers import Served, SixLayers, logprobs_of, report_of, sampling, server_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

SMALL_POOL = 3000
ATTEMPTS = 8  # to be there at a moment that does not last
STARTS = ("Think step by step. ", "You are a careful tutor. ", "Please solve this problem. ", "Please take your time. ")


@pytest.fixture(scope="module")
def small(six_layers: SixLayers) -> Iterator[Served]:
    """Prompts take several passes, the pool is soon full, and so is the batch."""
    flags = ("--chunked-prefill-size", "64", "--max-running-requests", "6", "--enable-metrics")
    variables = {"XDG_CACHE_HOME": str(six_layers.cache())}
    with server_of(six_layers.path, *flags, tokens=SMALL_POOL, variables=variables) as process:
        yield Served.of(process, six_layers.path)


def test_nothing_is_indexed_before_a_request_asks_for_the_whole_cache(small: Served) -> None:
    """The first test on this server."""
    text = problem(1)
    anchor = small.ask(text, branch("known before", 0))["meta_info"]["id"]
    small.ask(problem(2))
    assert small.stats()["sharing"]["indexed"] is None
    report = report_of(small.ask(reworded(text), branch(None, share_scope="cache")))
    assert (report["mode"], report["donor"]) == ("merge", anchor), "the donors of forks are known from the start"
    indexed = small.stats()["sharing"]["indexed"]
    assert indexed["prompts"] >= 1 and indexed["tokens"] > 100 and indexed["bytes"] > 8 * indexed["tokens"]


def start_fork(
    pool: ThreadPoolExecutor, served: Served, group: str, texts: list[str], tokens: list[int], **options: Any
) -> tuple[str, Future]:
    """An anchor and its siblings, which wait for it when this returns.

    On a busy machine they may have gone on before anybody looks; then the same is tried again under another name.

    Returns:
        The fork's name, which with a place is a request's id, and the answers to come.
    """
    for attempt in range(ATTEMPTS):
        name = f"{group}, attempt {attempt},"
        body = {
            "input_ids": [served.ids(text) for text in texts],
            "sampling_params": [sampling(branch(name, i, **options), count) for i, count in enumerate(tokens)],
            "rid": [f"{name} {index}" for index in range(len(texts))],
        }
        answers = pool.submit(lambda body=body: served.post(body).json())
        served.until(
            lambda answers=answers: answers.done() or served.stats()["requests"]["waiting"] == len(texts) - 1, pause=0.0
        )
        if not answers.done():
            return name, answers
        served.settle()
        served.flush()
    raise AssertionError(f"the siblings of {group} were never seen waiting")


def abort(served: Served, rid: str) -> None:
    httpx.post(f"{served.process.url}/abort_request", json={"rid": rid}, timeout=30.0).raise_for_status()


def ended(answer: dict[str, Any]) -> str:
    return answer["meta_info"]["finish_reason"]["type"]


def told(text: str, share: str) -> list[str]:
    """The problem, and three other prompts that can share with it in this way; of those of blends the longest first."""
    if share == "merge":
        return [text, *(reworded(text, begin) for begin in STARTS[:3])]
    return sorted([text, *(begin + text for begin in STARTS[:3])], key=len, reverse=True)


@pytest.mark.parametrize("share", ["merge", "blend"])
def test_siblings_share_among_themselves_when_their_anchor_is_aborted_in_its_prefill(small: Served, share: str) -> None:
    for attempt in range(ATTEMPTS):
        small.settle()
        small.flush()
        texts = told(problem(20, sentences=36), share)
        with ThreadPoolExecutor() as pool:
            group, started = start_fork(pool, small, f"aborted {share} {attempt}", texts, [200, 3, 3, 3], share=share)
            abort(small, f"{group} 0")
            anchor, *others = started.result()
        if (ended(anchor), anchor["meta_info"].get("completion_tokens", 0)) == ("abort", 0):
            break  # and not while it generated already
    else:
        pytest.fail("the anchor was never aborted in its prefill")
    assert [answer["meta_info"]["completion_tokens"] for answer in others] == [3] * 3
    reports = [report_of(answer) for answer in others]
    assert [report["mode"] for report in reports] == ["exact", share, share]
    assert reports[0]["declined"] == ANCHOR_GONE and all(report["waited_passes"] for report in reports)
    assert [report["donor"] for report in reports[1:]] == [f"{group} 1"] * 2
    if share == "merge":
        assert [answer["output_ids"] for answer in others] == [others[0]["output_ids"]] * 3
    small.check_pool()


@pytest.mark.parametrize("share", ["merge", "blend"])
def test_siblings_keep_the_kv_of_an_anchor_that_is_aborted_while_it_generates(small: Served, share: str) -> None:
    small.settle()
    small.flush()
    group, texts = f"generating {share}", told(problem(31, sentences=12), share)
    anchor = {"input_ids": small.ids(texts[0]), "rid": f"{group} 0", "stream": True}
    anchor["sampling_params"] = sampling(branch(group, 0, share=share), 2000)
    with httpx.stream("POST", f"{small.process.url}/generate", json=anchor, timeout=60.0) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {"))
        next(lines)
        abort(small, f"{group} 0")
        *_, last = lines
    assert ended(json.loads(last)) == "abort"
    answers = small.ask_together(texts[1:], [branch(group, index, share=share) for index in (1, 2, 3)], 20)
    reports = [report_of(answer) for answer in answers]
    assert [(report["mode"], report["donor"]) for report in reports] == [(share, f"{group} 0")] * 3
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [20] * 3
    small.check_pool()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15])
def test_a_sibling_that_is_cancelled_while_it_waits_or_merges_takes_nobody_along(small: Served, delay: float) -> None:
    small.settle()
    small.flush()
    texts = told(problem(21, sentences=20), "merge")
    expected = small.ask(texts[0], tokens=3)["output_ids"]
    small.flush()
    with ThreadPoolExecutor() as pool:
        group, started = start_fork(pool, small, f"cancelled {delay}", texts, [3, 3, 500, 3])
        time.sleep(delay)
        abort(small, f"{group} 2")
        answers = started.result()
    assert ended(answers.pop(2)) == "abort"
    assert [report_of(answer)["mode"] for answer in answers] == ["exact", "merge", "merge"]
    assert [answer["output_ids"] for answer in answers] == [expected] * 3
    small.check_pool()


def test_every_sibling_that_leaves_while_it_waits_is_counted(small: Served) -> None:
    small.settle()
    small.flush()
    before = small.total(REQUESTS, reason="aborted")
    with ThreadPoolExecutor() as pool:
        group, started = start_fork(pool, small, "leaving", told(problem(33, sentences=40), "merge"), [200] * 4)
        for index in (3, 2, 1, 0):  # those who wait before the one that they wait for
            abort(small, f"{group} {index}")
        assert [ended(answer) for answer in started.result()] == ["abort"] * 4
    small.settle()
    assert small.total(REQUESTS, reason="aborted") == before + 4
    small.check_pool()


def test_a_flush_is_refused_while_a_fork_runs_and_harms_nobody(small: Served) -> None:
    small.settle()
    texts = told(problem(22, sentences=20), "merge")
    expected = small.ask(texts[0], tokens=30)["output_ids"]
    small.flush()
    with ThreadPoolExecutor() as pool:
        (_, started), statuses = start_fork(pool, small, "flush", texts, [30] * 4), []
        while not started.done():
            statuses.append(httpx.post(f"{small.process.url}/flush_cache", timeout=30.0).status_code)
        answers = started.result()
    assert statuses[0] == 400 and set(statuses) <= {200, 400}, "a server that computes refuses it"
    assert [report_of(answer)["mode"] for answer in answers] == ["exact", "merge", "merge", "merge"]
    assert [answer["output_ids"] for answer in answers] == [expected] * 4
    small.check_pool()


def test_an_evicted_prompt_is_no_donor_and_its_alias_is_dropped(small: Served) -> None:
    small.settle()
    small.flush()
    text = problem(23)
    small.ask(text, branch("evicted", 0))
    merged = small.ask(reworded(text), branch("evicted", 1), 3)
    assert report_of(merged)["mode"] == "merge"
    name = report_of(merged)["donor"]
    ended = httpx.post(f"{small.process.url}/rksc/end_fork", json={"group": "evicted"}, timeout=30.0)
    assert ended.status_code == 200, "what is kept for a fork is evicted last"
    for seed in range(30):
        small.ask(problem(2300 + seed, sentences=10))
    donors = [one for one in small.stats()["donors"] if one["name"] == name]
    assert donors and not any(one["resident"] for one in donors)
    exact = small.ask([*small.ids(reworded(text)), *merged["output_ids"]])
    later = small.ask([*small.ids(reworded(text)), *merged["output_ids"]], branch("evicted", 1))
    assert report_of(later)["mode"] == "exact" and report_of(later)["alias_dropped"]
    assert logprobs_of(later) == pytest.approx(logprobs_of(exact), abs=1e-4)
    assert not [one for one in small.stats()["donors"] if (one["name"], one["group"]) == (name, "evicted")]


def test_a_full_server_answers_every_branch(small: Served) -> None:
    small.settle()
    small.flush()
    text = problem(24)
    texts = [text] + [f"{STARTS[index % 4]}" * (1 + index // 4) + reworded(text, "") for index in range(15)]
    answers = small.ask_together(texts, [branch("full", index) for index in range(16)], 30)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [30] * 16
    merged = [answer for answer in answers if report_of(answer)["mode"] == "merge"]
    assert len(merged) >= 8
    assert all(answer["output_ids"] == answers[0]["output_ids"] for answer in merged)
    small.check_pool()


@pytest.mark.parametrize("share", ["merge", "blend", "auto"])
def test_a_branch_that_is_longer_than_the_pool_or_empty_is_refused_by_name(small: Served, share: str) -> None:
    options = branch(f"refused {share}", 1, share=share, tau=0.75)
    small.ask(problem(25), {**options, "branch": 0})
    long = small.ask([5] * (SMALL_POOL + 100), options)
    assert isinstance(long, httpx.Response) and long.status_code == 400
    assert "long" in long.text or "exceeds" in long.text
    empty = small.ask([], options)
    assert isinstance(empty, httpx.Response) and empty.status_code == 400
    assert "empty" in empty.text
    small.check_pool()


def test_two_forks_with_one_name_keep_their_own_questions(small: Served) -> None:
    small.settle()
    small.flush()
    first, second = problem(26), problem(27)
    expected = {text: small.ask(text, tokens=4)["output_ids"] for text in (first, second)}
    small.flush()
    small.ask(first, branch("one name", 0))
    small.ask(second, branch("one name", 0))
    answers = small.ask_together([reworded(first), reworded(second)], [branch("one name", 1)] * 2, 4)
    assert report_of(answers[0])["mode"] == "merge" and answers[0]["output_ids"] == expected[first]
    assert report_of(answers[1])["mode"] == "exact"
    assert report_of(answers[1])["declined"].startswith("content guard")


def test_requests_that_the_server_retracts_say_the_same_in_the_end(six_layers: SixLayers, small: Served) -> None:
    small.settle()
    small.flush()
    text = problem(28)
    expected = small.ask(text, tokens=25)["output_ids"]
    variables = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "4"}
    with server_of(six_layers.path, "--page-size", "16", tokens=4000, variables=variables) as process:
        retracting = Served.of(process, six_layers.path)
        texts = [text, *(reworded(text, begin) for begin in STARTS)]
        answers = retracting.ask_together(texts, [branch("retracted", index) for index in range(5)], 25)
        merged = [answer for answer in answers if report_of(answer)["mode"] == "merge"]
        assert any(answer["meta_info"].get("num_retractions") for answer in merged)
        assert all(answer["output_ids"] == expected for answer in merged)
        retracting.check_pool()


def test_random_forks_aborts_flushes_and_evictions_lose_no_slot_and_answer_the_right_question(small: Served) -> None:
    small.settle()
    small.flush()
    source = random.Random(7)
    texts = [problem(4000 + seed, sentences=source.choice([4, 6, 9])) for seed in range(5)]
    known = {
        text: {
            asked: small.ask(asked, tokens=6)["output_ids"] for asked in (text, *(reworded(text, s) for s in STARTS))
        }
        for text in texts
    }
    happened: Counter[str] = Counter()
    wrong: list[Any] = []

    def step(number: int) -> None:
        text = texts[number % len(texts)]
        asked = text if source.random() < 0.3 else reworded(text, source.choice(STARTS))
        share = source.choice(["merge", "merge", "auto", "blend"])
        scope = source.choice(["group", "cache"])
        options = branch(
            None if scope == "cache" and number % 2 else f"random {source.choice([number % 5, number % 7])}",
            number % 16,
            share=share,
            tau=source.choice([-1.0, -1.0, 0.5, 1.0]),
            allow_merge=share == "auto",
            share_scope=scope,
        )
        body = {
            "input_ids": small.ids(asked),
            "rid": f"random-{number:04d}-",
            "sampling_params": sampling(options if number % 9 else None, source.choice([0, 1, 6, 6])),
        }
        if number % 29 == 0:
            status = httpx.post(f"{small.process.url}/flush_cache", timeout=30.0).status_code
            happened["flushed" if status == 200 else "flush refused"] += 1
        if number % 17 == 0:  # pushes others out of the pool
            small.post(
                {"input_ids": small.ids(problem(9000 + number, sentences=20)), "sampling_params": sampling(None, 1)}
            )
        if number % 13 == 0:
            abort(small, f"random-{max(0, number - source.randint(0, 4)):04d}-")
        if number % 31 == 0:
            small.tree()
        try:
            response = small.post(body, read=source.choice([0.02, 0.1, 60.0, 60.0, 60.0, 60.0]))
        except httpx.ReadTimeout:
            happened["gone"] += 1
        else:
            count(asked, text, response.json())

    def count(asked: str, text: str, answer: dict[str, Any]) -> None:
        mode = (answer["meta_info"].get("rksc") or {"mode": "plain"})["mode"]
        happened[mode if ended(answer) == "length" else ended(answer)] += 1
        if ended(answer) != "length" or len(answer["output_ids"]) != 6 or mode == "blend":
            return
        said = answer["output_ids"]
        happened[f"{mode}, compared"] += 1
        if said not in (known[text].values() if mode == "merge" else [known[text][asked]]):
            wrong.append((mode, asked, said))

    aborted, evicted = small.total(REQUESTS, reason="aborted"), evicted_tokens(small)
    for begin in range(0, 500, 100):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(step, range(begin, begin + 100)))
        small.check_pool()
        small.flush()
    assert not wrong
    assert all(happened[f"{mode}, compared"] for mode in ("plain", "exact", "merge")), happened
    assert happened["blend"] and happened["gone"] and happened["flush refused"], happened
    assert small.total(REQUESTS, reason="aborted") > aborted and evicted_tokens(small) > evicted
    (load,) = small.process.get_json("/v1/loads?include=core")["loads"]
    assert load["num_used_tokens"] == 0
    small.ask(texts[0], branch("after", 0))
    assert report_of(small.ask(reworded(texts[0]), branch("after", 1)))["mode"] == "merge"


def evicted_tokens(served: Served) -> float:
    lines = httpx.get(f"{served.process.url}/metrics", timeout=30.0, follow_redirects=True).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("sglang:evicted_tokens_total{"))
