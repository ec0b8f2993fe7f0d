"""The programs and benchmarks: they lie here in an installed wheel, and beside the package in a checkout.

They are packages of their own, ``programs`` and ``benchmarks``, and run in a process that finds them: nobody's
site-packages gets packages of such names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rksc_sgl.errors import RkscError

PACKAGES = ("programs", "benchmarks")


def home() -> Path:
    """The directory that has the two packages.

    Raises:
        RkscError: they were not installed.
    """
    here = Path(__file__).parent
    checkout = here.parents[1]
    for candidate in (here, checkout):
        if all((candidate / name / "__init__.py").is_file() for name in PACKAGES):
            return candidate
    raise RkscError(f"the programs and benchmarks are neither in {here} nor in {checkout}; install the wheel again")


def programs() -> list[str]:
    """The programs, as a user types them."""
    modules = sorted((home() / "programs").glob("*.py"))
    runs = [path for path in modules if '\nif __name__ == "__main__":' in path.read_text()]
    return [path.stem.replace("_", "-") for path in runs]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process, and of all that it starts, which finds them, whatever lies in its directory."""
    paths = [str(home()), inherited.get("PYTHONPATH", "")]
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
