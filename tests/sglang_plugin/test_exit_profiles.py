"""Which profile a server exits by, and what is said where there is none."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.calibration.profile import Profile
from rksc_sgl.calibration.thresholds import CertifiedPoint
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import OptionError
from rksc_sgl.exit_settings import Settings, profile_directory
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.passes.exit_profiles import ExitProfiles

QUESTION = (7, 8, 9)
ASKED = [1, 2, 3, *QUESTION]


def served(directory: Path, **fields: Any) -> Fingerprint:
    usual = {"dtype": "float32", "quantization": "none", "kv_cache_dtype": "auto", "attention_backend": "rksc_cpu"}
    return Fingerprint(**{"model": fingerprint_of_model(directory), "tp_size": 1, **usual, **fields})


def profile(directory: Path, risks: tuple[float, ...] = (0.01, 0.05), **fields: Any) -> Profile:
    readouts = {2: LinearReadout(np.ones(64, np.float32), 0.0, 1.0)}
    points = tuple(CertifiedPoint(risk, "verdict", 1 / risk, 0.0, 0.0, 0.5, 9, 9) for risk in risks)
    return Profile(served(directory, **fields), QUESTION, (4,), (5,), 6, readouts, points, 0.05)


def serving(model: Path, file: Path | None) -> ExitProfiles:
    return ExitProfiles.fitting(served(model), Settings(profile=file))


def test_a_profile_of_the_model_is_found_and_its_points_are_chosen_by_risk(tiny_model: Path, tmp_path: Path) -> None:
    profile(tiny_model).save(tmp_path / "p.json")
    server = serving(tiny_model, tmp_path / "p.json")
    chosen = {}
    for risk in (None, 0.01, 0.049, 0.05, 0.2):
        rule, reason = server.rule(ASKED, RequestOptions(op="verify", risk=risk))
        assert rule is not None and reason == ""
        chosen[risk] = rule.risk
    assert chosen == {None: 0.01, 0.01: 0.01, 0.049: 0.01, 0.05: 0.05, 0.2: 0.05}


def test_a_risk_below_all_certified_ones_is_refused_and_those_are_listed(tiny_model: Path, tmp_path: Path) -> None:
    profile(tiny_model).save(tmp_path / "p.json")
    with pytest.raises(OptionError, match=r"0\.01.*0\.05"):
        serving(tiny_model, tmp_path / "p.json").check_risk(RequestOptions(op="verify", risk=0.001))


def test_without_a_profile_any_risk_is_met_by_full_depth(tiny_model: Path, tmp_path: Path) -> None:
    server = ExitProfiles()
    server.check_risk(RequestOptions(op="verify", risk=0.001))
    assert server.rule(ASKED, RequestOptions(op="verify", risk=0.001))[0] is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "truncated or damaged"),
        (lambda text: text.replace('"alpha": 0.05', '"alpha": 0.04'), "sha256"),
        (lambda text: json.dumps({**json.loads(text), "version": 99}), "newer"),
        (lambda text: "", "truncated or damaged"),
    ],
)
def test_an_unusable_profile_means_full_depth_and_one_line_in_the_log(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, said: str
) -> None:
    file = tmp_path / "p.json"
    profile(tiny_model).save(file)
    file.write_text(damage(file.read_text()))
    server = serving(tiny_model, file)
    rule, reason = server.rule(ASKED, RequestOptions(op="verify"))
    assert rule is None and said in reason
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and said in warnings[0] and str(file) in warnings[0]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "0" * 64, "is of another model"),
        ("dtype", "bfloat16", "is of number type bfloat16, this server runs float32"),
        ("quantization", "fp8", "is of quantization fp8, this server runs none"),
        ("kv_cache_dtype", "fp8_e5m2", "is of KV cache type fp8_e5m2, this server runs auto"),
        ("attention_backend", "fa3", "is of attention backend fa3, this server runs rksc_cpu"),
        ("tp_size", 8, "is of tensor-parallel size 8, this server runs 1"),
    ],
)
def test_a_profile_of_a_model_that_was_served_otherwise_is_not_used_and_the_field_is_named(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, value: Any, said: str
) -> None:
    profile(tiny_model, **{field: value}).save(tmp_path / "p.json")
    rule, reason = serving(tiny_model, tmp_path / "p.json").rule(ASKED, RequestOptions(op="verify"))
    assert rule is None and said in reason
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and said in warnings[0]


def test_only_cached_profiles_of_this_model_are_given_as_a_reason(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for one in (profile(tiny_model, model="0" * 64), profile(tiny_model, tp_size=2)):
        one.save(profile_directory() / one.file_name)
    _, reason = ExitProfiles.fitting(served(tiny_model), Settings()).rule(ASKED, RequestOptions(op="verify"))
    assert "is of tensor-parallel size 2" in reason and "another model" not in reason


def test_a_profile_of_an_older_version_is_refused_and_the_error_says_how_to_make_a_new_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.json"
    profile(tiny_model).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    _, reason = serving(tiny_model, file).rule(ASKED, RequestOptions(op="verify"))
    assert "version: 1" in reason and "`rksc calibrate`" in reason


def test_profiles_in_the_cache_are_used_where_they_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = profile(tiny_model)
    one.save(profile_directory() / one.file_name)
    (profile_directory() / "profile-damaged.json").write_text("{")
    server = ExitProfiles.fitting(served(tiny_model), Settings())
    assert [found.question_ids for found in server.profiles] == [QUESTION]
    assert server.rule(ASKED, RequestOptions(op="verify"))[0] is not None
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [([1, 2, 3], {}), (list(QUESTION), {}), ([*ASKED, 1], {}), (ASKED, {"yes_ids": (5,), "no_ids": (4,)})],
)
def test_another_question_or_other_labels_are_not_covered(
    tiny_model: Path, tmp_path: Path, prompt: list[int], labels: dict
) -> None:
    profile(tiny_model).save(tmp_path / "p.json")
    rule, reason = serving(tiny_model, tmp_path / "p.json").rule(prompt, RequestOptions(op="verify", **labels))
    assert rule is None and "no profile covers" in reason


def test_a_refuted_certificate_stops_exits_where_that_was_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    profile(tiny_model).save(tmp_path / "p.json")
    settings = Settings(profile=tmp_path / "p.json", audit_rate=1.0, audit_stop=True)
    server = ExitProfiles.fitting(served(tiny_model), settings)
    for _ in range(3):
        server.count_audit(0.01, True)
    rule, reason = server.rule(ASKED, RequestOptions(op="verify"))
    assert rule is None and "refuted" in reason
    assert server.describe()["disagreed"] == 3
    assert server.rule(ASKED, RequestOptions(op="verify", risk=0.05))[0] is not None


@pytest.mark.parametrize("rate", ["x", "-0.1", "1.5", "nan"])
def test_an_audit_rate_outside_zero_to_one_is_refused(rate: str) -> None:
    with pytest.raises(OptionError, match="RKSC_AUDIT_RATE"):
        Settings.from_environment({"RKSC_AUDIT_RATE": rate})
