"""Early exit on a real server of a random six-layer Llama, against the same layers computed by transformers."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import httpx
import numpy as np
import pytest

from rksc_sgl import metrics
from rksc_sgl.early_exit.certainty import CONFIRMATION
from tests.six_layers import (
    AUDIT_RATE,
    HIDDEN,
    LAYERS,
    NO,
    SOME,
    SURE,
    YES,
    Served,
    SixLayers,
    report_of,
    sampling,
    server_of,
)

pytestmark = [pytest.mark.server, pytest.mark.slow]


def generate(
    served: Served, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any] | None], **extra: Any
) -> Any:
    """Answers of one token with the labels' log-probabilities; the HTTP response where they were refused."""
    body = {
        "input_ids": [list(prompt) for prompt in prompts],
        "sampling_params": [sampling(one, 1) for one in options],
        "return_logprob": [True] * len(prompts),
        "token_ids_logprob": [[*YES, *NO]] * len(prompts),
        **extra,
    }
    response = served.post(body)
    return response.json() if response.status_code == 200 else response


def verify(
    served: Served, prompts: Sequence[Sequence[int]], *, rid: Sequence[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """What is reported of verifications in one batch, and the margin that their log-probabilities say."""
    named = {} if rid is None else {"rid": list(rid)}
    answers = generate(served, prompts, [{"op": "verify", **options}] * len(prompts), **named)
    return [{**report_of(one)["exit"], "said": said_margin(one)} for one in answers]


def leave(served: Served, prompts: Sequence[Sequence[int]], name: str, **options: Any) -> list[dict[str, Any]]:
    """Verifications that the audit does not keep."""
    return verify(served, prompts, rid=[rid_of(f"{name} {place}") for place in range(len(prompts))], **options)


def said_margin(answer: dict[str, Any]) -> float:
    """What the label tokens' log-probabilities say."""
    found = {token: value for value, token, *_ in answer["meta_info"]["output_token_ids_logprobs"][0]}
    return float(np.logaddexp.reduce([found[t] for t in YES]) - np.logaddexp.reduce([found[t] for t in NO]))


def prompt_of(seed: int, question: Sequence[int], length: int = 20) -> list[int]:
    return [*np.random.default_rng(seed).integers(60, 290, length).tolist(), *question]


def rid_of(name: str, audited: bool = False) -> str:
    """A request id that the audit chooses or not (see early_exit/audit.py)."""

    def chosen(rid: str) -> bool:
        return int.from_bytes(hashlib.sha256(rid.encode()).digest()[:8], "big") < AUDIT_RATE * 2**64

    return next(rid for rid in (f"{name} {n}" for n in range(100)) if chosen(rid) is audited)


def expected_exit(six_layers: SixLayers, prompt: Sequence[int]) -> tuple[int, float] | None:
    """Layer and margin by the profile ``some``, from the oracle's states; None where it does not leave."""
    states, before = six_layers.states(prompt), 0.0
    for layer, readout in six_layers.some.readouts.items():
        margin = float(readout.predict(states[layer][None])[0])
        if abs(margin) >= readout.scale and np.sign(margin) * before >= CONFIRMATION * readout.scale:
            return layer, margin
        before = margin
    return None


def test_traces_are_the_states_that_transformers_computes(served: Served, six_layers: SixLayers) -> None:
    prompts = [prompt_of(seed, (7, 8, 9), 20 + seed) for seed in range(3)]
    for prompt, report in zip(prompts, verify(served, prompts, exit="off", trace=[1, 3, 5]), strict=True):
        found = np.frombuffer(base64.b64decode(report["trace"]), "<f4").reshape(3, HIDDEN)
        states = six_layers.states(prompt)
        np.testing.assert_allclose(found, np.stack([states[layer] for layer in (1, 3, 5)]), atol=2e-4)
        assert report["said"] == pytest.approx(six_layers.margin(prompt), abs=1e-3)


def test_certain_verdicts_leave_and_the_labels_log_probabilities_say_their_margin(served: Served) -> None:
    for report in leave(served, [prompt_of(seed, SURE) for seed in (10, 11)], "sure"):
        assert report["rule"], report
        assert (report["layer"], report["layers_saved"], report["layers"]) == (2, 4, LAYERS)
        assert (report["rule"], report["risk"], report["reason"]) == ("certified", 0.01, "")
        assert report["margin"] == 3.0
        assert report["said"] == pytest.approx(3.0, abs=1e-4)


def test_a_batch_of_mixed_exit_levels_equals_the_oracle(served: Served, six_layers: SixLayers) -> None:
    prompts = [prompt_of(100 + seed, SOME, 10 + seed) for seed in range(12)]
    expected = [expected_exit(six_layers, prompt) for prompt in prompts]
    levels = {None if one is None else one[0] for one in expected}
    assert None in levels and len(levels) >= 3, "the prompts must differ"
    for prompt, report, right in zip(prompts, leave(served, prompts, "some"), expected, strict=True):
        if right is None:
            assert report["layers_saved"] == 0
            assert report["said"] == pytest.approx(six_layers.margin(prompt), abs=1e-3)
        else:
            assert report["layer"] == right[0]
            assert report["margin"] == pytest.approx(right[1], abs=1e-3)
            assert report["said"] == pytest.approx(right[1], abs=1e-3)


def test_ordinary_requests_in_the_same_batch_are_untouched(served: Served, six_layers: SixLayers) -> None:
    plain = [prompt_of(200 + seed, (5, 6), 15) for seed in range(3)]
    checks = [prompt_of(210 + seed, SURE, 15) for seed in range(3)]
    served.flush()
    alone = [generate(served, [prompt], [None])[0] for prompt in plain]
    served.flush()
    rids = [rid_of(f"mixed {place}") for place in range(6)]
    mixed = generate(served, [*checks, *plain], [{"op": "verify"}] * 3 + [None] * 3, rid=rids)
    assert [report_of(answer)["exit"]["layer"] for answer in mixed[:3]] == [2] * 3
    for first, second, prompt in zip(alone, mixed[3:], plain, strict=True):
        assert first["output_ids"] == second["output_ids"]
        assert said_margin(second) == pytest.approx(said_margin(first), abs=1e-4)
        assert said_margin(second) == pytest.approx(six_layers.margin(prompt), abs=1e-3)
        assert "rksc" not in second["meta_info"]


def test_no_certificate_is_used_after_the_weights_were_updated(six_layers: SixLayers) -> None:
    with server_of(six_layers.path, variables={"XDG_CACHE_HOME": str(six_layers.cache())}) as process:
        own = Served.of(process, six_layers.path)
        assert leave(own, [prompt_of(950, SURE)], "before")[0]["layer"] == 2
        body = {"model_path": str(six_layers.path), "flush_cache": True}
        answer = httpx.post(f"{process.url}/update_weights_from_disk", json=body, timeout=120.0)
        assert answer.json()["success"], answer.text
        (report,) = verify(own, [prompt_of(950, SURE)])
        assert report["rule"] is None and "weights were updated" in report["reason"]


def test_kv_of_a_verification_that_left_early_is_never_found_again(served: Served, six_layers: SixLayers) -> None:
    served.flush()
    shared = prompt_of(300, (), 30)
    generate(served, [shared], [None])
    prompt = [*shared, *SURE]
    (left,) = leave(served, [prompt], "kv")
    assert left["layer"] == 2
    (after,) = generate(served, [[*prompt, 77, 78]], [None])
    assert after["meta_info"]["cached_tokens"] == len(shared)
    assert said_margin(after) == pytest.approx(six_layers.margin([*prompt, 77, 78]), abs=1e-3)


def test_an_audited_exit_runs_to_full_depth_and_is_counted(served: Served, six_layers: SixLayers) -> None:
    before = served.process.get_json("/rksc/info")["schedulers"][0]["exit"]
    prompt = prompt_of(500, SURE)
    (report,) = verify(served, [prompt], rid=[rid_of("audit", audited=True)])
    assert report["audited"] and report["foreseen"] == 3.0 and report["layers_saved"] == 0
    assert report["said"] == pytest.approx(six_layers.margin(prompt), abs=1e-3)
    after = served.process.get_json("/rksc/info")["schedulers"][0]["exit"]
    assert after["audited"] == before["audited"] + 1
    assert after["disagreed"] == before["disagreed"] + (six_layers.margin(prompt) < 0)


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
    served: Served, six_layers: SixLayers, question: tuple[int, ...], options: dict[str, Any], said: str
) -> None:
    prompt = prompt_of(600, question)
    (report,) = verify(served, [prompt], **options)
    assert report["rule"] is None
    assert said in report["reason"]
    assert report["said"] == pytest.approx(six_layers.margin(prompt), abs=1e-3)


def test_a_risk_that_is_not_certified_is_refused_and_the_certified_ones_are_listed(served: Served) -> None:
    response = generate(served, [prompt_of(700, SURE)], [{"op": "verify", "risk": 0.001}])
    assert response.status_code == 400
    assert "risk" in response.text and "0.01" in response.text


def test_more_tokens_or_logprobs_of_the_prompt_need_every_layer(served: Served) -> None:
    prompt = prompt_of(800, SURE)
    (answer,) = generate(served, [prompt], [{"op": "verify"}], logprob_start_len=[0])
    assert "log-probabilities of the prompt" in report_of(answer)["exit"]["reason"]
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(prompt)
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 3, "custom_params": {"rksc": {"op": "verify"}}}}
    several = httpx.post(f"{served.process.url}/generate", json=body, timeout=60.0).json()
    assert "more than one token" in report_of(several)["exit"]["reason"]


def test_the_published_rule_says_that_it_certifies_nothing(served: Served, six_layers: SixLayers) -> None:
    prompts = [prompt_of(900, (7, 8, 9))]
    loose = {"exit": "published", "theta": 100.0, "eps": 100.0, "yes_ids": list(YES), "no_ids": list(NO)}
    (report,) = verify(served, prompts, **loose)
    assert (report["rule"], report["risk"], report["layer"]) == ("published", None, 2)
    logits = six_layers.states(prompts[0])[2] @ six_layers.oracle.lm_head.weight.detach().numpy().T
    foreseen = np.logaddexp.reduce(logits[list(YES)]) - np.logaddexp.reduce(logits[list(NO)])
    assert report["said"] == pytest.approx(foreseen, abs=1e-3)
    (strict,) = verify(served, prompts, **{**loose, "theta": 1e-6})
    assert strict["layers_saved"] == 0


def test_verifications_that_are_aborted_in_the_middle_leave_nothing_behind(served: Served) -> None:
    served.flush()
    before, ends = served.total(metrics.REQUESTS, reason="aborted"), Counter[str]()
    for seed in range(5):
        body = {
            "input_ids": [prompt_of(1000 + 16 * seed + n, SURE if n % 2 else SOME, 1000) for n in range(16)],
            "sampling_params": [sampling({"op": "verify"}, 1)] * 16,
            "rid": [f"aborted {seed}, {n}" for n in range(16)],
        }
        with ThreadPoolExecutor() as pool:
            answers = pool.submit(served.post, body)
            while not (answers.done() or any(served.stats()["requests"].values())):
                pass
            for rid in reversed(body["rid"]):  # those who wait before those who run
                served.abort(rid)
            ends.update(one["meta_info"]["finish_reason"]["type"] for one in answers.result().json())
    assert ends["abort"] >= 5, ends
    assert served.total(metrics.REQUESTS, reason="aborted") == before + ends["abort"]
    served.check_pool()
    served.flush()
    assert leave(served, [prompt_of(2000, SURE)], "after")[0]["layer"] == 2


def test_exits_on_other_servers_are_those_of_the_oracle(variant: Served, six_layers: SixLayers) -> None:
    assert generate(variant, [prompt_of(700, SOME)], [{"op": "verify", "risk": 0.001}]).status_code == 400
    prompts = [prompt_of(100 + seed, SOME, 10 + seed) for seed in range(12)]
    variant.flush()
    for prompt, report in zip(prompts, verify(variant, prompts), strict=True):
        layer, margin = expected_exit(six_layers, prompt) or (LAYERS, six_layers.margin(prompt))
        assert report["layer"] == layer
        assert report["said"] == pytest.approx(margin, abs=1e-3)


def test_a_long_prompt_leaves_in_its_last_chunk(variant: Served, six_layers: SixLayers) -> None:
    prompt = prompt_of(400, SURE, 300)
    variant.flush()
    (report,) = verify(variant, [prompt])
    assert (report["layer"], report["said"]) == (2, pytest.approx(3.0, abs=1e-4))
    (again,) = generate(variant, [prompt], [None])
    assert again["meta_info"]["cached_tokens"] == whole_chunks(variant, len(prompt))
    assert said_margin(again) == pytest.approx(six_layers.margin(prompt), abs=1e-3)
    variant.check_pool()


def whole_chunks(variant: Served, tokens: int) -> int:
    """The part of a prompt that is prefilled before its last chunk, and is exact."""
    return (tokens - 1) // 64 * 64 if "--chunked-prefill-size" in variant.process.args else 0


def test_a_profile_of_another_attention_backend_is_not_used_and_the_backend_is_named(six_layers: SixLayers) -> None:
    variables = {"XDG_CACHE_HOME": str(six_layers.cache())}
    with server_of(six_layers.path, "--attention-backend", "torch_native", variables=variables) as process:
        other = Served.of(process, six_layers.path)
        said = "is of attention backend rksc_cpu, this server runs torch_native"
        (report,) = verify(other, [prompt_of(1, SOME)], risk=0.001)  # no profile, so no risk to refuse
        assert report["rule"] is None and said in report["reason"]
        assert process.get_json("/rksc/info")["schedulers"][0]["exit"]["fingerprint"] == {
            **asdict(six_layers.some.fingerprint),
            "attention_backend": "torch_native",
        }
        assert said in process.log_tail(200)
