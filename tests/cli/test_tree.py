from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from rksc_sgl.cli import app, main
from rksc_sgl.errors import RkscError, ServerRefusedError, ServerUnreachableError, TreeListingError
from rksc_sgl.server_process import ServerProcess, free_port
from rksc_sgl.tree_view import Node, largest
from tests.answering_server import Answering, answering

NODES = [Node(0, None, 0, 1, False), Node(1, 0, 10, 0, True), Node(2, 1, 4, 1, True), Node(3, 1, 2, 0, True)]


@pytest.fixture
def server() -> Iterator[Answering]:
    with answering() as one:
        yield one


def scheduler(max_nodes: int = 10, rank: int = 0) -> dict:
    plain = largest(NODES, max_nodes).to_plain()
    for node in plain["nodes"]:
        node["text"] = f"words of {node['id']} </details>"
        node["first_ids"] = [1]
    return {"dp_rank": rank, "kind": "UnifiedRadixCache", "problem": None, "tree": plain}


def test_every_scheduler_is_printed(server: Answering) -> None:
    url = server.answers(200, {"schedulers": [scheduler(), scheduler(2, rank=1)]})
    result = CliRunner().invoke(app, ["tree", "--url", url + "/", "--depth", "3", "--max-nodes", "9"])
    assert result.exit_code == 0, result.output
    assert "scheduler 0: UnifiedRadixCache, 4 nodes\n" in result.stdout
    assert "scheduler 1: UnifiedRadixCache, 4 nodes, 2 shown" in result.stdout
    assert "4 tokens  held 1x  'words of 2 </details>'…" in result.stdout
    assert "2 more nodes not shown" in result.stdout
    assert server.asked == [("/rksc/tree?max_nodes=9&depth=3", None)]


def test_the_page_is_written_and_escaped(server: Answering, tmp_path: Path) -> None:
    url = server.answers(200, {"schedulers": [scheduler()]})
    page = tmp_path / "tree.html"
    result = CliRunner().invoke(app, ["tree", "--url", url, "--html", str(page), "--api-key", "k"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {page}\n"
    assert "words of 2 &lt;/details&gt;" in page.read_text()
    assert server.asked == [("/rksc/tree?max_nodes=500", "Bearer k")]


def test_json_is_the_servers_answer(server: Answering) -> None:
    answer = {"schedulers": [scheduler()]}
    result = CliRunner().invoke(app, ["tree", "--url", server.answers(200, answer), "--json"])
    assert json.loads(result.stdout) == answer


def test_a_page_that_cannot_be_written_is_named(server: Answering, tmp_path: Path) -> None:
    url = server.answers(200, {"schedulers": [scheduler()]})
    result = CliRunner().invoke(app, ["tree", "--url", url, "--html", str(tmp_path / "no" / "tree.html")])
    assert result.exit_code == 1
    assert type(result.exception) is RkscError
    assert "cannot be written" in str(result.exception)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, {"detail": "Not Found"}, "runs without the rksc plugin"),
        (401, {"error": "Unauthorized"}, "--api-key"),
        (500, b"Internal Server Error", "answered 500: Internal Server Error"),
        (200, b"<html>", "not JSON"),
    ],
)
def test_an_unusable_answer_is_reported(server: Answering, status: int, body: object, said: str) -> None:
    result = CliRunner().invoke(app, ["tree", "--url", server.answers(status, body)])
    assert result.exit_code == 1
    assert isinstance(result.exception, ServerRefusedError)
    assert said in str(result.exception)


def test_a_tree_that_cannot_be_listed_says_why(server: Answering) -> None:
    answer = {"schedulers": [{"dp_rank": 0, "kind": "ChunkCache", "problem": "ChunkCache is no tree", "tree": None}]}
    result = CliRunner().invoke(app, ["tree", "--url", server.answers(200, answer)])
    assert isinstance(result.exception, TreeListingError)
    assert str(result.exception) == "ChunkCache is no tree"


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://[", "nonsense"])
def test_a_missing_server_is_reported_in_one_line_with_exit_code_1(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rksc", "tree", "--url", url.format(port=free_port())])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rksc: the SGLang server at ")
    assert err.count("\n") == 1
    assert "rksc serve" in err


def test_the_error_is_one_that_a_caller_can_tell_apart() -> None:
    result = CliRunner().invoke(app, ["tree", "--url", f"http://127.0.0.1:{free_port()}"])
    assert isinstance(result.exception, ServerUnreachableError)


@pytest.mark.server
@pytest.mark.slow
def test_a_live_server_shows_what_its_prompts_share(tiny_server: ServerProcess, tmp_path: Path) -> None:
    prefix = "Zebras graze where no other test does. "
    for branch in ("left", "right"):
        body = {"text": prefix * 3 + branch, "sampling_params": {"max_new_tokens": 1}}
        httpx.post(f"{tiny_server.url}/generate", json=body, timeout=120.0).raise_for_status()
    page = tmp_path / "tree.html"
    result = CliRunner().invoke(app, ["tree", "--url", tiny_server.url, "--html", str(page), "--max-nodes", "5000"])
    assert result.exit_code == 0, result.output
    assert "Zebras graze" in page.read_text()
    plain = json.loads(CliRunner().invoke(app, ["tree", "--url", tiny_server.url, "--json"]).stdout)
    shown = [node["text"] or "" for node in plain["schedulers"][0]["tree"]["nodes"]]
    assert any(text.startswith("Zebras graze") for text in shown)
    text = CliRunner().invoke(app, ["tree", "--url", tiny_server.url, "--depth", "1"]).stdout
    assert "UnifiedRadixCache" in text
    assert "Zebras graze" in text
