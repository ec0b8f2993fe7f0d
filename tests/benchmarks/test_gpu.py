"""The timed comparison on a GPU, tried on the CPU platform, where every row of it runs."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu import Rows


@pytest.mark.server
@pytest.mark.slow
def test_every_row_is_measured_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--platform", "cpu", "--quick"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (backend,) = result["backends"]
    assert backend["backend"] == "rksc_cpu"
    rows = backend["rows"]
    assert len(rows) == 18 and all(row["ms"] > 0 and row["spread"] >= 1 for row in rows.values()), list(rows)
    for name in ("prefill 256: stock, exact", "prefill 256: ours, blend", "8 siblings of 200: ours, exact"):
        assert name in rows


def test_a_row_is_the_median_of_its_repeats_with_their_spread() -> None:
    rows = Rows()
    for seconds in (0.2, 0.1, 0.4):
        rows.add("one", seconds)
    assert rows.to_plain() == {"one": {"ms": 200.0, "spread": 4.0}}


def test_without_an_accelerator_the_script_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "accelerator_present", lambda: None)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "no accelerator" in said.err
