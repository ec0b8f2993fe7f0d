"""Files of results: what a benchmark measured, on what, with which versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rksc_sgl import __version__
from rksc_sgl.errors import RkscError

VERSIONED = ("sglang", "torch", "transformers")
CPUINFO = Path("/proc/cpuinfo")


def write(path: Path, benchmark: str, figures: Mapping[str, Any], **more: Any) -> None:
    """Write a file of results.

    Args:
        path: of the file; its directory is made.
        benchmark: name of the module.
        figures: the last line of the benchmark.
        more: what else is to be kept, such as settings with their seeds, and what the figures were made of.
    """
    content = {"benchmark": benchmark, "figures": dict(figures), **more, "made": made_on()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        RkscError: it is missing, or no file of results.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RkscError(f"{path}: cannot be read as a file of results ({error}); make it: rksc bench") from error
    if not isinstance(found, dict) or not {"benchmark", "figures", "made"} <= found.keys():
        raise RkscError(f"{path}: is no file of results: it needs benchmark, figures and made")
    return found


def made_on() -> dict[str, Any]:
    """Hardware, versions and time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": usable,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "accelerator": _accelerator(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "rksc_sgl": __version__,
        **{name: version(name) for name in VERSIONED},
    }


def _cpu() -> str:
    """The processor's name, with the widest vector instructions that it has."""
    try:
        lines = dict(line.split(":", 1) for line in CPUINFO.read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    keys = {key.strip(): value.strip() for key, value in lines.items()}
    flags = keys.get("flags", "").split()
    widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return f"{keys.get('model name', platform.machine())} {widest}".strip()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
