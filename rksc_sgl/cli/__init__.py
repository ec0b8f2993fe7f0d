"""The ``rksc`` command."""

from __future__ import annotations

import sys

import typer

from rksc_sgl.cli import calibrate, doctor, prove, run, serve, tree
from rksc_sgl.model_fetch.command import app as model_app

app = typer.Typer(
    help="RKSC on SGLang: branches share work, verification is cheap, every branch keeps its own meaning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve", context_settings=serve.CONTEXT, add_help_option=False)(serve.serve)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
app.command("prove")(prove.prove)
app.command("tree")(tree.tree)
app.command("run", context_settings=run.CONTEXT, add_help_option=False)(run.run)
app.command("bench", context_settings=run.CONTEXT, add_help_option=False)(run.bench)
app.add_typer(model_app, name="model")


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from rksc_sgl import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Console script: errors of ours are one clear line and exit code 1."""
    from rksc_sgl.errors import RkscError

    try:
        app()
    except RkscError as error:
        print(f"rksc: {error}", file=sys.stderr)
        sys.exit(1)
