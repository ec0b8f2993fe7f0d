"""The check of a machine with an accelerator, on the CPU platform, where every part of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import LOAD, CheckFailed, Checks, Model, profile_for
from rksc_sgl.server_process import ServerProcess


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "architecture"),
    [("rksc_cpu", "llama"), ("torch_native", "llama"), ("rksc_cpu", "qwen2"), ("rksc_cpu", "qwen3")],
)
def test_every_check_holds_on_the_cpu(backend: str, architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--platform", "cpu", "--backends", backend, "--architecture", architecture]
    code = gpu_check.main(arguments)
    (line,) = capsys.readouterr().out.strip().splitlines()
    result = json.loads(line)
    assert result["failed"] == []
    assert (code, result["ok"], result["backend"]) == (0, True, backend)
    assert result["blend"]["taken_tokens"] > 500
    assert result["merge"]["mode"] == "merge"
    assert len(set(result["certified_exit_layers"])) > 1
    load = result["load"]
    assert sum(load.values()) == LOAD and all(load[kind] for kind in ("plain", "exact", "blend", "merge", "gone")), load
    assert "prove" not in result, "a random model makes nothing of a text"


@pytest.mark.server
@pytest.mark.slow
def test_a_trained_model_is_proven_on_real_text_at_last(smollm_server: ServerProcess, embedded_model: Path) -> None:
    model = Model.at(embedded_model, is_trained=True)
    checks = Checks(smollm_server, model, profile_for(model, "print"), "float32")
    assert checks.all[-1] == checks.prove
    checks.prove()
    assert checks.found["prove"] == "proven: all 10 rows are as they must be"


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["plain"] * LOAD, "0 of 60 clients went away"),
        (["plain"] * 50 + ["gone"] * 10, "no branch was merged"),
        (["merge"] * 20 + ["gone"] * 40, "40 of 60 clients went away"),
    ],
)
def test_a_load_without_aborts_or_without_merges_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, kinds: list[str], said: str
) -> None:
    model = Model(Path("m"), 512, 64, 6)
    checks = Checks(None, model, profile_for(model, "print"), "float32")  # type: ignore[arg-type]
    monkeypatch.setattr(checks, "_flush", lambda: None)
    monkeypatch.setattr(checks, "_aborted", lambda: 0.0)
    monkeypatch.setattr(checks, "_one_of_many", lambda index, material: kinds[index])
    with pytest.raises(CheckFailed, match=said):
        checks.load()


def test_without_an_accelerator_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "accelerator_present", lambda: None)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "no accelerator" in said.err and "--platform cpu" in said.err


@pytest.mark.server
@pytest.mark.slow
def test_a_backend_that_does_not_start_gets_a_line_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--platform", "cpu", "--backends", "no_such_backend"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert result["failed"][0].startswith("start: ServerStartError")


@pytest.mark.parametrize("layers", [2, 4, 30])
def test_read_outs_made_by_hand_are_of_layers_that_the_model_has(layers: int) -> None:
    profile = profile_for(Model(Path("m"), 512, 64, layers), "print")
    assert all(0 < layer < layers for layer in profile.readouts)
    assert all(np.isfinite(one.weight).all() for one in profile.readouts.values())
