"""Under which certificate ``share="auto"`` blends, on doubles and on a real server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rksc_sgl.calibration.blend_certificate import BlendCertificate, BlendSetting
from rksc_sgl.calibration.fingerprint import Fingerprint
from rksc_sgl.options import RequestOptions
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.placing import certified_blends
from rksc_sgl.sglang_plugin.placing.certified_blends import CertifiedBlend, certificate_in, under_certificate
from rksc_sgl.testing import write_tiny_model
from tests.six_layers import Served, report_of

HERE = Fingerprint("m", "float32", "none", "auto", "rksc_cpu", 1)
BLEND = CertifiedBlend(recompute=0.2, minimum_span=16, least_tokens=200, risk=0.02)
AUTO = RequestOptions(group="g", branch=1, branches=2)


class Scheduler:
    """A key."""


@pytest.fixture
def scheduler() -> Scheduler:
    one = Scheduler()
    certified_blends._certified[one] = BLEND
    return one


def test_auto_is_read_as_the_certified_blend(scheduler: Scheduler) -> None:
    found, certified = under_certificate(scheduler, AUTO, 200)
    assert certified == BLEND
    assert found == replace(AUTO, share="blend", recompute=0.2, minimum_span=16)
    merging = replace(AUTO, allow_merge=True)
    assert under_certificate(scheduler, merging, 200)[0].allow_merge, "what can be merged still is"
    verify = RequestOptions(op="verify", group="g")
    assert under_certificate(scheduler, verify, 5)[0].share == "blend", "it looks for the blended KV of its branch"


@pytest.mark.parametrize(
    "options",
    [
        replace(AUTO, share="exact"),
        replace(AUTO, share="blend"),
        replace(AUTO, group=None),
        replace(AUTO, share_scope="cache"),
        replace(AUTO, recompute=0.5),
        replace(AUTO, minimum_span=8),
        replace(AUTO, deviation=0.5),
    ],
    ids=lambda one: f"{one.share} {one.share_scope} {one.recompute} {one.minimum_span} {one.deviation}",
)
def test_what_was_not_certified_is_left_as_it_is(scheduler: Scheduler, options: RequestOptions) -> None:
    assert under_certificate(scheduler, options, 500) == (options, None)


def test_shorter_prompts_and_other_servers_stay_exact(scheduler: Scheduler) -> None:
    assert under_certificate(scheduler, AUTO, 199) == (AUTO, None)
    assert under_certificate(Scheduler(), AUTO, 500) == (AUTO, None)
    certified_blends.retire(scheduler)
    assert under_certificate(scheduler, AUTO, 500) == (AUTO, None), "the weights were updated"


def certificate(fingerprint: Fingerprint) -> BlendCertificate:
    return BlendCertificate(fingerprint, BlendSetting(0.2, 16), risk=0.02, alpha=0.05, least_tokens=200)


def test_only_a_certificate_of_this_model_as_it_is_served_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert certificate_in(tmp_path / "nowhere", HERE, False) is None
    for other in (replace(HERE, model="other"), replace(HERE, dtype="bfloat16")):
        certificate(other).save(tmp_path / certificate(other).file_name)
    (tmp_path / "blends-a.json").write_text("{")
    assert certificate_in(tmp_path, HERE, False) is None
    assert "bfloat16" in caplog.text and "blends-a.json" in caplog.text and "other" not in caplog.text
    shared = replace(certificate(HERE), shared_slots=True)
    shared.save(tmp_path / shared.file_name)
    assert certificate_in(tmp_path, HERE, False) is None and "slots of their donors" in caplog.text
    assert certificate_in(tmp_path, HERE, True) == shared
    right = certificate(HERE)
    right.save(tmp_path / right.file_name)
    assert certificate_in(tmp_path, HERE, False) == right


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(60, 400, count).tolist()


def served(model: Path, cache: Path) -> ServerProcess:
    arguments = server_arguments(["--model-path", str(model), "--max-total-tokens", "8000"])
    return ServerProcess(arguments, variables={"RKSC_CACHE_DIR": str(cache)})


@pytest.mark.server
@pytest.mark.slow
def test_a_server_blends_without_being_asked_under_a_certificate_and_not_without(tmp_path: Path) -> None:
    model, cache = write_tiny_model(tmp_path / "six", num_hidden_layers=6), tmp_path / "cache"
    material = words(1, 300)
    first, second = [*words(2, 17), *material], [*words(3, 31), *material]

    def asked(server: ServerProcess, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        here = Served.of(server, model)
        here.flush()
        fork = {"group": "auto", "branches": 2, **options}
        here.ask(first, {**fork, "branch": 0}, 4)
        branch = here.ask(second, {**fork, "branch": 1}, 4)
        verify = here.ask([*second, 77, 78], {"op": "verify", "group": "auto", "exit": "off"})
        here.check_pool()
        return report_of(branch), report_of(verify), server.get_json("/rksc/info")["schedulers"][0]

    with served(model, cache) as server:
        report, _, info = asked(server)
        assert (report["mode"], report["declined"]) == ("exact", "share auto takes identical prefixes only")
        assert info["certified_blend"] is None and "certified_blend" not in report
        fingerprint = Fingerprint.from_mapping(info["exit"]["fingerprint"])
    made = replace(certificate(fingerprint), shared_slots=info["slots"]["refusal"] is None)
    assert made.shared_slots
    made.save(cache / "profiles" / made.file_name)
    with served(model, cache) as server:
        report, verify, info = asked(server)
        assert report["mode"] == "blend" and report["taken_tokens"] > 150
        assert report["certified_blend"] == info["certified_blend"]
        assert info["certified_blend"] == {"recompute": 0.2, "minimum_span": 16, "least_tokens": 200, "risk": 0.02}
        assert verify["mode"] == "blend" and verify["blended_before_tokens"] >= len(second)
        exact, _, _ = asked(server, share="exact")
        assert exact["mode"] == "exact" and "certified_blend" not in exact
