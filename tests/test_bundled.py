"""The programs and benchmarks from an installed wheel: built, laid out, and run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rksc_sgl.bundled import environment, home, programs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has what the wheel puts into site-packages."""
    from hatchling.builders.wheel import WheelBuilder

    made = tmp_path_factory.mktemp("wheel")
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(made), versions=["standard"]))
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    return site


def rksc(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-m", "rksc_sgl.cli", *arguments]
    return subprocess.run(words, env=variables, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_nothing_but_the_package_is_put_into_site_packages(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"rksc_sgl"}
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for package in ("programs", "benchmarks"):
        own = {path.name for path in (ROOT / package).glob("*.*")}
        assert {f"rksc_sgl/bundled/{package}/{name}" for name in own} <= files
    assert not [name for name in files if "__pycache__" in name or "/results/" in name or "/tests/" in name]
    assert "rksc_sgl/cpu_platform/native/layers.c" in files


@pytest.mark.slow
def test_programs_run_from_the_wheel_wherever_one_stands(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/__init__.py").write_text("raise SystemExit('the wrong programs')")
    listed = rksc(installed, "run", cwd=tmp_path)
    assert "self-consistency" in listed.stdout and listed.returncode == 0, listed.stderr
    helped = rksc(installed, "run", "self-consistency", "--help", cwd=tmp_path)
    assert "usage: rksc run self-consistency" in helped.stdout, helped.stderr
    refused = rksc(
        installed, "run", "tree-of-thought", "--url", "http://127.0.0.1:9", "--source", "reading", cwd=tmp_path
    )
    assert refused.returncode == 1 and "cannot be reached" in refused.stderr.splitlines()[-1]
    unknown = rksc(installed, "run", "nothing", cwd=tmp_path)
    assert unknown.returncode == 1 and "there is no program 'nothing'" in unknown.stderr


@pytest.mark.slow
def test_the_benchmarks_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    helped = rksc(installed, "bench", "--help", cwd=tmp_path)
    assert "usage: rksc bench" in helped.stdout and "pipeline" in helped.stdout, helped.stderr
    variables = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(
        [sys.executable, "-c", "from rksc_sgl.bundled import home; print(home())"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(installed / "rksc_sgl/bundled")


def test_in_a_checkout_they_lie_beside_the_package() -> None:
    assert home() == ROOT
    assert "self-consistency" in programs() and "report" not in programs()
    found = environment({"PYTHONPATH": "/other"})
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/other"]
