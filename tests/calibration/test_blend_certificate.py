"""What certifies a blend, and the file that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rksc_sgl.calibration.blend_certificate import (
    VERSION,
    BlendCertificate,
    BlendSetting,
    ForkLoss,
    certified,
    forks_needed,
    load,
)
from rksc_sgl.calibration.fingerprint import Fingerprint
from rksc_sgl.calibration.risk_control import betting_p
from rksc_sgl.errors import OptionError, ProfileError

FINGERPRINT = Fingerprint("m", "float32", "none", "auto", "rksc_cpu", 1)
SAFE, BOLD = BlendSetting(0.3, 16), BlendSetting(0.05, 16)
NONE = ForkLoss(lost=0.0, changed=0.0, right=0.6, graded=True, computed=0.2, tokens=300, same_selection=True)


@pytest.mark.parametrize("lowest", [0.0, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_risk_that_is_exceeded_is_seldom_certified(lowest: float, seed: int) -> None:
    """At the risk itself, with losses and, where they can be, gains: more than alpha would be a fault."""
    source, trials, alpha, risk = np.random.default_rng(seed), 600, 0.05, 0.05
    wins = 0.03 if lowest < 0 else 0.0
    chance = source.random((trials, 250))
    losses = np.where(chance < risk + wins, 1.0, np.where(chance < risk + 2 * wins, -1.0, 0.0))
    wrong = sum(betting_p(row.tolist(), risk, alpha, lowest) <= alpha for row in losses)
    assert wrong <= trials * alpha + 3 * (trials * alpha * (1 - alpha)) ** 0.5


def test_small_losses_are_certified_and_large_ones_are_not() -> None:
    assert betting_p([0.0] * 400, 0.02, lowest=-1.0) < 0.01 < 0.05 < betting_p([0.0] * 50, 0.02, lowest=-1.0)
    assert betting_p([1.0, 0.0] * 200, 0.1) == 1.0
    assert betting_p([1.0, -1.0] * 300, 0.1, lowest=-1.0) < 0.3, "what is lost is won again"
    for wrong in ({"risk": 0.0}, {"risk": 1.0}, {"losses": []}, {"losses": [1.1]}, {"losses": [-0.1]}):
        with pytest.raises(OptionError, match=r"risk|n|losses"):
            betting_p(**{"losses": [0.0], "risk": 0.1, **wrong})


def losses(count: int, **changed: Any) -> dict[float, list[ForkLoss]]:
    return {0.0: [replace(NONE, **changed)] * count}


def test_the_boldest_setting_that_loses_nothing_is_certified() -> None:
    count = forks_needed(0.05, 0.05, graded=True)
    setting, tested = certified([(SAFE, losses(count)), (BOLD, losses(count))], 0.05, 0.05)
    assert setting == BOLD and [one.recompute for one in tested] == [0.3, 0.05]
    assert all(one.p <= 0.05 and one.forks == count and one.right == 0.6 for one in tested)
    assert certified([(SAFE, losses(count - count // 3))], 0.05, 0.05)[0] is None, "too few forks"


@pytest.mark.parametrize("loss", [{"lost": 0.2}, {"changed": 0.2}, {"changed": None}])
def test_what_loses_answers_or_changes_verdicts_ends_the_sequence(loss: dict[str, Any]) -> None:
    assert certified([(SAFE, losses(300)), (BOLD, losses(300, **loss))], 0.05, 0.05)[0] == SAFE
    assert certified([(SAFE, losses(300, **loss)), (BOLD, losses(300))], 0.05, 0.05)[0] is None
    hot = {0.0: losses(300)[0.0], 0.7: losses(300, **loss)[0.0]}
    assert certified([(SAFE, hot)], 0.05, 0.05)[0] is None, "at every temperature"


def test_nothing_is_certified_where_a_loss_could_not_show() -> None:
    with pytest.raises(OptionError, match="0% of the answers are right"):
        certified([(SAFE, losses(300, right=0.0))], 0.05, 0.05)
    with pytest.raises(OptionError, match="an answer at all"):
        certified([(SAFE, losses(300, right=0.4, graded=False))], 0.05, 0.05)
    with pytest.raises(OptionError, match="no branch was blended"):
        certified([(SAFE, {0.0: []})], 0.05, 0.05)
    with pytest.raises(OptionError, match="known answer"):
        certified([(SAFE, {0.0: [NONE, replace(NONE, graded=False)]})], 0.05, 0.05)
    with pytest.raises(OptionError, match="computes most"):
        certified([(BOLD, losses(9)), (SAFE, losses(9))], 0.05, 0.05)


def test_as_many_forks_as_are_said_to_be_needed_are_needed() -> None:
    for risk in (0.01, 0.05, 0.2):
        count = forks_needed(risk, 0.05, graded=True)
        assert certified([(SAFE, losses(count))], risk, 0.05)[0] == SAFE
        assert certified([(SAFE, losses(int(count / 1.2)))], risk, 0.05)[0] is None
    assert 300 < forks_needed(0.01, 0.05, graded=False) < forks_needed(0.01, 0.05, graded=True) < 800


def certificate(**changed: Any) -> BlendCertificate:
    _, tested = certified([(SAFE, losses(300))], 0.05, 0.05)
    made = BlendCertificate(FINGERPRINT, SAFE, risk=0.05, alpha=0.05, least_tokens=300, tested=tested, workload="w")
    return replace(made, **changed)


def test_a_certificate_comes_back_as_it_was(tmp_path: Path) -> None:
    made = certificate()
    path = tmp_path / "profiles" / made.file_name
    made.save(path)
    assert load(path) == made and path.name.startswith("blends-")


def test_a_file_that_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "blends-x.json"
    certificate().save(path)
    whole = json.loads(path.read_text())
    for wrong, said in (
        ({**whole, "version": 1}, f"version {VERSION}"),
        ({**whole, "format": "rksc-profile"}, "rksc-blends"),
        ({**whole, "body": {**whole["body"], "risk": 0.5}}, "sha256"),
        ({"format": "rksc-blends"}, "cannot be read"),
        ([], "cannot be read"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ProfileError, match=said):
            load(path)
    path.write_text("{")
    with pytest.raises(ProfileError, match=r"cannot be read.*calibrate --blends"):
        load(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "wrong", [{"risk": 0.0}, {"alpha": 1.0}, {"least_tokens": 0}, {"setting": BlendSetting(1.5, 16)}]
)
def test_a_certificate_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=r"risk|alpha|least_tokens|recompute"):
        certificate(**wrong)
