"""``rksc calibrate`` on a real server of a random model, and a server that exits by what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang as sgl
from typer.testing import CliRunner

from rksc_sgl import Endpoint, SkipGate
from rksc_sgl.calibration.profile import load
from rksc_sgl.calibration.workload import built_in
from rksc_sgl.cli import app
from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.errors import OptionError, RkscError, VerificationError
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.slow]

FORKS, DELTA = 60, 0.4
SMALL = ["--max-total-tokens", "20000"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("calibrated") / "model", num_hidden_layers=6)


@pytest.fixture(scope="module")
def tracing(model: Path) -> Iterator[str]:
    with ServerProcess(server_arguments(["--model-path", str(model), *SMALL]), variables={"RKSC_TRACE": "1"}) as server:
        yield server.url


@pytest.fixture(scope="module")
def made(tracing: str, model: Path) -> Path:
    """A profile of the built-in workload, with its traces and its plot beside it."""
    out = model.parent / "profile.json"
    result = run(tracing, model.parent / "traces", out, "--json")
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert summary["profile"] == str(out)
    assert summary["points"][0]["n_groups"] == FORKS // 2
    assert summary["test"][0]["calls"] > 0
    return out


def run(url: str, traces: Path, out: Path, *more: str):
    arguments = ["calibrate", "--url", url, "--forks", str(FORKS), "--branches", "2", "--delta", str(DELTA)]
    result = CliRunner().invoke(app, [*arguments, "--traces", str(traces), "--out", str(out), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_profile_says_what_it_was_made_of_and_has_a_picture(made: Path) -> None:
    profile = load(made)
    assert (profile.layers, sorted(profile.readouts)) == (6, [2, 4])
    assert [(point.delta, point.scope) for point in profile.points] == [(DELTA, "verdict"), (DELTA, "selection")]
    assert f"{FORKS} forks of 2" in profile.workload
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


def test_a_bound_that_the_forks_cannot_certify_is_said_and_ends_with_an_error(made: Path, tracing: str) -> None:
    out = made.parent / "strict.json"
    arguments = ["calibrate", "--url", tracing, "--forks", str(FORKS), "--branches", "2", "--delta", "0.001"]
    result = CliRunner().invoke(app, [*arguments, "--traces", str(made.parent / "traces"), "--out", str(out)])
    assert isinstance(result.exception, RkscError)
    assert "299" in str(result.exception)
    assert load(out).points == ()


def test_a_server_without_traces_is_refused_by_name(tiny: Endpoint) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--url", tiny.base_url, "--forks", "20"])
    assert "--rksc-trace" in str(result.exception)


def test_a_server_exits_by_the_profile_and_the_primitive_reports_it(made: Path, model: Path) -> None:
    fork = built_in(FORKS, branches=2)[0]

    @sgl.function
    def verified(s, **arguments):
        s += sgl.user(fork.problem)
        branches = sgl.fork_similar(s, 3)
        branches += sgl.assistant(sgl.gen("answer", max_tokens=8, temperature=0.8))
        s["verdict"] = sgl.verify_gated(branches, "answer", skip=SkipGate.never(), **arguments)

    arguments = server_arguments(["--model-path", str(model), *SMALL])
    with ServerProcess(arguments, variables={"RKSC_PROFILE": str(made)}) as server:
        backend = Endpoint(server.url)
        verdict = verified.run(risk=DELTA, backend=backend)["verdict"]
        rules = {report["exit"]["rule"] for report in verdict.reports if report}
        reasons = {report["exit"]["reason"] for report in verdict.reports if report}
        assert rules <= {"certified", None} and reasons <= {"", "exit is off", NOT_CERTAIN}
        assert all(score is not None for score in verdict.scores)
        full = verified.run(exit="off", backend=backend)["verdict"]
        assert {report["exit"]["reason"] for report in full.reports if report} == {"exit is off"}
        with pytest.raises(VerificationError, match=f"it can certify {DELTA}"):
            verified.run(risk=0.01, backend=backend)


NOT_CERTAIN = "the verdict was not certain before the last layer"
