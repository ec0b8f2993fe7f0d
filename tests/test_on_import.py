from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rksc_sgl.on_import import when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"made_for_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_module_that_is_loaded_is_handed_over_at_once() -> None:
    seen: list[object] = []
    when_imported("json", seen.append)
    assert seen == [sys.modules["json"]]


def test_a_module_that_is_not_loaded_is_handed_over_complete_and_in_order(module: str) -> None:
    seen: list[tuple[int, int]] = []
    when_imported(module, lambda loaded: seen.append((1, loaded.VALUE)))
    when_imported(module, lambda loaded: seen.append((2, loaded.VALUE)))
    assert seen == []
    __import__(module)
    assert seen == [(1, 1), (2, 1)]
    __import__(module)
    assert len(seen) == 2


def test_an_error_in_the_callback_reaches_who_imports(module: str) -> None:
    def fail(loaded: object) -> None:
        raise RuntimeError("no")

    when_imported(module, fail)
    with pytest.raises(RuntimeError, match="no"):
        __import__(module)


def test_waiting_for_a_module_that_is_being_imported_is_refused_instead_of_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_way.py").write_text(
        "from rksc_sgl.on_import import when_imported\n"
        "seen = []\n"
        "when_imported(__name__, seen.append, unfinished=True)\n"
        "try:\n"
        "    when_imported(__name__, seen.append)\n"
        "except RuntimeError as error:\n"
        "    refused = str(error)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    half_way = __import__("half_way")
    assert half_way.seen == [half_way]
    assert "half_way is being imported" in half_way.refused


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_alone_loads_neither_sglang_nor_torch() -> None:
    code = "import rksc_sgl, sys; print([name for name in ('sglang', 'torch', 'httpx') if name in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["rksc_sgl, sglang as sgl", "sglang as sgl, rksc_sgl"])
def test_the_primitives_are_there_in_either_order_of_import(order: str) -> None:
    code = (
        f"import {order}\n"
        "from sglang.lang.interpreter import ProgramState, ProgramStateGroup\n"
        "print(callable(sgl.fork_similar), callable(sgl.verify_gated),"
        " ProgramState.fork_similar is sgl.fork_similar, ProgramStateGroup.verify_gated is sgl.verify_gated)"
    )
    assert run(code).splitlines()[-1] == "True True True True"
