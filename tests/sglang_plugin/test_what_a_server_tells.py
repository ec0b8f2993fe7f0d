"""Counters in ``/metrics`` and ``/rksc/stats``, and ``rksc tree``, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from rksc_sgl.cli import app
from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.errors import ServerRefusedError, ServerUnreachableError
from rksc_sgl.server_process import ServerProcess, free_port
from rksc_sgl.testing import write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_tiny_model(tmp_path_factory.mktemp("tells") / "six-layers", num_hidden_layers=6)
    arguments = ["--model-path", str(model), "--max-total-tokens", "8000", "--enable-metrics"]
    with ServerProcess(server_arguments(arguments)) as process:
        yield process


def generate(server: ServerProcess, ids: list[int], options: dict[str, Any] | None) -> None:
    sampling: dict[str, Any] = {"max_new_tokens": 2}
    if options is not None:
        sampling["custom_params"] = {"rksc": options}
    body = {"input_ids": ids, "sampling_params": sampling}
    httpx.post(f"{server.url}/generate", json=body, timeout=60.0).raise_for_status()


def counted(server: ServerProcess, name: str) -> float:
    """The sum of a counter in ``/rksc/stats``."""
    (scheduler,) = server.get_json("/rksc/stats")["schedulers"]
    return sum(series["value"] for series in scheduler["counters"][f"sglang:rksc_{name}_total"])


def exported(server: ServerProcess, name: str) -> float:
    """The sum of a counter in ``/metrics``."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30.0).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"sglang:rksc_{name}_total{{"))


def test_each_request_that_opted_in_is_counted_once_in_both_places(server: ServerProcess) -> None:
    before, out = counted(server, "requests"), exported(server, "requests")
    for index in range(3):
        generate(server, [10, 11, 12, 13, index], {"group": "counted", "branch": index, "branches": 3})
    generate(server, [20, 21, 22], None)
    assert counted(server, "requests") == before + 3
    assert exported(server, "requests") == out + 3


def test_tokens_taken_over_are_counted_apart_from_exact_reuse(server: ServerProcess) -> None:
    material = [100 + index * 7 % 300 for index in range(200)]
    generate(server, [1, 2, 3, *material], {"group": "kinds", "branch": 0, "branches": 2, "share": "blend"})
    generate(server, [4, 5, 6, 7, *material], {"group": "kinds", "branch": 1, "branches": 2, "share": "blend"})
    (scheduler,) = server.get_json("/rksc/stats")["schedulers"]
    kinds = {one["labels"]["kind"]: one["value"] for one in scheduler["counters"]["sglang:rksc_tokens_reused_total"]}
    modes = {one["labels"]["mode"] for one in scheduler["counters"]["sglang:rksc_requests_total"]}
    assert kinds["blend"] > 100 and "blend" in modes
    assert counted(server, "probe_seconds") > 0.0


def test_the_tree_is_shown_as_text_page_and_json(server: ServerProcess, tmp_path: Path) -> None:
    generate(server, [30, 31, 32, 33, 34, 35], None)
    generate(server, [30, 31, 32, 40, 41, 42], None)
    shown = CliRunner().invoke(app, ["tree", "--url", server.url])
    assert shown.exit_code == 0 and "nodes" in shown.stdout, shown.output
    plain = json.loads(CliRunner().invoke(app, ["tree", "--url", server.url, "--json"]).stdout)
    assert plain["schedulers"][0]["tree"], plain
    nodes = plain["schedulers"][0]["tree"]["nodes"]
    assert any((node["first_ids"] or [])[:3] == [30, 31, 32] for node in nodes)
    page = tmp_path / "tree.html"
    assert CliRunner().invoke(app, ["tree", "--url", server.url, "--html", str(page)]).exit_code == 0
    assert "<details" in page.read_text()


def test_no_server_is_said() -> None:
    result = CliRunner().invoke(app, ["tree", "--url", f"http://127.0.0.1:{free_port('127.0.0.1')}"])
    assert isinstance(result.exception, ServerUnreachableError)


def test_a_wrong_question_answers_with_the_reason(server: ServerProcess) -> None:
    result = CliRunner().invoke(app, ["tree", "--url", f"{server.url}/nothing"])
    assert isinstance(result.exception, ServerRefusedError)
