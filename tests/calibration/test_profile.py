from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.calibration.fingerprint import Fingerprint
from rksc_sgl.calibration.plot import plot_risk
from rksc_sgl.calibration.profile import Profile, load
from rksc_sgl.calibration.thresholds import CertifiedPoint, CurvePoint, SkipPoint
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import OptionError, ProfileError
from rksc_sgl.options import Scope

SERVED = Fingerprint("a" * 64, "float32", "none", "auto", "triton", 1)


def point(risk: float, t: float, scope: Scope = "verdict") -> CertifiedPoint:
    return CertifiedPoint(risk, scope, t, risk / 3, risk / 4, 0.5 + t / 20, 4000, 500)


def profile(seed: int = 0, hidden: int = 48) -> Profile:
    random = np.random.default_rng(seed)
    readouts = {
        layer: LinearReadout(random.normal(size=hidden).astype(np.float32), float(random.normal()), 0.1 + 1 / layer)
        for layer in (3, 5, 7)
    }
    return Profile(
        fingerprint=SERVED,
        question_ids=(7, 8, 9),
        yes_ids=(1, 2),
        no_ids=(3,),
        layers=30,
        readouts=readouts,
        points=(point(0.01, 3.2), point(0.05, 1.7), point(0.02, 5.0, "selection")),
        alpha=0.05,
        skip_points=(SkipPoint(0.01, 0.85, 0.4, 0.002, 500),),
        curve=(CurvePoint(4.0, 0.0, 0.0, 0.9), CurvePoint(0.1, 0.07, 0.1, 0.2)),
        workload="räksmörgås: 500 forks of 8",
        created="2026-01-31",
    )


def rewrite(path: Path, change: Any, *, sealed: bool = True) -> None:
    """Change the document, and seal it again so that only the field itself is wrong."""
    document = json.loads(path.read_text())
    change(document)
    if sealed:
        body = json.dumps(document["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        document["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps(document))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_profile_comes_back_exactly(tmp_path_factory: Any, seed: int, bias: float, scale: float) -> None:
    weight = np.random.default_rng(seed).normal(size=33).astype(np.float32) * np.float32(10.0) ** np.arange(-20, 13)
    saved = replace(profile(), readouts={2: LinearReadout(weight.astype(np.float32), bias, scale)})
    path = tmp_path_factory.mktemp("profiles") / "p.json"
    saved.save(path)
    assert load(path) == saved


def test_saving_makes_directories_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "p.json"
    profile(1).save(target)
    profile(2).save(target)
    assert load(target) == profile(2) != profile(1)
    assert [file.name for file in target.parent.iterdir()] == ["p.json"]


def test_a_file_that_cannot_be_written_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ProfileError, match="taken: could not be written"):
        profile().save(tmp_path / "taken")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, tenth: int) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * tenth // 10])
    with pytest.raises(ProfileError, match=r"p\.json: truncated or damaged"):
        load(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed_or_does_not_matter(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("profiles") / "p.json"
    profile().save(path)
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        assert load(path) == profile()
    except ProfileError as error:
        assert "p.json" in str(error)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(version=3), "version: 3 is newer than 2"),
        (
            lambda d: d.update(version=1),
            "version: 1 is older than 2, which is what can be read; make a new",
        ),
        (lambda d: d.update(version="1"), "version: must be an integer"),
        (lambda d: d.update(format="other"), "format: must be"),
        (lambda d: d["body"].pop("alpha"), "alpha: is missing"),
        (lambda d: d["body"].update(alpha=True), "alpha: must be a number, got bool"),
        (lambda d: d["body"].update(alpha=1.5), "alpha: must be above 0"),
        (lambda d: d["body"].update(layers="30"), "layers: must be an integer, got str"),
        (lambda d: d["body"].update(layers=6), "readouts.layer: must be 1 to layers - 1 = 5, got 7"),
        (lambda d: d["body"].update(fingerprint="a"), "fingerprint: must be an object"),
        (lambda d: d["body"]["fingerprint"].update(model=""), "fingerprint.model: must be a string"),
        (lambda d: d["body"]["fingerprint"].update(tp_size=0), "fingerprint.tp_size: must be an integer"),
        (lambda d: d["body"]["fingerprint"].update(tp_size=True), "fingerprint.tp_size: must be an integer"),
        (lambda d: d["body"]["fingerprint"].update(attention_backend=3), "fingerprint.attention_backend: must be a"),
        (lambda d: d["body"]["fingerprint"].update(colour="red"), "fingerprint.colour: is unknown"),
        (lambda d: d["body"]["fingerprint"].pop("quantization"), "fingerprint.quantization: is missing"),
        (lambda d: d["body"].update(created="yesterday"), "created: must be an ISO date"),
        (lambda d: d["body"].update(points={}), "points: must be a list"),
        (lambda d: d["body"].update(points=[3]), "points.: must hold objects"),
        (lambda d: d["body"]["points"][0].pop("t"), "points.t: is missing"),
        (lambda d: d["body"]["points"][0].update(t=-1), "points.t: must be"),
        (lambda d: d["body"]["points"][0].update(risk=2), "points.risk: must be above 0"),
        (lambda d: d["body"]["points"][0].update(risk=0.05), "points.risk: must differ"),
        (lambda d: d["body"]["points"][0].update(scope="branch"), "points.scope: must be one of verdict, selection"),
        (lambda d: d["body"]["skip_points"][0].update(agreement=7), "skip_points.agreement"),
        (lambda d: d["body"]["readouts"][0].update(weight="%%%"), "readouts.weight: must be base64"),
        (lambda d: d["body"]["readouts"][0].update(weight="AAAAAAA="), "readouts.weight: must be base64"),
        (lambda d: d["body"]["readouts"][0].update(weight="AACAfw=="), "weight and bias: must be finite"),
        (lambda d: d["body"]["readouts"][0].update(weight="AAAAAA=="), "all be of one hidden size"),
        (lambda d: d["body"]["readouts"][0].update(scale=-1), "scale: must be"),
        (lambda d: d["body"]["readouts"][0].update(layer=5), "layer 5 is there twice"),
    ],
)
def test_a_wrong_field_is_refused_by_file_and_name(tmp_path: Path, change: Any, named: str) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    rewrite(path, change)
    with pytest.raises(ProfileError) as caught:
        load(path)
    assert "p.json" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"[1, 2]", "format"),
        (b"\xff\xfe\x00", "truncated or damaged"),
        (b"[" * 100_000, "truncated or damaged"),
        (b'{"format": "rksc-profile", "version": 2, "sha256": "", "body": {"a": 1e999}}', "body: damaged"),
        (b'{"format": "rksc-profile", "version": 2, "sha256": "", "body": {"a": NaN}}', "truncated or damaged"),
        (b'{"format": "rksc-profile", "version": 2, "sha256": "", "body": []}', "body: must be an object"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, text: bytes, named: str) -> None:
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(ProfileError, match=named):
        load(tmp_path / "p.json")


def test_profiles_of_one_model_served_in_other_ways_have_files_of_their_own() -> None:
    ways = [SERVED, replace(SERVED, attention_backend="fa3"), replace(SERVED, tp_size=2)]
    assert len({replace(profile(), fingerprint=way).file_name for way in ways}) == len(ways)


def test_an_edited_body_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    rewrite(path, lambda d: d["body"].update(alpha=0.2), sealed=False)
    with pytest.raises(ProfileError, match="sha256: does not fit"):
        load(path)
    with pytest.raises(ProfileError, match=r"none\.json: could not be read"):
        load(tmp_path / "none.json")


def test_numbers_that_are_not_finite_never_reach_a_file() -> None:
    with pytest.raises(ProfileError, match=r"curve\.flip_rate: must be finite"):
        replace(profile(), curve=(CurvePoint(1.0, float("nan"), 0.0, 0.5),))


def test_a_risk_takes_the_largest_certified_bound_below_it() -> None:
    known = profile()
    assert known.point_for(0.01).risk == 0.01
    assert known.point_for(0.04).risk == 0.01
    assert known.point_for(0.9).risk == 0.05
    assert known.skip_point_for(0.02).agreement == 0.85
    with pytest.raises(ProfileError, match=r"at 0\.005 is not certified by this profile; it can certify 0\.01, 0\.05"):
        known.point_for(0.005)
    with pytest.raises(ProfileError, match="it certifies none"):
        replace(known, points=()).point_for(0.5)
    for wrong in (-0.1, 1.5, float("nan"), True, "0.01"):
        with pytest.raises(OptionError, match="risk: must be a number"):
            known.point_for(wrong)  # type: ignore[arg-type]


def test_a_profile_covers_prompts_that_end_with_its_question_and_say_more() -> None:
    made = profile()
    assert made.covers([1, 7, 8, 9])
    assert not made.covers([7, 8, 9])
    assert not made.covers([1, 7, 8, 9, 1])
    assert not made.covers([])


@pytest.mark.parametrize("name", ["question_ids", "yes_ids", "no_ids"])
@pytest.mark.parametrize("wrong", [[], [-1], [1.5], ["a"], [True]])
def test_token_ids_of_a_profile_are_checked(tmp_path: Path, name: str, wrong: list[Any]) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    rewrite(path, lambda document: document["body"].update({name: wrong}))
    with pytest.raises(ProfileError, match=name):
        load(path)


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_risk(profile(), tmp_path / "risk.png")
    assert (tmp_path / "risk.png").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(ProfileError, match="could not be written"):
        plot_risk(profile(), tmp_path / "nowhere" / "risk.png")
    with pytest.raises(ProfileError, match="no measurement"):
        plot_risk(replace(profile(), curve=(), points=()), tmp_path / "none.png")
