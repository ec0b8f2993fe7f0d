"""``layers.c`` as a library of this machine: compiled once, kept in the user's cache, then loaded."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.errors import NativeBuildError

logger = logging.getLogger(__name__)

SWITCH = "RKSC_NATIVE"  # 0: PyTorch operations only
SOURCE = Path(__file__).with_name("layers.c")
INCLUDED = tuple(Path(__file__).with_name(name) for name in ("linear.h", "take_over.h"))
# The processor's own instructions; threads of the OpenMP runtime that PyTorch has loaded (the same soname).
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 120.0


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was switched off or cannot be had, which the log says once."""
    if os.environ.get(SWITCH) == "0":
        logger.info("compiled layer operations are switched off (%s=0)", SWITCH)
        return None
    try:
        return _declared(ctypes.CDLL(str(build())))
    except (NativeBuildError, OSError) as error:
        logger.warning("layer operations are PyTorch's own, which is slower: %s", error)
        return None


def build(directory: Path | None = None) -> Path:
    """The compiled library, made where it is not there yet.

    Args:
        directory: where libraries are kept; None takes the user's cache.

    Raises:
        NativeBuildError: there is no C compiler, or it fails.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeBuildError("there is no C compiler (cc, gcc, clang, or what CC names)")
    directory = directory or cache_directory("native")
    target = directory / f"layers-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / target.name
            _compile([compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"])
            made.replace(target)  # at once: other processes see all of it or nothing
    except OSError as error:
        raise NativeBuildError(f"{directory} cannot be written ({error.strerror})") from error
    return target


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{command[0]} took longer than {COMPILE_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NativeBuildError(f"{command[0]} ended with {done.returncode}: {last}")


def _fingerprint(compiler: str) -> str:
    """Of everything that the library depends on; a cache directory may be shared by different machines."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (SOURCE, *INCLUDED)))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    for part in (*FLAGS, version, platform.machine(), _processor()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What the processor can do, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    address, size = ctypes.c_void_p, ctypes.c_int64
    found.rksc_linear.argtypes = [address, address, address, size, address]
    found.rksc_layers.argtypes = [address, address, size, *[address] * 5]
    found.rksc_rows.argtypes = [address, address, address, size]
    found.rksc_ordered_floats.argtypes = [size, size]
    found.rksc_take_over.argtypes = [address]
    for function in (found.rksc_pack, found.rksc_unpack):
        function.argtypes = [address, address, size, size, size]
    for name in ("linear", "layers", "rows", "take_over", "pack", "unpack"):
        getattr(found, f"rksc_{name}").restype = None
    for number in (found.rksc_panel, found.rksc_unit_keys, found.rksc_most_pairs, found.rksc_ordered_floats):
        number.restype = size
    return found
