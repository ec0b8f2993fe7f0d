"""One variable moves everything that is cached."""

from __future__ import annotations

from pathlib import Path

import pytest

from rksc_sgl.cache_directory import CACHE_VARIABLE, cache_directory
from rksc_sgl.cpu_platform.native import build
from rksc_sgl.errors import ModelFetchError
from rksc_sgl.exit_settings import profile_directory
from rksc_sgl.model_fetch import model_path

KINDS = ("models", "profiles", "traces", "native")


def test_the_users_cache_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("models") == tmp_path / "rksc" / "models"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_directory("models") == tmp_path / "rksc" / "models"


@pytest.mark.parametrize("named", ["absolute", "relative", "home"])
def test_the_variable_moves_every_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, {"absolute": str(tmp_path / "c"), "relative": "c", "home": "~/c"}[named])
    assert {kind: cache_directory(kind) for kind in KINDS} == {kind: tmp_path / "c" / kind for kind in KINDS}  # type: ignore[arg-type]


def test_models_profiles_and_the_compiled_library_are_kept_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert profile_directory() == tmp_path / "profiles"
    with pytest.raises(ModelFetchError, match=str(tmp_path / "models")):
        model_path()
    assert build.build().parent == tmp_path / "native"


def test_no_other_module_asks_where_the_users_cache_is() -> None:
    root = Path(__file__).parents[1]
    asking = {
        str(file.relative_to(root))
        for room in ("rksc_sgl", "programs", "benchmarks")
        for file in (root / room).rglob("*.py")
        if "platformdirs" in file.read_text()
    }
    assert asking == {"rksc_sgl/cache_directory.py"}
