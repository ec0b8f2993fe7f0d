"""Blends and waiting siblings on a real server of a random six-layer Llama, against plain tensors."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.similarity.alignment import align
from rksc_sgl.similarity.number_tokens import number_tokens
from rksc_sgl.testing import write_tiny_model
from rksc_sgl.testing.eager_blend import EagerLlama

pytestmark = [pytest.mark.server, pytest.mark.slow]

LAYERS, PROBE, VOCABULARY = 6, 2, 512
TOP = 40


@dataclass(frozen=True)
class Served:
    """A server, and its model in transformers."""

    process: ServerProcess
    eager: EagerLlama
    numbers: NDArray[np.bool_]
    model: Path

    def flush(self) -> None:
        assert httpx.post(f"{self.process.url}/flush_cache", timeout=30.0).status_code == 200

    def ask(self, prompt: Sequence[int], options: dict[str, Any] | None = None, tokens: int = 1, **extra: Any) -> Any:
        sampling: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0}
        if options is not None:
            sampling["custom_params"] = {"rksc": options}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": TOP}
        response = httpx.post(f"{self.process.url}/generate", json={**body, **extra}, timeout=120.0)
        return response.json() if response.status_code == 200 else response


def logprobs_of(answer: Any) -> dict[int, float]:
    return {token: value for value, token, *_ in answer["meta_info"]["output_top_logprobs"][0]}


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(60, VOCABULARY - 10, count).tolist()


def branch(group: str, index: int, **options: Any) -> dict[str, Any]:
    return {"group": group, "branch": index, "branches": 16, "share": "blend", **options}


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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import transformers

    model = write_tiny_model(tmp_path_factory.mktemp("blends") / "six-layers", num_hidden_layers=LAYERS)
    with ServerProcess(server_arguments(["--model-path", str(model), "--max-total-tokens", "6000"])) as process:
        oracle = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").float().eval()
        numbers = number_tokens(transformers.AutoTokenizer.from_pretrained(model), VOCABULARY)
        yield Served(process, EagerLlama(oracle), numbers, model)


def eager_logprobs(
    served: Served, donor: list[int], prompt: list[int], share: float, page: int = 1
) -> tuple[torch.Tensor, int]:
    source = torch.from_numpy(align(donor, prompt, 16).source)
    source[source >= len(donor) // page * page] = -1  # the tree keeps whole pages
    number = torch.from_numpy(served.numbers[prompt])
    prefilled = served.eager.prefill(donor)
    found = served.eager.blend(prompt, prefilled, source, number, probe=PROBE, threshold=0.0, share=share)
    return found.logits.log_softmax(-1), int((~found.computed).sum())


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_a_blend_is_what_the_plain_computation_gives(served: Served, share: float) -> None:
    served.flush()
    donor, prompt = pair(10)
    served.ask(donor, branch(f"plain {share}", 0))
    answer = served.ask(prompt, branch(f"plain {share}", 1, recompute=share, deviation=0.0))
    expected, taken = eager_logprobs(served, donor, prompt, share)
    report = answer["meta_info"]["rksc"]
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
    answer = served.ask(prompt, branch("all", 1, recompute=1.0, deviation=0.0))
    assert answer["meta_info"]["rksc"]["taken_tokens"] == 0
    assert logprobs_of(answer) == pytest.approx(exact, abs=1e-4)


def test_blended_kv_is_never_found_by_a_request_that_did_not_ask_for_it(served: Served) -> None:
    served.flush()
    donor, prompt = pair(30)
    exact = logprobs_of(served.ask(prompt))
    served.flush()
    served.ask(donor, branch("own", 0))
    first = served.ask(prompt, branch("own", 1, recompute=0.0))
    assert first["meta_info"]["rksc"]["taken_tokens"] > 100
    for options in (None, branch("own", 2, share="exact"), branch("own", 3, share="auto")):
        answer = served.ask(prompt, options)
        assert answer["meta_info"]["cached_tokens"] in (0, len(prompt) - 1)  # the second finds the first's exact KV
        assert logprobs_of(answer) == pytest.approx(exact, abs=1e-5)
    again = served.ask(prompt, branch("own", 4))
    assert again["meta_info"]["rksc"]["mode"] == "exact", "exact KV of the same prompt is there now, and is better"


def test_a_fork_that_comes_back_finds_its_blended_kv_without_a_probe(served: Served) -> None:
    served.flush()
    donor, prompt = pair(40)
    served.ask(donor, branch("back", 0))
    first = served.ask(prompt, branch("back", 1))
    again = served.ask(prompt, branch("back", 1))
    report = again["meta_info"]["rksc"]
    assert (report["mode"], report["reused_tokens"]) == ("blend", 0)
    assert report["blended_before_tokens"] == len(prompt) - 1
    assert logprobs_of(again) == pytest.approx(logprobs_of(first), abs=1e-4)
    verification = served.ask([*prompt, 77, 78], {"op": "verify", "group": "back", "share": "blend"})
    assert verification["meta_info"]["rksc"]["blended_before_tokens"] >= len(prompt)


def test_a_changed_token_is_always_computed_from_the_branch_itself(served: Served) -> None:
    donor, prompt = pair(50)
    place = next(i for i, (a, b) in enumerate(zip(prompt[31:], words(50, 200), strict=False)) if a != b) + 31
    assert align(donor, prompt, 16).source[place] == -1


def material(seed: int) -> tuple[list[int], list[int]]:
    """Two prompts with other openings and 500 tokens of the same material."""
    return [*words(seed + 1, 17), *words(seed, 500)], [*words(seed + 2, 31), *words(seed, 500)]


def test_auto_blends_a_fork_with_long_material_and_nothing_else(served: Served) -> None:
    served.flush()
    donor, prompt = material(110)
    auto = {"branches": 16}
    served.ask(donor, {**auto, "group": "auto"})
    alone = served.ask(prompt, {"op": "branch"})["meta_info"]["rksc"]
    assert alone["mode"] == "exact" and "declined" not in alone, "without a group there is nobody to share with"
    served.flush()
    served.ask(donor, {**auto, "group": "auto"})
    first = served.ask(prompt, {**auto, "group": "auto", "branch": 1})
    report = first["meta_info"]["rksc"]
    assert report["mode"] == "blend" and report["taken_tokens"] > 400
    again = served.ask(prompt, {**auto, "group": "auto", "branch": 1})["meta_info"]["rksc"]
    assert (again["mode"], again["blended_before_tokens"]) == ("blend", len(prompt) - 1) and "declined" not in again
    same = served.ask(donor, {**auto, "group": "auto", "branch": 2})["meta_info"]["rksc"]
    assert (same["mode"], same["reused_tokens"]) == ("exact", len(donor) - 1) and "declined" not in same
    exact = served.ask(prompt, {**auto, "group": "auto", "branch": 3, "share": "exact"})["meta_info"]
    assert exact["cached_tokens"] == 0 and exact["rksc"]["mode"] == "exact"
    short_donor, short = pair(120)
    served.ask(short_donor, {**auto, "group": "short"})
    declined = served.ask(short, {**auto, "group": "short", "branch": 1})["meta_info"]["rksc"]
    assert (declined["mode"], declined["declined"]) == ("exact", "share auto blends from 256 tokens on")


def test_siblings_of_auto_wait_for_what_they_blend_with(served: Served) -> None:
    served.flush()
    prompts = [[*words(130 + index, 20 + index), *words(129, 500)] for index in range(4)]
    options = [{"group": "auto waits", "branch": index, "branches": 4} for index in range(4)]
    sampling = [{"max_new_tokens": 1, "custom_params": {"rksc": one}} for one in options]
    body = {"input_ids": prompts, "sampling_params": sampling}
    answers = httpx.post(f"{served.process.url}/generate", json=body, timeout=120.0).json()
    reports = [answer["meta_info"]["rksc"] for answer in answers]
    assert sorted(report["mode"] for report in reports) == ["blend"] * 3 + ["exact"]


def test_no_certificate_is_used_on_blended_kv(served: Served) -> None:
    served.flush()
    donor, prompt = material(140)
    served.ask(donor, {"group": "certified", "branches": 2})
    served.ask(prompt, {"group": "certified", "branch": 1, "branches": 2})
    asked = {"group": "certified", "branches": 2, "op": "verify"}
    on_blended = served.ask([*prompt, 77, 78], {**asked, "branch": 1})["meta_info"]["rksc"]
    assert on_blended["mode"] == "blend" and "the certificate is of exact KV" in on_blended["exit"]["reason"]
    on_exact = served.ask([*donor, 77, 78], asked)["meta_info"]["rksc"]
    assert on_exact["mode"] == "exact" and "profile" in on_exact["exit"]["reason"]


def test_siblings_that_arrive_together_wait_for_one_prefill(served: Served) -> None:
    served.flush()
    common = words(60, 600)
    prompts = [[*common, *words(61 + index, 5)] for index in range(6)]

    def computed(options: Sequence[dict[str, Any] | None]) -> int:
        sampling = [{"max_new_tokens": 1, "custom_params": {"rksc": one} if one else {}} for one in options]
        body = {"input_ids": prompts, "sampling_params": sampling}
        answers = httpx.post(f"{served.process.url}/generate", json=body, timeout=120.0).json()
        metas = [answer["meta_info"] for answer in answers]
        taken = sum((meta.get("rksc") or {}).get("taken_tokens", 0) for meta in metas)
        return sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas) - taken

    together = computed([branch("together", index, share="auto") for index in range(6)])
    assert together <= len(common) + 6 * 5 + 6 * 16
    served.flush()
    apart = computed([None] * 6)
    assert apart >= together


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (branch("declined", 1), "too few tokens align"),
        (branch("declined", 1, minimum_span=500), "too few tokens align"),
    ],
)
def test_a_branch_that_shares_too_little_is_prefilled_and_says_why(served: Served, second: Any, said: str) -> None:
    served.flush()
    served.ask(words(70, 200), branch("declined", 0))
    prompt = [*words(71, 150), *words(70, 200)[:40]] if "minimum_span" not in second else [1, *words(70, 200)]
    answer = served.ask(prompt, second)
    report = answer["meta_info"]["rksc"]
    assert report["mode"] == "exact" and said in report["declined"]


def test_a_donor_that_was_flushed_is_gone_and_the_next_branch_is_the_anchor(served: Served) -> None:
    donor, prompt = pair(80)
    served.ask(donor, branch("flushed", 0))
    served.flush()
    report = served.ask(prompt, branch("flushed", 1))["meta_info"]["rksc"]
    assert report["mode"] == "exact" and "gone" in report["declined"]
    later = served.ask(donor, branch("flushed", 2))["meta_info"]["rksc"]
    assert later["mode"] == "blend" and later["taken_tokens"] > 0


def test_forks_of_other_namespaces_never_give_each_other_kv(served: Served) -> None:
    served.flush()
    donor, prompt = pair(90)
    served.ask(donor, branch("spaces", 0), extra_key="a")
    for extra in ({"extra_key": "b"}, {}, {"cache_salt": "a"}):
        report = served.ask(prompt, branch("spaces", 1), **extra)["meta_info"]["rksc"]
        assert "taken_tokens" not in report
    assert served.ask(prompt, branch("spaces", 2), extra_key="a")["meta_info"]["rksc"]["taken_tokens"] > 0


def test_the_namespace_of_blended_kv_cannot_be_asked_for(served: Served) -> None:
    response = served.ask([1, 2, 3], extra_key="\x1frksc-blended")
    assert response.status_code == 400 and "extra_key" in response.text


def test_log_probabilities_of_the_prompt_need_every_token(served: Served) -> None:
    served.flush()
    donor, prompt = pair(100)
    served.ask(donor, branch("logprobs", 0))
    answer = served.ask(prompt, branch("logprobs", 1), logprob_start_len=0)
    assert "log-probabilities" in answer["meta_info"]["rksc"]["declined"]
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(prompt)


def test_random_forks_aborts_and_flushes_lose_no_slot(served: Served) -> None:
    """SGLang checks its pools whenever it is idle, and ends the process where a slot is lost."""
    source = random.Random(5)

    def step(number: int) -> None:
        donor, prompt = pair(1000 + number % 7)
        options = branch(f"random {number % 5}", number % 16, recompute=source.choice([0.0, 0.15, 1.0]))
        read = source.choice([0.01, 0.05, 20.0])
        body = {
            "input_ids": prompt if number % 3 else donor,
            "sampling_params": {"max_new_tokens": source.choice([0, 1, 12]), "custom_params": {"rksc": options}},
        }
        if number % 23 == 0:
            httpx.post(f"{served.process.url}/flush_cache", timeout=30.0)
        with contextlib.suppress(httpx.ReadTimeout):  # a client that went away: what this is about
            httpx.post(f"{served.process.url}/generate", json=body, timeout=httpx.Timeout(30.0, read=read))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(step, range(300)))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        (load,) = served.process.get_json("/v1/loads?include=core")["loads"]
        if not load["num_running_reqs"] and not load["num_waiting_reqs"]:
            break
        time.sleep(0.2)
    time.sleep(2.0)
    served.flush()
    donor, prompt = pair(2000)
    served.ask(donor, branch("after", 0))
    assert served.ask(prompt, branch("after", 1))["meta_info"]["rksc"]["taken_tokens"] > 0
    (load,) = served.process.get_json("/v1/loads?include=core")["loads"]
    assert load["num_used_tokens"] == 0
    assert served.process.returncode is None


@pytest.mark.parametrize("flags", [("--tp", "2"), ("--page-size", "16"), ("--chunked-prefill-size", "64")])
def test_blends_on_two_ranks_on_larger_pages_and_in_chunks(served: Served, flags: tuple[str, ...]) -> None:
    arguments = ["--model-path", str(served.model), "--max-total-tokens", "6000", *flags]
    with ServerProcess(server_arguments(arguments)) as process:
        other = Served(process, served.eager, served.numbers, served.model)
        donor, prompt = pair(10)
        other.ask(donor, branch("flags", 0))
        answer = other.ask(prompt, branch("flags", 1, recompute=0.0))
        report = answer["meta_info"]["rksc"]
        assert report["mode"] == "blend" and report["taken_tokens"] > 100 and "declined" not in report
        if "--chunked-prefill-size" not in flags:  # in chunks, other tokens are the last of their pass
            expected, taken = eager_logprobs(served, donor, prompt, 0.0, 16 if "--page-size" in flags else 1)
            assert report["taken_tokens"] == taken
            for token, value in logprobs_of(answer).items():
                assert value == pytest.approx(float(expected[token]), abs=2e-3)
        exact = other.ask(prompt)
        assert exact["meta_info"]["cached_tokens"] == 0
        plain = served.eager.prefill(prompt).logits.log_softmax(-1)
        for token, value in logprobs_of(exact).items():
            assert value == pytest.approx(float(plain[token]), abs=2e-3)
