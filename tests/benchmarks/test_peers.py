"""The comparison with optillm and its-hub, without optillm, whose environment takes gigabytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.computed_tokens import computed_tokens, flush
from benchmarks.environments import environment
from rksc_sgl.errors import RkscError
from rksc_sgl.server_process import ServerProcess
from tests.six_layers import Served

SMALL = ["--problems", "2", "--turns", "1", "--max-tokens", "6", "--samples", "3"]


def test_what_a_user_writes_is_counted_without_what_explains_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text('"""Said\nin two lines."""\n\nimport os\n\n\ndef answer():\n    return os\n')
    assert peers.lines_of(program) == 3
    counted = {arm.name: peers.lines_of(peers.PROGRAMS / f"{arm.program}.py") for arm in peers.ARMS}
    assert counted["rksc vote"] == counted["one sample"] + 1, "a line says how many branches"
    assert counted["optillm bon"] == counted["one sample"]


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKSC_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(RkscError, match=r"(?s)uv pip failed: .*nowhere"):
        environment("none", [str(tmp_path / "nowhere")])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RkscError, match="pip install uv"):
        environment("other", [str(tmp_path)])


@pytest.mark.server
@pytest.mark.slow
def test_computed_tokens_are_those_that_went_through_the_model(served: Served, tiny_server: ServerProcess) -> None:
    flush(served.process.url)
    before = computed_tokens(served.process.url)
    for cached in (False, True):
        sampling = {"max_new_tokens": 7, "ignore_eos": True}
        meta_info = served.post({"input_ids": list(range(5, 105)), "sampling_params": sampling}).json()["meta_info"]
        assert (meta_info["cached_tokens"] > 90) == cached
    found = computed_tokens(served.process.url) - before
    assert found.prompts == 200 - meta_info["cached_tokens"] and found.cached == meta_info["cached_tokens"]
    assert found.decoded == 2 * 6 and found.computed == found.prompts + 12
    with pytest.raises(RkscError, match="start it with --enable-metrics"):
        computed_tokens(tiny_server.url)


@pytest.mark.server
@pytest.mark.slow
def test_arms_are_run_side_by_side_and_what_cannot_run_is_left_out_by_name(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "optillm").write_text("#!/bin/sh\necho nobody knows $2 >&2\nexit 1\n")
    (tmp_path / "optillm").chmod(0o755)
    made = {"its-hub": environment("its-hub", peers.PACKAGES["its-hub"]), "optillm": tmp_path}
    monkeypatch.setattr(peers, "environment", lambda name, requirements: made[name])
    arms = ["one sample", "its-hub BestOfN", "rksc vote", "rksc score", "optillm bon"]
    url = served.process.url
    assert peers.main(["--url", url, "--stock-url", url, "--only", *arms, *SMALL]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["left_out"] == {"optillm bon": "optillm did not start: nobody knows bon"}
    measured = result["arms"]
    assert set(measured) == {*arms} - {"optillm bon"}
    assert all(one["errors"] == 0 and one["noise"] == 1.0 and one["tokens_computed"] > 0 for one in measured.values())
    assert measured["one sample"]["decoded"] <= 2 * 5 < measured["its-hub BestOfN"]["decoded"]
    assert measured["rksc vote"]["decoded"] <= 3 * 2 * 5
    prompts = {name: one["prompts_computed"] for name, one in measured.items()}
    assert prompts["its-hub BestOfN"] > prompts["rksc score"] > prompts["one sample"], "a judge reads the problem again"
