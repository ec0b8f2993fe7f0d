"""Blends and waiting siblings on a real server of a random six-layer Llama, against plain tensors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from rksc_sgl import metrics
from rksc_sgl.placement.choose import TOO_FEW_TAKEN
from rksc_sgl.placement.worth import PASS_TOKENS
from rksc_sgl.similarity.alignment import align
from rksc_sgl.testing.eager_blend import served_choice
from tests.six_layers import VOCABULARY, Served, SixLayers, logprobs_of, report_of, sampling

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROBE = 2  # layers


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(60, VOCABULARY - 10, count).tolist()


def branch(group: str, index: int, **options: Any) -> dict[str, Any]:
    return {"group": f"blends, {group}", "branch": index, "branches": 16, "share": "blend", **options}


def pair(seed: int) -> tuple[list[int], list[int]]:
    """Two prompts with other openings and the same material, in two parts, one token of it changed."""
    material = words(seed, 200)
    changed = [*material[:90], 55, *material[91:]]
    return [*words(seed + 1, 17), *material], [
        *words(seed + 2, 31),
        *changed[:120],
        *words(seed + 3, 6),
        *changed[120:],
    ]


def eager_logprobs(
    six_layers: SixLayers, donor: list[int], prompt: list[int], share: float, page: int = 1, own: int = PROBE
) -> tuple[torch.Tensor, int]:
    """What plain tensors make of a blend: log-probabilities, and how many tokens were taken over."""
    source = torch.from_numpy(align(donor, prompt, 16).source)
    source[source >= len(donor) // page * page] = -1  # the tree keeps whole pages
    prefilled = six_layers.eager.prefill(donor)
    choice = served_choice(threshold=0.0, share=share)
    found = six_layers.eager.blend(prompt, prefilled, source, choice, probe=PROBE, own=own)
    return found.logits[-1].log_softmax(-1), int((~found.computed).sum())


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_a_blend_is_what_the_plain_computation_gives(served: Served, six_layers: SixLayers, share: float) -> None:
    served.flush()
    donor, prompt = pair(10)
    served.ask(donor, branch(f"plain {share}", 0))
    answer = served.ask(prompt, branch(f"plain {share}", 1, recompute=share, deviation=0.0))
    expected, taken = eager_logprobs(six_layers, donor, prompt, share)
    report = report_of(answer)
    assert (report["mode"], report["taken_tokens"]) == ("blend", taken)
    assert report["taken_tokens"] + report["computed_tokens"] == len(prompt)
    assert 199 >= report["aligned_tokens"] >= taken > 20
    for token, value in logprobs_of(answer).items():
        assert value == pytest.approx(float(expected[token]), abs=2e-3)


def test_recomputing_everything_is_the_exact_prefill(served: Served) -> None:
    served.flush()
    donor, prompt = pair(20)
    exact = logprobs_of(served.ask(prompt))
    served.flush()
    served.ask(donor, branch("all", 0))
    answer = served.ask(prompt, branch("all", 1, recompute=1.0, deviation=1e-9))
    assert report_of(answer)["mode"] == "blend" and report_of(answer)["taken_tokens"] == 0
    assert logprobs_of(answer) == pytest.approx(exact, abs=1e-4)
    served.flush()
    served.ask(donor, branch("nothing", 0))
    without = report_of(served.ask(prompt, branch("nothing", 1, recompute=1.0)))
    assert without["mode"] == "exact" and without["declined"] == TOO_FEW_TAKEN, "it would save nothing"


def test_blended_kv_is_never_found_by_a_request_that_did_not_ask_for_it(served: Served) -> None:
    served.flush()
    donor, prompt = pair(30)
    exact = logprobs_of(served.ask(prompt))
    served.flush()
    served.ask(donor, branch("own", 0))
    first = served.ask(prompt, branch("own", 1, recompute=0.0))
    assert report_of(first)["taken_tokens"] > 100
    found = []
    for options in (None, branch("own", 2, share="exact"), branch("own", 3, share="auto")):
        answer = served.ask(prompt, options)
        found.append(answer["meta_info"]["cached_tokens"])
        assert logprobs_of(answer) == pytest.approx(exact, abs=1e-5)
    assert found == [0, len(prompt) - 1, len(prompt) - 1], "the first finds nothing, the others its exact KV"
    again = served.ask(prompt, branch("own", 4))
    assert report_of(again)["mode"] == "exact", "exact KV of the same prompt is there now, and is better"


def test_a_fork_that_comes_back_finds_its_blended_kv_without_a_probe(served: Served) -> None:
    served.flush()
    donor, prompt = pair(40)
    served.ask(donor, branch("back", 0))
    first = served.ask(prompt, branch("back", 1))
    again = served.ask(prompt, branch("back", 1))
    report = report_of(again)
    assert (report["mode"], report["reused_tokens"]) == ("blend", 0)
    assert report["blended_before_tokens"] == len(prompt) - 1
    assert logprobs_of(again) == pytest.approx(logprobs_of(first), abs=1e-4)
    verification = served.ask([*prompt, 77, 78], {"op": "verify", "group": "back", "share": "blend"})
    assert report_of(verification)["blended_before_tokens"] >= len(prompt)


def material(seed: int) -> tuple[list[int], list[int]]:
    """Two prompts with other openings and 500 tokens of the same material."""
    return [*words(seed + 1, 17), *words(seed, 500)], [*words(seed + 2, 31), *words(seed, 500)]


def test_auto_takes_identical_prefixes_only_and_says_so(served: Served) -> None:
    served.flush()
    donor, prompt = material(110)
    auto = branch("auto", 0, share="auto")
    served.ask(donor, auto)
    report = report_of(served.ask(prompt, {**auto, "branch": 1}))
    assert (report["mode"], report["declined"]) == ("exact", "share auto takes identical prefixes only")
    assert "taken_tokens" not in report
    same = report_of(served.ask(donor, {**auto, "branch": 2}))
    assert (same["mode"], same["reused_tokens"]) == ("exact", len(donor) - 1) and "declined" not in same
    blended = report_of(served.ask(prompt[:-1], {**auto, "branch": 3, "share": "blend"}))
    assert blended["mode"] == "exact", "its KV is there, exactly"
    served.flush()
    served.ask(donor, auto)
    asked = report_of(served.ask(prompt, {**auto, "branch": 1, "share": "blend"}))
    assert asked["mode"] == "blend" and asked["taken_tokens"] > 400


def check_that_blended_kv_is_never_called_exact(server: Served) -> None:
    """A prompt's log-probabilities need exact KV of every token, so such a request is kept from blended KV."""
    server.flush()
    donor, prompt = material(150)
    exact = server.ask(prompt, logprob_start_len=0)["meta_info"]
    for start in (0, 300):
        server.flush()
        server.ask(donor, branch("honest", 0))
        first = report_of(server.ask(prompt, branch("honest", 1, recompute=0.0)))
        assert first["mode"] == "blend" and first["taken_tokens"] > 400
        again = server.ask(prompt, branch("honest", 1), tokens=4, logprob_start_len=start)["meta_info"]
        assert again["rksc"]["mode"] == "exact" and "log-probabilities" in again["rksc"]["declined"]
        found = [value for value, *_ in again["input_token_logprobs"][1:]]
        right = [value for value, *_ in exact["input_token_logprobs"][start + 1 :]]
        assert len(found) == len(prompt) - start - 1 and found == pytest.approx(right, abs=2e-3)
        later = report_of(server.ask(prompt, branch("honest", 1)))
        assert later["mode"] == "exact", "its exact KV is there now"


def test_what_reads_or_writes_blended_kv_is_never_called_exact(served: Served) -> None:
    check_that_blended_kv_is_never_called_exact(served)


def computed(answers: Sequence[Any]) -> int:
    """Prompt tokens that were computed for these answers."""
    metas = [answer["meta_info"] for answer in answers]
    taken = sum((meta.get("rksc") or {}).get("taken_tokens", 0) for meta in metas)
    return sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas) - taken


@pytest.mark.parametrize("share", ["exact", "auto"])
@pytest.mark.parametrize("common", [30, 240])
def test_a_common_beginning_is_computed_once_however_many_arrive_together(
    served: Served, share: str, common: int
) -> None:
    served.flush()
    prompts = [[*words(160, common), *words(161 + index, 5)] for index in range(8)]
    group = [branch(f"together {share} {common}", index, share=share) for index in range(8)]
    assert computed(served.ask_together(prompts, group)) == common + 8 * 5
    served.flush()
    same = [branch(f"the same {share} {common}", index, share=share) for index in range(8)]
    assert computed(served.ask_together([prompts[0]] * 8, same)) == len(prompts[0]) + 7
    served.flush()
    assert computed(served.ask_together(prompts, [None] * 8)) > 2 * (common + 8 * 5), "without a fork it is not"


def test_branches_whose_grammars_are_compiled_first_are_placed_as_others_are(served: Served) -> None:
    served.flush()
    prompts = [[*words(165, 240), *words(166 + index, 5)] for index in range(6)]
    params = [
        {**sampling(branch("grammars", index, share="exact"), 3), "regex": f"[a-z]{{3,{40 + index}}}"}
        for index in range(6)
    ]
    answers = served.post({"input_ids": prompts, "sampling_params": params}).json()
    # Grammars are ready at different times: whoever comes first is the anchor, and the others find what it computed.
    assert computed(answers) == 240 + 6 * 5
    assert all(report_of(answer)["mode"] == "exact" for answer in answers)


@pytest.mark.parametrize(("common", "waiting"), [(PASS_TOKENS["cpu"] - 1, 0), (PASS_TOKENS["cpu"], 1)])
def test_a_beginning_is_waited_for_only_where_it_is_worth_a_pass(served: Served, common: int, waiting: int) -> None:
    served.flush()
    prompts = [[*words(170, common), *words(171 + index, 20)] for index in range(2)]
    options = [branch(f"worth {common}", index, share="auto") for index in range(2)]
    reports = [report_of(answer) for answer in served.ask_together(prompts, options)]
    assert sum("waited_passes" in report for report in reports) == waiting


def test_no_certificate_is_used_on_blended_kv(served: Served) -> None:
    served.flush()
    donor, prompt = material(140)
    fork = branch("certified", 0)
    served.ask(donor, fork)
    served.ask(prompt, branch("certified", 1))
    asked = {**fork, "op": "verify"}
    on_blended = report_of(served.ask([*prompt, 77, 78], {**asked, "branch": 1}))
    assert on_blended["mode"] == "blend" and "the certificate is of exact KV" in on_blended["exit"]["reason"]
    on_exact = report_of(served.ask([*donor, 77, 78], asked))
    assert on_exact["mode"] == "exact" and "profile" in on_exact["exit"]["reason"]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        pytest.param([*words(71, 150), *words(70, 200)[:40]], {}, id="a fifth is equal"),
        pytest.param([1, *words(70, 200)], {"minimum_span": 500}, id="no span is long enough"),
    ],
)
def test_a_branch_that_shares_too_little_is_prefilled_and_says_why(
    served: Served, prompt: list[int], options: dict[str, Any]
) -> None:
    served.flush()
    group = f"declined {len(options)}"
    served.ask(words(70, 200), branch(group, 0))
    report = report_of(served.ask(prompt, branch(group, 1, **options)))
    assert (report["mode"], report["declined"]) == ("exact", "too few tokens align for what is cached")


def test_a_donor_that_was_flushed_is_gone_and_the_next_branch_is_the_anchor(served: Served) -> None:
    donor, prompt = pair(80)
    served.ask(donor, branch("flushed", 0))
    served.flush()
    report = report_of(served.ask(prompt, branch("flushed", 1)))
    assert report["mode"] == "exact" and "gone" in report["declined"]
    later = report_of(served.ask(donor, branch("flushed", 2)))
    assert later["mode"] == "blend" and later["taken_tokens"] > 0


def test_forks_of_other_namespaces_never_give_each_other_kv(served: Served) -> None:
    served.flush()
    donor, prompt = pair(90)
    served.ask(donor, branch("spaces", 0), extra_key="a")
    for extra in ({"extra_key": "b"}, {}, {"cache_salt": "a"}):
        report = report_of(served.ask(prompt, branch("spaces", 1), **extra))
        assert "taken_tokens" not in report
    assert report_of(served.ask(prompt, branch("spaces", 2), extra_key="a"))["taken_tokens"] > 0


def test_the_namespace_of_blended_kv_cannot_be_asked_for(served: Served) -> None:
    response = served.ask([1, 2, 3], extra_key="\x1frksc-blended")
    assert response.status_code == 400 and "extra_key" in response.text


def check_log_probabilities_of_the_prompt(server: Served, six_layers: SixLayers) -> None:
    server.flush()
    donor, prompt = pair(100)
    server.ask(donor, branch("logprobs", 0))
    answer = server.ask(prompt, branch("logprobs", 1), logprob_start_len=0)
    assert "log-probabilities" in report_of(answer)["declined"]
    expected = six_layers.logprobs(prompt)[range(len(prompt) - 1), prompt[1:]].tolist()
    found = [value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]]
    assert found == pytest.approx(expected, abs=2e-3)


def test_log_probabilities_of_the_prompt_need_every_token(served: Served, six_layers: SixLayers) -> None:
    check_log_probabilities_of_the_prompt(served, six_layers)


def test_random_forks_aborts_and_flushes_lose_no_slot(served: Served) -> None:
    """SGLang checks its pools whenever it is idle, and ends the process where a slot is lost."""
    source = random.Random(5)
    happened: Counter[str] = Counter()
    aborted = served.total(metrics.REQUESTS, reason="aborted")

    def step(number: int) -> None:
        fork = number // 3  # a donor, and two branches that may take from it
        donor, prompt = pair(1000 + 10 * fork)
        options = branch(f"random {fork}", number % 3, recompute=source.choice([0.0, 0.15, 0.5]))
        read = source.choice([0.01, 0.05, 20.0])
        body = {
            "input_ids": prompt if number % 3 else donor,
            "sampling_params": sampling(options, source.choice([0, 1, 12])),
            "rid": f"random {number:04d}",
        }
        if number % 5 == 0:
            served.abort(f"random {max(0, number - source.randint(0, 4)):04d}")
        if number % 23 == 0:  # while others run
            status = httpx.post(f"{served.process.url}/flush_cache", timeout=30.0).status_code
            happened["flushed" if status == 200 else "flush refused"] += 1
        try:
            answer = served.post(body, read).json()
        except httpx.ReadTimeout:  # a client that went away
            happened["gone"] += 1
        else:
            happened[answer["meta_info"].get("rksc", {"mode": "aborted"})["mode"]] += 1

    for begin in range(0, 300, 60):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(step, range(begin, begin + 60)))
        served.check_pool()
        served.flush()
    assert served.total(metrics.REQUESTS, reason="aborted") > aborted, "nothing was aborted in the middle"
    assert all(happened[what] for what in ("gone", "blend", "exact", "flush refused")), happened
    donor, prompt = pair(2000)
    served.ask(donor, branch("after", 0))
    assert report_of(served.ask(prompt, branch("after", 1)))["taken_tokens"] > 0


def test_blends_on_other_servers_are_what_the_plain_computation_gives(variant: Served, six_layers: SixLayers) -> None:
    variant.flush()
    donor, prompt = pair(10)
    variant.ask(donor, branch("flags", 0))
    share = 0.0 if {"--tp", "--chunked-prefill-size"} & set(variant.process.args) else 0.15  # rank 0's heads choose
    answer = variant.ask(prompt, branch("flags", 1, recompute=share))
    report = report_of(answer)
    assert report["mode"] == "blend" and report["taken_tokens"] > 100 and "declined" not in report
    if "--chunked-prefill-size" not in variant.process.args:  # in chunks, other tokens are the last of their pass
        expected, taken = eager_logprobs(six_layers, donor, prompt, share, variant.page)
        assert report["taken_tokens"] == taken
        for token, value in logprobs_of(answer).items():
            assert value == pytest.approx(float(expected[token]), abs=2e-3)
    exact = variant.ask(prompt)
    assert exact["meta_info"]["cached_tokens"] == 0
    plain = six_layers.logprobs(prompt)[-1]
    for token, value in logprobs_of(exact).items():
        assert value == pytest.approx(float(plain[token]), abs=2e-3)
    variant.check_pool()


def test_on_other_servers_too_log_probabilities_of_a_prompt_never_come_from_blended_kv(
    variant: Served, six_layers: SixLayers
) -> None:
    """With chunks of 64 tokens above all: the tree's slots of a chunk may be taken over by the next one."""
    check_that_blended_kv_is_never_called_exact(variant)
    check_log_probabilities_of_the_prompt(variant, six_layers)
    variant.check_pool()


def shifted(seed: int) -> tuple[list[int], list[int]]:
    """Two prompts of the same material, the first with the longer opening."""
    material = words(seed, 400)
    return [*words(seed + 1, 31), *material], [*words(seed + 2, 17), *material]


def test_a_branch_with_a_shorter_opening_uses_its_donors_slots(served: Served, six_layers: SixLayers) -> None:
    served.flush()
    donor, prompt = shifted(500)
    served.ask(donor, branch("slots", 0))
    before = served.stats()
    answer = served.ask(prompt, branch("slots", 1, deviation=0.0))
    expected, taken = eager_logprobs(
        six_layers, donor, prompt, 0.1, own=1
    )  # it attends in the second layer to the donor's
    report = report_of(answer)
    assert report["taken_tokens"] == report["shared_slots"] == taken > 300
    for token, value in logprobs_of(answer).items():
        assert value == pytest.approx(float(expected[token]), abs=2e-3)
    served.settle()
    after = served.stats()
    used = before["pool"]["full_available_size"] - after["pool"]["full_available_size"]
    assert used == len(prompt) - taken, "it owns what it computes, and no more"
    assert after["slots"] == {"refusal": None, "surplus": taken}
    again = served.ask(prompt, branch("slots", 1))
    assert report_of(again)["blended_before_tokens"] == len(prompt) - 1, "it is found where it stands"
    once_more = served.ask(prompt, branch("slots", 1))
    assert logprobs_of(again) == pytest.approx(logprobs_of(once_more), abs=1e-5)
    first, then = logprobs_of(answer), logprobs_of(again)
    apart = [abs(first[token] - then[token]) for token in first.keys() & then.keys()]
    assert len(apart) > len(first) / 2 and float(np.median(apart)) < 0.5, "of six layers two have the donor's KV now"
    verification = served.ask(
        [*prompt, 77, 78], {"op": "verify", "group": branch("slots", 1)["group"], "share": "blend"}
    )
    assert report_of(verification)["blended_before_tokens"] >= len(prompt)
    served.check_pool()


def test_a_branch_with_a_longer_opening_copies(served: Served) -> None:
    served.flush()
    prompt, donor = shifted(520)
    served.ask(donor, branch("copies", 0))
    report = report_of(served.ask(prompt, branch("copies", 1)))
    assert report["taken_tokens"] > 300 and report["shared_slots"] == 0
    assert served.stats()["slots"]["surplus"] == 0


def test_slots_outlive_the_donor_that_they_are_from(served: Served) -> None:
    """The donor is evicted first; the branch that uses its slots reads what it read before."""
    served.flush()
    donor, prompt = shifted(540)
    served.ask(donor, branch("outlives", 0, share="blend"))
    first = served.ask(prompt, branch("outlives", 1), tokens=8)
    assert report_of(first)["shared_slots"] > 300
    longer = [*prompt, *first["output_ids"]]
    held = served.ask(longer, branch("outlives", 1), tokens=4)
    body = {"group": branch("outlives", 1)["group"]}  # its leases end
    httpx.post(f"{served.process.url}/rksc/end_fork", json=body, timeout=30.0).raise_for_status()
    verify = {"op": "verify", "share": "blend", **body}
    for seed in range(560, 560 + served.pool // 800):  # nothing of the donor is used meanwhile, the branch's own KV is
        served.ask(words(seed, 900))
        assert report_of(served.ask([*longer, 77], verify))["blended_before_tokens"] >= len(longer) - 1
    assert served.ask(donor)["meta_info"]["cached_tokens"] == 0, "the donor is gone"
    assert served.ask(longer, branch("outlives", 1), tokens=4)["output_ids"] == held["output_ids"]
    served.check_pool()


def test_tokens_after_a_shifted_prompt_stand_where_they_would(served: Served) -> None:
    """With everything computed a shifted branch is the plain request, whatever it generates."""
    served.flush()
    donor, prompt = shifted(610)
    plain = served.ask(prompt, tokens=24)
    served.flush()
    served.ask(donor, branch("all slots", 0))
    answer = served.ask(prompt, branch("all slots", 1, recompute=0.5, deviation=1e-9), tokens=24)
    assert report_of(answer)["shared_slots"] > 100
    served.flush()
    served.ask(donor, branch("everything", 0))
    exact = served.ask(prompt, branch("everything", 1, recompute=1.0, deviation=1e-9), tokens=24)
    assert report_of(exact)["mode"] == "blend" and report_of(exact)["taken_tokens"] == 0
    assert exact["output_ids"] == plain["output_ids"]
    assert logprobs_of(exact) == pytest.approx(logprobs_of(plain), abs=1e-4)
