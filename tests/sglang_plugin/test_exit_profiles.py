"""Which profile a server exits by, and what is said where there is none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from rksc_sgl.calibration.profile import Profile
from rksc_sgl.calibration.readout import LinearReadout
from rksc_sgl.calibration.thresholds import CertifiedPoint
from rksc_sgl.errors import OptionError
from rksc_sgl.exit_settings import Settings, profile_directory
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.exit_profiles import ExitProfiles, server_fingerprint

QUESTION = (7, 8, 9)
ASKED = [1, 2, 3, *QUESTION]


def profile(model: Path, dtype: str = "float32", deltas: tuple[float, ...] = (0.01, 0.05)) -> Profile:
    readouts = {2: LinearReadout(np.ones(64, np.float32), 0.0, 1.0)}
    points = tuple(CertifiedPoint(d, "verdict", 1 / d, 0.0, 0.0, 0.5, 9, 9, "group") for d in deltas)
    return Profile(server_fingerprint(model, dtype), QUESTION, (4,), (5,), 6, readouts, points, 0.05)


def serving(model: Path, file: Path | None, dtype: str = "torch.float32") -> ExitProfiles:
    return ExitProfiles.for_server(model, dtype, Settings(profile=file))


def test_a_profile_of_the_model_is_found_and_its_points_are_chosen_by_risk(tiny_model: Path, tmp_path: Path) -> None:
    profile(tiny_model).save(tmp_path / "p.json")
    server = serving(tiny_model, tmp_path / "p.json")
    chosen = {}
    for risk in (None, 0.01, 0.049, 0.05, 0.2):
        rule, reason = server.rule(ASKED, RequestOptions(op="verify", risk=risk))
        assert rule is not None and reason == ""
        chosen[risk] = rule.risk
    assert chosen == {None: 0.01, 0.01: 0.01, 0.049: 0.01, 0.05: 0.05, 0.2: 0.05}


def test_a_risk_below_all_certified_ones_is_refused_with_those(tiny_model: Path, tmp_path: Path) -> None:
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
def test_a_file_of_no_use_means_full_depth_and_one_line_in_the_log(
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


def test_a_profile_of_another_model_or_number_type_is_not_used(tiny_model: Path, tmp_path: Path) -> None:
    from rksc_sgl.testing import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    profile(other).save(tmp_path / "other.json")
    profile(tiny_model, "bfloat16").save(tmp_path / "half.json")
    for name in ("other.json", "half.json"):
        rule, reason = serving(tiny_model, tmp_path / name).rule(ASKED, RequestOptions(op="verify"))
        assert rule is None and "another model or number type" in reason


def test_profiles_in_the_cache_are_found_by_what_they_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = profile(tiny_model)
    one.save(profile_directory() / one.file_name)
    (profile_directory() / "profile-damaged.json").write_text("{")
    server = ExitProfiles.for_server(tiny_model, "torch.float32", Settings())
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
    server = ExitProfiles.for_server(tiny_model, "torch.float32", settings)
    for _ in range(3):
        server.count_audit(0.01, True)
    rule, reason = server.rule(ASKED, RequestOptions(op="verify"))
    assert rule is None and "refuted" in reason
    assert server.describe()["disagreed"] == 3
    assert server.rule(ASKED, RequestOptions(op="verify", risk=0.05))[0] is not None


@pytest.mark.parametrize("rate", ["x", "-0.1", "1.5", "nan"])
def test_an_audit_rate_that_is_no_share_is_refused(rate: str) -> None:
    with pytest.raises(OptionError, match="RKSC_AUDIT_RATE"):
        Settings.from_environment({"RKSC_AUDIT_RATE": rate})
