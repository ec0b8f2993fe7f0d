"""``rksc run`` and ``rksc bench``: the programs and benchmarks, from a wheel as from a checkout."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from rksc_sgl.bundled import environment, programs
from rksc_sgl.errors import OptionError

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def run(
    context: typer.Context,
    program: Annotated[str | None, typer.Argument(help="The program; without one all are listed.")] = None,
) -> None:
    """Run a reasoning program: rksc run self-consistency --help."""
    known = programs()
    if program in (None, "--help"):
        typer.echo("rksc run PROGRAM [its options; --help lists them]\n")
        typer.echo("\n".join(known))
        return
    name = str(program).replace("_", "-")
    if name not in known:
        raise OptionError(f"run: there is no program {program!r}; there are {', '.join(known)}")
    _become(f"programs.{name.replace('-', '_')}", context.args)


def bench(context: typer.Context) -> None:
    """Run the benchmarks and write their results and report.html: rksc bench --help."""
    _become("benchmarks.suite", context.args)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Go on as this module: one process, so that signals and exit codes are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment(os.environ))
