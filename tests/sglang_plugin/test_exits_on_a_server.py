"""Early exit on a real server of a random six-layer Llama, against the same layers computed by transformers."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from rksc_sgl.calibration.profile import Profile
from rksc_sgl.calibration.readout import LinearReadout
from rksc_sgl.calibration.thresholds import CONFIRMATION, CertifiedPoint
from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.exit_profiles import server_fingerprint
from rksc_sgl.testing import write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.slow]

LAYERS, HIDDEN = 6, 64
YES, NO = (40, 41), (50,)
SURE = (300, 301, 302, 303)  # the question whose profile lets everyone leave after two layers
SOME = (310, 311, 312)  # the one whose profile lets some leave after three layers, some later, some never
AUDIT_RATE = 0.5


@dataclass(frozen=True)
class Served:
    """A server, and the model that it serves in transformers."""

    url: str
    oracle: Any
    some: Profile
    process: ServerProcess
    home: Path

    def states(self, prompt: Sequence[int]) -> dict[int, np.ndarray]:
        """By layer: the last position with the final norm applied."""
        with torch.no_grad():
            found = self.oracle(torch.tensor([list(prompt)]), output_hidden_states=True).hidden_states
            return {layer: self.oracle.model.norm(found[layer])[0, -1].numpy() for layer in range(1, LAYERS)}

    def margin(self, prompt: Sequence[int]) -> float:
        """At full depth."""
        with torch.no_grad():
            logits = self.oracle(torch.tensor([list(prompt)])).logits[0, -1]
        return float(logits[list(YES)].logsumexp(0) - logits[list(NO)].logsumexp(0))

    def generate(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any] | None], **extra: Any) -> Any:
        sampling = [
            {"max_new_tokens": 1, "temperature": 0, **({} if one is None else {"custom_params": {"rksc": one}})}
            for one in options
        ]
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": sampling,
            "return_logprob": [True] * len(prompts),
            "token_ids_logprob": [[*YES, *NO]] * len(prompts),
            **extra,
        }
        response = httpx.post(f"{self.url}/generate", json=body, timeout=120.0)
        return response.json() if response.status_code == 200 else response

    def exits(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[dict[str, Any]]:
        answers = self.generate(prompts, [{"op": "verify", **options}] * len(prompts))
        return [{**one["meta_info"]["rksc"]["exit"], "said": said_margin(one)} for one in answers]


def said_margin(answer: dict[str, Any]) -> float:
    """What the label tokens' log-probabilities say."""
    found = {token: value for value, token, *_ in answer["meta_info"]["output_token_ids_logprobs"][0]}
    return float(np.logaddexp.reduce([found[t] for t in YES]) - np.logaddexp.reduce([found[t] for t in NO]))


def load_of(served: Served) -> dict[str, int]:
    (load,) = served.process.get_json("/v1/loads?include=core")["loads"]
    return {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs")}


def prompt_of(seed: int, question: Sequence[int], length: int = 20) -> list[int]:
    return [*np.random.default_rng(seed).integers(60, 290, length).tolist(), *question]


def profile_of(model: Path, question: Sequence[int], readouts: dict[int, LinearReadout], t: float) -> Profile:
    point = CertifiedPoint(0.01, "verdict", t, 0.0, 0.0, 0.5, 100, 100, "group")
    return Profile(server_fingerprint(model, "float32"), tuple(question), YES, NO, LAYERS, readouts, (point,), 0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import transformers

    home = tmp_path_factory.mktemp("exits")
    model = write_tiny_model(home / "six-layers", num_hidden_layers=LAYERS)
    weight = np.random.default_rng(5).normal(size=HIDDEN).astype(np.float32)
    always = LinearReadout(weight * 0, 3.0, 1.0)
    sure = profile_of(model, SURE, {1: always, 2: always, 4: LinearReadout(weight, 0.0, 1.0)}, 1.0)
    readouts = {1: weight, 3: weight, 4: np.roll(weight, 1), 5: np.roll(weight, 1)}
    some = profile_of(model, SOME, {at: LinearReadout(one, 0.0, 4.0) for at, one in readouts.items()}, 1.0)
    for profile in (sure, some):
        profile.save(home / "cache" / "rksc" / "profiles" / profile.file_name)
    variables = {"XDG_CACHE_HOME": str(home / "cache"), "RKSC_TRACE": "1", "RKSC_AUDIT_RATE": str(AUDIT_RATE)}
    arguments = ["--model-path", str(model), "--max-total-tokens", "8000", "--chunked-prefill-size", "64"]
    with ServerProcess(server_arguments(arguments), variables=variables) as server:
        oracle = transformers.AutoModelForCausalLM.from_pretrained(model).float().eval()
        yield Served(server.url, oracle, some, server, home)


def unaudited(served: Served, name: str) -> str:
    """A request id that the audit does not choose (see early_exit/audit.py)."""
    return next(rid for rid in (f"{name}-{n}" for n in range(100)) if not audited(rid))


def audited(rid: str) -> bool:
    return int.from_bytes(hashlib.sha256(rid.encode()).digest()[:8], "big") < AUDIT_RATE * 2**64


def leave(served: Served, prompts: Sequence[Sequence[int]], name: str, **options: Any) -> list[dict[str, Any]]:
    """Ask with request ids that are not audited."""
    rids = [unaudited(served, f"{name}{place}") for place in range(len(prompts))]
    answers = served.generate(prompts, [{"op": "verify", **options}] * len(prompts), rid=rids)
    return [{**one["meta_info"]["rksc"]["exit"], "said": said_margin(one), "meta": one["meta_info"]} for one in answers]


def expected_exit(served: Served, prompt: Sequence[int]) -> tuple[int, float] | None:
    """Layer and margin by the profile ``some``, from the oracle's states."""
    states, before = served.states(prompt), 0.0
    for layer, readout in served.some.readouts.items():
        margin = float(readout.predict(states[layer][None])[0])
        if abs(margin) >= readout.scale and np.sign(margin) * before >= CONFIRMATION * readout.scale:
            return layer, margin
        before = margin
    return None


def test_traces_are_the_states_that_transformers_computes(served: Served) -> None:
    prompts = [prompt_of(seed, (7, 8, 9), 20 + seed) for seed in range(3)]
    for prompt, report in zip(prompts, served.exits(prompts, exit="off", trace=[1, 3, 5]), strict=True):
        found = np.frombuffer(base64.b64decode(report["trace"]), "<f4").reshape(3, HIDDEN)
        states = served.states(prompt)
        np.testing.assert_allclose(found, np.stack([states[layer] for layer in (1, 3, 5)]), atol=2e-4)
        assert report["said"] == pytest.approx(served.margin(prompt), abs=1e-3)


def test_certain_verdicts_leave_and_their_margin_is_read_in_the_usual_place(served: Served) -> None:
    for report in leave(served, [prompt_of(seed, SURE) for seed in (10, 11)], "sure"):
        assert report["rule"], report
        assert (report["layer"], report["layers_saved"], report["layers"]) == (2, 4, LAYERS)
        assert (report["rule"], report["risk"], report["reason"]) == ("certified", 0.01, "")
        assert report["margin"] == 3.0
        assert report["said"] == pytest.approx(3.0, abs=1e-4)


def test_a_batch_of_mixed_exit_levels_equals_the_oracle(served: Served) -> None:
    prompts = [prompt_of(100 + seed, SOME, 10 + seed) for seed in range(12)]
    expected = [expected_exit(served, prompt) for prompt in prompts]
    levels = {None if one is None else one[0] for one in expected}
    assert None in levels and len(levels) >= 3, "the prompts must differ"
    for prompt, report, right in zip(prompts, leave(served, prompts, "some"), expected, strict=True):
        if right is None:
            assert report["layers_saved"] == 0
            assert report["said"] == pytest.approx(served.margin(prompt), abs=1e-3)
        else:
            assert report["layer"] == right[0]
            assert report["margin"] == pytest.approx(right[1], abs=1e-3)
            assert report["said"] == pytest.approx(right[1], abs=1e-3)


def test_ordinary_requests_in_the_same_batch_are_untouched(served: Served) -> None:
    plain = [prompt_of(200 + seed, (5, 6), 15) for seed in range(3)]
    checks = [prompt_of(210 + seed, SURE, 15) for seed in range(3)]
    httpx.post(f"{served.url}/flush_cache", timeout=30.0)
    alone = [served.generate([prompt], [None])[0] for prompt in plain]
    httpx.post(f"{served.url}/flush_cache", timeout=30.0)
    mixed = served.generate([*checks, *plain], [{"op": "verify"}] * 3 + [None] * 3)
    for first, second, prompt in zip(alone, mixed[3:], plain, strict=True):
        assert first["output_ids"] == second["output_ids"]
        assert said_margin(second) == pytest.approx(said_margin(first), abs=1e-4)
        assert said_margin(second) == pytest.approx(served.margin(prompt), abs=1e-3)
        assert "rksc" not in second["meta_info"]


def test_kv_of_one_that_left_is_never_found_again(served: Served) -> None:
    httpx.post(f"{served.url}/flush_cache", timeout=30.0)
    shared = prompt_of(300, (), 30)
    served.generate([shared], [None])
    prompt = [*shared, *SURE]
    (left,) = leave(served, [prompt], "kv")
    assert left["layer"] == 2
    (after,) = served.generate([[*prompt, 77, 78]], [None])
    assert after["meta_info"]["cached_tokens"] <= len(shared)
    assert said_margin(after) == pytest.approx(served.margin([*prompt, 77, 78]), abs=1e-3)


def test_a_prompt_prefilled_in_chunks_leaves_in_its_last_one(served: Served) -> None:
    prompt = prompt_of(400, SURE, 300)
    (report,) = leave(served, [prompt], "chunked")
    assert report["layer"] == 2
    (again,) = served.generate([prompt], [None])
    assert said_margin(again) == pytest.approx(served.margin(prompt), abs=1e-3)


def test_an_audited_exit_runs_to_full_depth_and_is_counted(served: Served) -> None:
    before = served.process.get_json("/rksc/info")["schedulers"][0]["exit"]
    rid = next(rid for rid in (f"audit-{n}" for n in range(100)) if audited(rid))
    prompt = prompt_of(500, SURE)
    (answer,) = served.generate([prompt], [{"op": "verify"}], rid=[rid])
    report = answer["meta_info"]["rksc"]["exit"]
    assert report["audited"] and report["foreseen"] == 3.0 and report["layers_saved"] == 0
    assert said_margin(answer) == pytest.approx(served.margin(prompt), abs=1e-3)
    after = served.process.get_json("/rksc/info")["schedulers"][0]["exit"]
    assert after["audited"] == before["audited"] + 1
    assert after["disagreed"] == before["disagreed"] + (served.margin(prompt) < 0)


@pytest.mark.parametrize(
    ("question", "options", "said"),
    [
        ((7, 8, 9), {}, "no profile covers this verification prompt"),
        (SURE, {"yes_ids": [1], "no_ids": [2]}, "no profile covers this verification prompt"),
        (SURE, {"exit": "off"}, "exit is off"),
        (SURE, {"exit": "published", "yes_ids": [9999], "no_ids": [3]}, "label token 9999 is not in the vocabulary"),
    ],
)
def test_what_cannot_leave_runs_at_full_depth_and_says_why(
    served: Served, question: tuple[int, ...], options: dict[str, Any], said: str
) -> None:
    prompt = prompt_of(600, question)
    (report,) = served.exits([prompt], **options)
    assert report["rule"] is None
    assert said in report["reason"]
    assert report["said"] == pytest.approx(served.margin(prompt), abs=1e-3)


def test_a_risk_that_is_not_certified_is_refused_with_what_is(served: Served) -> None:
    response = served.generate([prompt_of(700, SURE)], [{"op": "verify", "risk": 0.001}])
    assert response.status_code == 400
    assert "risk" in response.text and "0.01" in response.text


def test_more_tokens_or_logprobs_of_the_prompt_need_every_layer(served: Served) -> None:
    prompt = prompt_of(800, SURE)
    (answer,) = served.generate([prompt], [{"op": "verify"}], logprob_start_len=[0])
    assert "log-probabilities of the prompt" in answer["meta_info"]["rksc"]["exit"]["reason"]
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(prompt)
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 3, "custom_params": {"rksc": {"op": "verify"}}}}
    several = httpx.post(f"{served.url}/generate", json=body, timeout=60.0).json()
    assert "more than one token" in several["meta_info"]["rksc"]["exit"]["reason"]


def test_the_published_rule_says_that_it_certifies_nothing(served: Served) -> None:
    prompts = [prompt_of(900, (7, 8, 9))]
    loose = {"exit": "published", "theta": 100.0, "eps": 100.0, "yes_ids": list(YES), "no_ids": list(NO)}
    (report,) = served.exits(prompts, **loose)
    assert (report["rule"], report["risk"], report["layer"]) == ("published", None, 2)
    logits = served.states(prompts[0])[2] @ served.oracle.lm_head.weight.detach().numpy().T
    foreseen = np.logaddexp.reduce(logits[list(YES)]) - np.logaddexp.reduce(logits[list(NO)])
    assert report["said"] == pytest.approx(foreseen, abs=1e-3)
    (strict,) = served.exits(prompts, **{**loose, "theta": 1e-6})
    assert strict["layers_saved"] == 0


def test_clients_that_go_away_in_the_middle_leave_nothing_behind(served: Served) -> None:
    gone = 0
    for seed in range(30):
        prompts = [prompt_of(1000 + 7 * seed + n, SURE if n % 2 else SOME, 200) for n in range(4)]
        body = {
            "input_ids": prompts,
            "sampling_params": [{"max_new_tokens": 1, "custom_params": {"rksc": {"op": "verify"}}}] * 4,
        }
        try:
            httpx.post(f"{served.url}/generate", json=body, timeout=httpx.Timeout(5.0, read=0.002 * (1 + seed % 9)))
        except httpx.ReadTimeout:
            gone += 1
    assert gone >= 10
    deadline = time.monotonic() + 60
    while any(load_of(served).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    # SGLang checks its pools whenever it is idle and ends the process where a slot is lost.
    time.sleep(2.0)
    assert httpx.post(f"{served.url}/flush_cache", timeout=30.0).status_code == 200
    prompt = prompt_of(2000, SURE)
    assert leave(served, [prompt], "after")[0]["layer"] == 2
    assert served.process.returncode is None


@pytest.mark.parametrize("flags", [("--tp", "2"), ("--disable-overlap-schedule",), ("--page-size", "16")])
def test_exits_are_the_same_on_two_ranks_without_overlap_and_on_larger_pages(
    served: Served, flags: tuple[str, ...]
) -> None:
    cache = served.home / "cache"
    arguments = ["--model-path", str(served.home / "six-layers"), "--max-total-tokens", "8000", *flags]
    with ServerProcess(server_arguments(arguments), variables={"XDG_CACHE_HOME": str(cache)}) as process:
        other = Served(process.url, served.oracle, served.some, process, served.home)
        prompts = [prompt_of(100 + seed, SOME, 10 + seed) for seed in range(12)]
        for prompt, report in zip(prompts, other.exits(prompts), strict=True):
            layer, margin = expected_exit(served, prompt) or (LAYERS, served.margin(prompt))
            assert report["layer"] == layer
            assert report["said"] == pytest.approx(margin, abs=1e-3)


def test_a_model_without_split_prefill_runs_at_full_depth_and_says_so(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "granite", "granite")
    with ServerProcess(server_arguments(["--model-path", str(model), "--max-total-tokens", "4000"])) as process:
        body = {"input_ids": [5, 6, 7], "sampling_params": {"custom_params": {"rksc": {"op": "verify"}}}}
        answer = httpx.post(f"{process.url}/generate", json=body, timeout=60.0).json()
        assert "has no split prefill" in answer["meta_info"]["rksc"]["exit"]["reason"]
        assert "GraniteForCausalLM has no split prefill" in process.log_tail(200)
