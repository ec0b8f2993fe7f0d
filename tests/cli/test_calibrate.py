"""``rksc calibrate`` on a real server of a random model, and a server that exits by what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from typer.testing import CliRunner

from rksc_sgl import Endpoint, SkipGate
from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.calibration.profile import load
from rksc_sgl.calibration.workload import built_in
from rksc_sgl.cli import app
from rksc_sgl.errors import OptionError, RkscError
from tests.six_layers import Served, SixLayers, server_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

FORKS, RISK = 60, 0.4


@pytest.fixture(scope="module")
def made(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the built-in workload, with its traces and its plot beside it."""
    out = tmp_path_factory.mktemp("calibrated") / "profile.json"
    result = run(served.process.url, out.parent / "traces", out, "--json")
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert summary["profile"] == str(out)
    assert summary["points"][0]["n_groups"] == FORKS // 2
    assert summary["points"][0]["delta"] == summary["test"][0]["delta"] == RISK
    assert summary["points"][0]["risk"] == summary["test"][0]["risk"] == RISK
    assert summary["test"][0]["calls"] > 0
    return out


@pytest.fixture
def tracing(served: Served) -> str:
    return served.process.url


def run(url: str, traces: Path, out: Path, *more: str):
    arguments = ["calibrate", "--url", url, "--forks", str(FORKS), "--branches", "2", "--risk", str(RISK)]
    result = CliRunner().invoke(app, [*arguments, "--traces", str(traces), "--out", str(out), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_profile_says_what_it_was_made_from_and_has_a_plot(made: Path, six_layers: SixLayers) -> None:
    profile = load(made)
    assert (profile.layers, sorted(profile.readouts)) == (6, [2, 4])
    assert [(point.risk, point.scope) for point in profile.points] == [(RISK, "verdict"), (RISK, "selection")]
    assert f"{FORKS} forks of 2" in profile.workload
    served = Fingerprint(fingerprint_of_model(six_layers.path), "float32", "none", "auto", "rksc_cpu", 1)
    assert profile.fingerprint == served
    assert made.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_run_goes_on_from_its_traces(made: Path, tracing: str) -> None:
    directory = made.parent / "traces"
    kept, lost = directory / "fork-000001.npz", directory / "fork-000002.npz"
    before, again = kept.stat().st_mtime_ns, made.parent / "again.json"
    lost.unlink()
    run(tracing, directory, again)
    assert kept.stat().st_mtime_ns == before
    assert lost.exists()
    assert load(again).points == load(made).points


def test_traces_of_another_workload_are_not_mixed_in(made: Path, tracing: str) -> None:
    with pytest.raises(OptionError, match="another workload"):
        run(tracing, made.parent / "traces", made.parent / "other.json", "--seed", "7")
    assert not (made.parent / "other.json").exists()


def test_a_bound_that_the_forks_cannot_certify_is_reported_as_an_error(made: Path, tracing: str) -> None:
    out = made.parent / "strict.json"
    arguments = ["calibrate", "--url", tracing, "--forks", str(FORKS), "--branches", "2", "--risk", "0.001"]
    result = CliRunner().invoke(app, [*arguments, "--traces", str(made.parent / "traces"), "--out", str(out)])
    assert isinstance(result.exception, RkscError)
    assert "299" in str(result.exception)
    assert load(out).points == ()


def test_a_server_without_traces_is_refused_by_name(tiny: Endpoint) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--url", tiny.base_url, "--forks", "20"])
    assert "--rksc-trace" in str(result.exception)


def test_a_server_exits_by_the_profile_and_the_primitive_reports_it(made: Path, six_layers: SixLayers) -> None:
    @sgl.function
    def verified(s, problem, **arguments):
        s += sgl.user(problem)
        branches = sgl.fork_similar(s, 3)
        branches += sgl.assistant(sgl.gen("answer", max_tokens=8, temperature=0.8))
        s["verdict"] = sgl.verify_gated(branches, "answer", skip=SkipGate.never(), select="score", **arguments)

    problems = list(dict.fromkeys(fork.problem for fork in built_in(FORKS, branches=2)))[:6]
    with server_of(six_layers.path, variables={"RKSC_PROFILE": str(made)}) as server:
        backend = Endpoint(server.url)

        def exits(**arguments: Any) -> list[dict[str, Any]]:
            verdicts = [verified.run(problem, backend=backend, **arguments)["verdict"] for problem in problems]
            assert all(score is not None for verdict in verdicts for score in verdict.scores)
            return [report["exit"] for verdict in verdicts for report in verdict.reports]

        found = exits(risk=RISK)
        left = [one for one in found if one.get("layers_saved")]
        assert {(one["rule"], one["reason"]) for one in left} == {("certified", "")}
        assert all(one["layer"] in (2, 4) for one in left)
        asked_again = "exit is off"  # where the selection depends on the verdict
        assert {one["reason"] for one in found if one not in left} <= {NOT_CERTAIN, asked_again}
        assert {one["reason"] for one in exits(exit="off")} == {"exit is off"}
        with pytest.raises(OptionError, match=f"risk: no profile .* at 0.01; it can certify {RISK}"):
            verified.run(problems[0], risk=0.01, backend=backend)


NOT_CERTAIN = "the verdict was not certain before the last layer"
