"""What ``rksc doctor`` says, and how to fix it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from rksc_sgl.cli.doctor import check_entry_point, check_python

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 13, 1), True), ((3, 14, 0), False)]
)
def test_the_pythons_that_pass_are_those_that_the_package_asks_for(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], ok: bool
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    check = check_python()
    assert check.ok is ok
    assert check.detail == f"{'.'.join(map(str, version))}; 3.11 to 3.13 are supported"
    assert PYPROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def test_an_entry_point_that_is_missing_is_named_with_the_command_that_fixes_it() -> None:
    check = check_entry_point("sglang.srt.plugins", "none-such", "a:b")
    assert not check.ok
    assert check.detail == "none-such is not registered; fix: pip install . in a checkout of rksc-sgl"
