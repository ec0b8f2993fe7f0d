"""Forks on a server whose pool is too small for them, and clients that behave badly there."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sglang as sgl

from rksc_sgl import Endpoint, SkipGate
from rksc_sgl.metrics import LEASES, LEASES_ENDED, TOKENS_TWICE
from tests.six_layers import VARIANTS, Served, SixLayers, report_of, sampling, server_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

SLOTS, LEASE_S = 1200, 3.0
PREFIX, NEW, BRANCHES = 200, 20, 4


@pytest.fixture(scope="module")
def pressed(six_layers: SixLayers) -> Iterator[Served]:
    """Of the forks below four fit at a time, and leases last three seconds."""
    variables = {"XDG_CACHE_HOME": str(six_layers.cache()), "RKSC_LEASE_SECONDS": str(LEASE_S)}
    with server_of(six_layers.path, "--max-running-requests", "32", tokens=SLOTS, variables=variables) as process:
        yield Served.of(process, six_layers.path)


@pytest.fixture
def clean(pressed: Served) -> Served:
    pressed.settle()
    pressed.flush()
    return pressed


def prompt_of(seed: int, tokens: int = PREFIX) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(60, 250) for _ in range(tokens)]


def options(group: str, branch: int, branches: int = BRANCHES, **more: Any) -> dict[str, Any]:
    return {"group": group, "branch": branch, "branches": branches, "share": "exact", **more}


def generate(served: Served, group: str, prompt: Sequence[int], branches: int = BRANCHES, new: int = NEW) -> list[Any]:
    """All branches of a fork in one request; the ids of each after it."""
    asked = [options(group, branch, branches) for branch in range(branches)]
    return served.ask_together([list(prompt)] * branches, asked, new)


def verify(served: Served, group: str, prompt: Sequence[int], answers: Sequence[Any]) -> list[Any]:
    asked = [options(group, branch, len(answers), op="verify") for branch in range(len(answers))]
    return served.ask_together([[*prompt, *answer["output_ids"], 40, 41, 42] for answer in answers], asked)


def memory(served: Served) -> dict[str, Any]:
    return served.stats()["memory"]


def test_many_forks_at_once_compute_nothing_twice_and_leave_nothing(clean: Served) -> None:
    twice, leases = clean.total(TOKENS_TWICE), clean.total(LEASES)

    def fork(number: int) -> list[Any]:
        prompt = prompt_of(number)
        answers = generate(clean, f"many {number}", prompt)
        return answers + verify(clean, f"many {number}", prompt, answers)

    with ThreadPoolExecutor(12) as pool:
        plain = [pool.submit(clean.ask, prompt_of(100 + number, 50), None, 5) for number in range(4)]
        forks = list(pool.map(fork, range(12)))
    for answers in forks:
        cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
        assert sum(count >= PREFIX - 1 for count in cached) >= 2 * BRANCHES - 1, cached
        assert not any("memory" in report_of(answer) for answer in answers)
    assert all(answer.result()["meta_info"]["completion_tokens"] == 5 for answer in plain)
    assert clean.total(TOKENS_TWICE) == twice
    assert clean.total(LEASES) == leases + 12 * (BRANCHES + 1)
    clean.check_pool()
    assert memory(clean) == {"refusal": None, "forks": 0, "waiting": 0, "leases": 0, "leased_tokens": 0}


def test_a_fork_is_leased_while_it_may_go_on_and_the_tree_says_so(clean: Served) -> None:
    generate(clean, "shown", prompt_of(1))
    kept = memory(clean)
    assert (kept["forks"], kept["leases"]) == (1, BRANCHES + 1)
    assert PREFIX <= kept["leased_tokens"] <= PREFIX + BRANCHES * NEW
    clean.check_pool()
    leases = sorted(lease for node in clean.tree()["tree"]["nodes"] for lease in node["leases"])
    assert leases == ["beginning of shown", *(f"branch {branch} of shown" for branch in range(BRANCHES))]


@pytest.mark.parametrize("told", ["by its client", "by nobody"])
def test_a_client_that_never_verifies_costs_nobody_a_slot_for_long(clean: Served, told: str) -> None:
    ended = {reason: clean.total(LEASES_ENDED, reason=reason) for reason in ("ended", "expired")}
    generate(clean, f"left {told}", prompt_of(2))
    if told == "by its client":
        httpx.post(f"{clean.process.url}/rksc/end_fork", json={"group": f"left {told}"}).raise_for_status()
        ended["ended"] += BRANCHES + 1
    else:
        assert memory(clean)["leases"]
        time.sleep(LEASE_S)
        ended["expired"] += BRANCHES + 1
    clean.until(lambda: memory(clean)["leases"] == 0, seconds=10.0)
    assert {reason: clean.total(LEASES_ENDED, reason=reason) for reason in ended} == ended
    clean.check_pool()


def test_forks_that_are_begun_and_left_by_the_hundred_do_not_stop_the_server(clean: Served) -> None:
    broken = clean.total(LEASES_ENDED, reason="broken")
    with ThreadPoolExecutor(16) as pool:
        left = pool.map(lambda n: clean.ask(prompt_of(n, 80), options(f"left {n}", 0), 4), range(200))
        assert all(answer["meta_info"]["completion_tokens"] == 4 for answer in left)
    assert clean.total(LEASES_ENDED, reason="broken") > broken, "nobody waits for what is not coming"
    assert clean.ask(prompt_of(9999, 600), None, 3)["meta_info"]["completion_tokens"] == 3
    clean.check_pool()


def test_a_plain_request_gets_the_room_of_leases_after_a_while(clean: Served) -> None:
    for number in range(3):
        generate(clean, f"idle {number}", prompt_of(number))
    assert memory(clean)["leased_tokens"] > SLOTS // 2
    broken = clean.total(LEASES_ENDED, reason="broken")
    assert clean.ask(prompt_of(77, 1000), None, 2)["meta_info"]["completion_tokens"] == 2
    assert clean.total(LEASES_ENDED, reason="broken") > broken, "it did not wait until they expired"
    clean.check_pool()


def test_a_verification_whose_branch_was_evicted_says_so(clean: Served) -> None:
    prompt = prompt_of(3)
    answers = generate(clean, "late", prompt)
    clean.ask(prompt_of(78, 1100), None, 2)
    verified = [report_of(answer) for answer in verify(clean, "late", prompt, answers)]
    assert max(report.get("memory", {}).get("evicted_tokens", 0) for report in verified) >= PREFIX
    clean.check_pool()


def test_what_is_leased_can_be_flushed(clean: Served) -> None:
    prompt = prompt_of(4)
    answers = generate(clean, "flushed", prompt)
    flushed = clean.total(LEASES_ENDED, reason="flushed")
    clean.settle()
    clean.flush()
    assert clean.total(LEASES_ENDED, reason="flushed") == flushed + BRANCHES + 1
    assert memory(clean)["leases"] == 0
    clean.check_pool()
    assert len(verify(clean, "flushed", prompt, answers)) == BRANCHES
    clean.check_pool()


@pytest.mark.parametrize("by", ["abort", "disconnect"])
def test_forks_that_wait_run_and_have_ended_can_be_aborted(clean: Served, by: str) -> None:
    """Six of them, of which some wait for their turn and siblings for their anchor."""
    bodies = []
    for fork in range(6):
        prompt = prompt_of(20 + fork)
        bodies += [
            {"input_ids": prompt, "rid": f"{by}-{fork}-{branch}", "stream": True, "sampling_params": sampling(
                options(f"{by} {fork}", branch), 5 if branch == 0 else 800
            )}
            for branch in range(BRANCHES)
        ]  # fmt: skip

    def ask(body: dict[str, Any]) -> None:
        with httpx.stream("POST", f"{clean.process.url}/generate", json=body, timeout=60.0) as response:
            for line in response.iter_lines():
                if by == "disconnect" and line.startswith("data: {"):
                    return

    with ThreadPoolExecutor(len(bodies)) as pool:
        asked = [pool.submit(ask, body) for body in bodies]
        if by == "abort":
            clean.until(lambda: clean.stats()["requests"]["running"] > 0, pause=0.0)
            for fork in range(6):
                time.sleep(0.05)
                clean.abort(f"{by}-{fork}-")
                for branch in range(BRANCHES):
                    clean.abort(f"{by}-{fork}-{branch}")
        for one in asked:
            one.result(timeout=60)
    clean.until(lambda: memory(clean)["waiting"] == 0 and clean.stats()["requests"] == {"running": 0, "waiting": 0})
    clean.check_pool()


def test_a_fork_that_is_larger_than_the_pool_runs_branch_by_branch_and_says_so(clean: Served) -> None:
    answers = generate(clean, "large", prompt_of(5, 400), branches=8, new=200)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [200] * 8
    assert all(report_of(answer)["memory"]["larger_than_pool"] for answer in answers)
    clean.check_pool()


def test_a_branch_that_is_larger_than_the_pool_ends_as_it_does_without_a_fork(clean: Served) -> None:
    plain = clean.ask(prompt_of(6, 800), None, 700)
    (branch,) = clean.ask_together([prompt_of(7, 800)], [options("one", 0, 1)], 700)
    assert branch["meta_info"]["finish_reason"]["type"] == plain["meta_info"]["finish_reason"]["type"]
    assert branch["meta_info"]["completion_tokens"] == plain["meta_info"]["completion_tokens"]
    clean.check_pool()


@sgl.function
def fork(s: Any, prompt: str) -> None:
    s += prompt
    branches = sgl.fork_similar(s, BRANCHES)
    branches += sgl.gen("answer", max_tokens=NEW, ignore_eos=True)
    s["verdict"] = sgl.verify_gated(branches, "answer", select="score", skip=SkipGate.never())


def test_a_program_tells_that_its_fork_has_ended(clean: Served) -> None:
    twice = clean.total(TOKENS_TWICE)
    states = fork.run_batch(
        [{"prompt": f"case {number}: " + "cows and hens " * 20} for number in range(6)],
        backend=Endpoint(clean.process.url),
        num_threads=6,
        progress_bar=False,
    )
    assert all(state["verdict"].best is not None for state in states)
    clean.until(lambda: memory(clean)["forks"] == 0, seconds=2.0)
    assert clean.total(TOKENS_TWICE) == twice
    clean.check_pool()


def test_a_request_of_one_fork_leaves_no_lease(clean: Served) -> None:
    body = {"model": "default", "prompt": "Anna has 4 hens.", "max_tokens": 8, "rksc": {"branches": 4, "verify": False}}
    httpx.post(f"{clean.process.url}/rksc/v1/completions", json=body, timeout=60.0).raise_for_status()
    clean.until(lambda: memory(clean)["leases"] == 0, seconds=2.0)
    clean.check_pool()


def test_the_end_of_a_fork_must_be_named(clean: Served) -> None:
    for body in ({}, {"group": ""}, {"group": 7}, {"group": "x" * 129}):
        assert httpx.post(f"{clean.process.url}/rksc/end_fork", json=body).status_code == 400, body
    httpx.post(f"{clean.process.url}/rksc/end_fork", json={"group": "of nobody"}).raise_for_status()


@pytest.fixture(scope="module")
def retracting(six_layers: SixLayers) -> Iterator[Served]:
    """Every few steps SGLang retracts a request."""
    variables = {"XDG_CACHE_HOME": str(six_layers.cache()), "SGLANG_TEST_RETRACT": "1", "RKSC_LEASE_SECONDS": "30"}
    with server_of(six_layers.path, tokens=4000, variables=variables) as process:
        yield Served.of(process, six_layers.path)


@pytest.mark.parametrize("share", ["exact", "blend"])
def test_forks_go_on_after_they_were_retracted(retracting: Served, share: str) -> None:
    texts = [
        "Anna has 4 hens and sells 2 of them. " * 8,
        "Please think. " + "Anna has 4 hens and sells 2 of them. " * 8,
    ]
    asked = [{**options(f"{share} {fork}", branch), "share": share} for fork in range(3) for branch in range(BRANCHES)]
    prompts = [
        f"{fork}: {texts[branch % 2 if share == 'blend' else 0]}" for fork in range(3) for branch in range(BRANCHES)
    ]
    answers = retracting.ask_together([*prompts, "plain words"], [*asked, None], 24)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [24] * len(answers)
    retracting.check_pool()
    if share == "exact":
        alone = retracting.ask(prompts[0], None, 24)
        assert answers[0]["output_ids"] == alone["output_ids"]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda flags: flags[0])
def laid_out(request: pytest.FixtureRequest, six_layers: SixLayers) -> Iterator[Served]:
    """Ranks, pages, chunks, and no overlap; four of the forks below fit at a time."""
    flags = request.param
    cache = six_layers.cache(2 if "--tp" in flags else 1)
    variables = {"XDG_CACHE_HOME": str(cache), "RKSC_LEASE_SECONDS": str(LEASE_S)}
    with server_of(six_layers.path, *flags, tokens=SLOTS + 400, variables=variables) as process:
        yield Served.of(process, six_layers.path)


def test_forks_are_kept_whole_in_other_layouts(laid_out: Served) -> None:
    """Two ranks that decided differently would not come back."""
    twice, whole = laid_out.total(TOKENS_TWICE), (PREFIX - 1) // laid_out.page * laid_out.page

    def fork(number: int) -> list[Any]:
        prompt = prompt_of(number)
        answers = generate(laid_out, f"laid out {number}", prompt)
        if number % 4 == 3:
            return answers  # its client leaves
        return answers + verify(laid_out, f"laid out {number}", prompt, answers)

    with ThreadPoolExecutor(16) as pool:
        plain = [pool.submit(laid_out.ask, prompt_of(100 + number, 90), None, 5) for number in range(8)]
        forks = list(pool.map(fork, range(12)))
    for answers in forks:
        cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
        assert sum(count >= whole for count in cached) >= len(answers) - 1, cached
        assert not any("memory" in report_of(answer) for answer in answers)
    assert all(answer.result()["meta_info"]["completion_tokens"] == 5 for answer in plain)
    assert laid_out.total(TOKENS_TWICE) == twice
    laid_out.until(lambda: memory(laid_out)["leases"] == 0, seconds=20.0)
    laid_out.check_pool()
    first, alone = forks[0][0], laid_out.ask(prompt_of(0), None, NEW)
    assert first["output_ids"] == alone["output_ids"]


def test_abandoned_forks_make_way_in_other_layouts(laid_out: Served) -> None:
    broken = laid_out.total(LEASES_ENDED, reason="broken")
    with ThreadPoolExecutor(4) as pool:  # at once: on a slow machine the first one's leases would be over by then
        list(pool.map(lambda number: generate(laid_out, f"idle {number}", prompt_of(50 + number)), range(4)))
    assert laid_out.ask(prompt_of(77, 1300), None, 2)["meta_info"]["completion_tokens"] == 2
    assert laid_out.total(LEASES_ENDED, reason="broken") > broken
    laid_out.until(lambda: memory(laid_out)["leases"] == 0, seconds=20.0)
    laid_out.check_pool()
