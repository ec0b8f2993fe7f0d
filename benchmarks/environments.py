"""Environments of their own for packages that cannot share SGLang's, which pins ``openai`` and ``transformers``."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.errors import RkscError

_TOLD = 600  # characters of an error's end


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The directory of the programs of an environment, which is made with uv where it is not there yet.

    Args:
        name: to be recognised by.
        requirements: as pip takes them; other ones are another environment.

    Raises:
        RkscError: uv is not there, or could not install them; the message says why.
    """
    digest = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()[:12]
    directory = cache_directory("environments") / f"{name}-{digest}"
    programs, made = directory / "bin", directory / ".made"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not made.exists():
            print(f"making an environment for {', '.join(requirements)} ...", file=sys.stderr, flush=True)
            _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(directory))
            _uv("pip", "install", "--quiet", "--python", str(programs / "python"), *requirements)
            made.touch()
    return programs


def _uv(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        raise RkscError("uv is not there to make an environment with; fix: pip install uv")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RkscError(f"uv {arguments[0]} failed: {done.stderr.strip()[-_TOLD:]}")
