"""``rksc calibrate --blends``: what it refuses, and a certificate of the embedded model under which a server blends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from programs.problems import load_problems
from rksc_sgl.calibration import blend_certificate
from rksc_sgl.calibration.blend_certificate import BlendSetting
from rksc_sgl.cli import app
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.frontend.calibrating_blends import Arm, BlendFork, forks_from_jsonl, loss_of
from rksc_sgl.options import KEY
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

OPENINGS = ("Read the texts.", "You are a careful reader of short texts.", "Here are some short texts with questions.")


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["calibrate", "--blends", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def written(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


GOOD = {"branches": ["one", "two"], "answer": "1"}


def test_forks_come_from_a_file_of_ones_own(tmp_path: Path) -> None:
    path = written(tmp_path / "forks.jsonl", GOOD, "", {"branches": ["a", "b", "c"], "answer": "2"})
    assert forks_from_jsonl(Path(path)) == [BlendFork(("one", "two"), "1"), BlendFork(("a", "b", "c"), "2")]
    unknown = written(tmp_path / "unknown.jsonl", {"branches": ["a", "b"]}, {"branches": ["c", "d"], "answer": None})
    assert forks_from_jsonl(Path(unknown)) == [BlendFork(("a", "b")), BlendFork(("c", "d"))]
    with pytest.raises(OptionError, match="1 of 2 forks have one"):
        forks_from_jsonl(Path(written(tmp_path / "mixed.jsonl", GOOD, {"branches": ["a", "b"]})))
    for wrong, said in (
        ("{", "line 1: must be"),
        ([], "line 1: must be"),
        ({"branches": "one"}, "line 1: must be"),
        ({"branches": ["one", " "]}, "line 1: must be"),
        ({"branches": ["one", "two"], "answer": 1}, "line 1: must be"),
        ({"branches": ["one", "two"], "reference": "1"}, "line 1: must be"),
        ({"branches": ["one"]}, "at least 2"),
    ):
        with pytest.raises(OptionError, match=said):
            forks_from_jsonl(Path(written(tmp_path / "wrong.jsonl", wrong)))
    for missing in (tmp_path / "nowhere", Path(written(tmp_path / "empty.jsonl", ""))):
        with pytest.raises(OptionError, match="jsonl"):
            forks_from_jsonl(missing)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--jsonl"),
        (["--jsonl", "{}", "--risk", "0.1", "--risk", "0.2"], "--risk"),
        (["--jsonl", "{}", "--recompute", "1.5"], "--recompute"),
        (["--jsonl", "{}", "--temperature", "-1"], "--temperature"),
        (["--jsonl", "ungraded"], "--temperature: without known answers only 0"),
    ],
)
def test_what_cannot_be_certified_is_refused_before_a_server_starts(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    files = {
        "{}": written(tmp_path / "forks.jsonl", GOOD),
        "ungraded": written(tmp_path / "ungraded.jsonl", {"branches": ["one", "two"]}),
    }
    with pytest.raises(OptionError, match=said):
        run("--model-path", "m", *(files.get(one, one) for one in arguments))


def test_options_of_blends_are_for_blends_only() -> None:
    result = CliRunner().invoke(app, ["calibrate", "--model-path", "m", "--recompute", "0.1"])
    assert isinstance(result.exception, OptionError) and "for --blends only" in str(result.exception)


def arm(*texts: str, margins: list[float], taken: list[int] | None = None) -> Arm:
    count = len(texts)
    return Arm(list(texts), [False] * count, taken or [0] * count, [100] * count, margins)


def test_a_loss_counts_answers_that_are_right_on_exact_kv_only_and_takes_off_those_that_blending_wins() -> None:
    exact = arm("The answer is 4.", "The answer is 4.", "The answer is 9.", "The answer is 4.", margins=[1, 2, 3, -1])
    again = arm("The answer is 4.", "The answer is 9.", "The answer is 9.", "The answer is 4.", margins=[])
    blended = arm(
        "The answer is 4.", "The answer is 5.", "The answer is 4.0.", "The answer is 5.",
        margins=[1, -2, 0.5, -1], taken=[0, 80, 40, 60],
    )  # fmt: skip
    found = loss_of("4", exact, again, blended, [1, 2, 3], probe_share=0.1)
    assert found.lost == pytest.approx(1 / 3), "two lost, one won"
    assert found.control == pytest.approx(1 / 3) and found.changed == pytest.approx(1 / 3)
    assert found.right == pytest.approx(2 / 3) and found.graded and found.tokens == 100
    assert found.computed == pytest.approx(1 - 0.9 * 180 / 300)
    assert found.same_selection is False, "another text of the exact run has the best score"
    ungraded = loss_of(None, exact, again, blended, [1, 2, 3], probe_share=0.1)
    assert (ungraded.lost, ungraded.right, ungraded.graded) == (1.0, 1.0, False)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six questions of which the embedded model answers most, each behind three openings and the same examples."""
    lines = []
    for problem in load_problems("reading", 6):
        shown = "\n\n".join(f"{question}\n{reply}" for question, reply in 5 * problem.examples)
        branches = [f"{opening}\n\n{shown}\n\n{problem.question}" for opening in OPENINGS]
        lines.append({"branches": branches, "answer": problem.reference})
    return written(tmp_path_factory.mktemp("forks") / "forks.jsonl", *lines)


@pytest.mark.server
@pytest.mark.slow
def test_a_certificate_is_made_from_ones_own_forks_and_the_next_server_blends(
    forks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKSC_CACHE_DIR", str(tmp_path / "cache"))
    common = ["--jsonl", forks, "--recompute", "0.3", "--temperature", "0", "--max-tokens", "16"]
    flags = ["--model-path", "smollm2-135m-instruct", "--max-total-tokens", "12000"]
    monkeypatch.delenv("RKSC_CACHE_DIR")
    with ServerProcess(server_arguments(flags), variables={"RKSC_CACHE_DIR": str(tmp_path / "cache")}) as server:
        monkeypatch.setenv("RKSC_CACHE_DIR", str(tmp_path / "cache"))
        asked = ["--url", server.url, *common]
        refused = CliRunner().invoke(app, ["calibrate", "--blends", *asked, "--json"])
        assert "6 forks cannot certify a risk of 0.01, not even without a loss; 356 could" in refused.stderr
        assert isinstance(refused.exception, RkscError)
        assert "no setting could be certified at a risk of 0.01" in str(refused.exception)
        assert not list((tmp_path / "cache" / "profiles").glob("blends-*"))
        (recorded,) = (tmp_path / "cache" / "traces" / "blends").glob("*.jsonl")
        lines = recorded.read_text()
        result = run(*asked, "--risk", "0.7", "--alpha", "0.4", "--json")
        assert recorded.read_text() == lines, "nothing was run again"
    found = json.loads(result.stdout.strip().splitlines()[-1])
    (tested,) = found["tested"]
    assert (found["recompute"], found["forks"], tested["forks"]) == (0.3, 6, 6)
    assert tested["right"] >= 0.3 and tested["computed"] < 0.9 and tested["p"] <= 0.4
    made = blend_certificate.load(Path(found["certificate"]))
    assert made.setting == BlendSetting(0.3, 16) and made.least_tokens == found["least_tokens"] > 200
    variables = {"RKSC_CACHE_DIR": str(tmp_path / "cache")}
    monkeypatch.delenv("RKSC_CACHE_DIR")
    with ServerProcess(server_arguments(flags), variables=variables) as server:
        reports = []
        for branch, text in enumerate(json.loads(Path(forks).read_text().splitlines()[0])["branches"][:2]):
            options = {KEY: {"group": "after", "branch": branch, "branches": 2}}
            body = {"text": text, "sampling_params": {"max_new_tokens": 4, "custom_params": options}}
            reports.append(httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["meta_info"][KEY])
    assert reports[1]["mode"] == "blend" and reports[1]["certified_blend"]["risk"] == 0.7
