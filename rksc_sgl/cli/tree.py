"""``rksc tree``: the radix tree of a running server, in the terminal or as a page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rksc_sgl.errors import RkscError, TreeListingError
from rksc_sgl.http_client import HttpClient
from rksc_sgl.tree_view import AliasEdge, Listing, page, text_tree

TIMEOUT_S = 60.0
UNBROKEN = 10_000  # columns: in a file or a pipe, a node is one line
DEFAULT_URL = "http://127.0.0.1:30000"


def tree(
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    html: Annotated[Path | None, typer.Option(help="Write one HTML page to this file instead.")] = None,
    depth: Annotated[int | None, typer.Option(min=0, help="Show so many levels below the root.")] = None,
    max_nodes: Annotated[int, typer.Option(min=1, help="Show at most so many nodes, the largest parts first.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
    api_key: Annotated[str | None, typer.Option(help="The server's key, if it has one.")] = None,
) -> None:
    """Show which prefixes a running server has cached, how they branch, and what is in use."""
    params = {"max_nodes": max_nodes, **({} if depth is None else {"depth": depth})}
    with HttpClient(url, api_key, timeout=TIMEOUT_S) as client:
        answer = client.get_json("/rksc/tree", params)
    if html is not None:
        _write(html, page(f"Radix tree of {url}", [(_title(one), _listing(one)) for one in answer["schedulers"]]))
    if as_json:
        print(json.dumps(answer))
    elif html is not None:
        print(f"wrote {html}")
    else:
        console = Console(width=None if sys.stdout.isatty() else UNBROKEN)
        for one in answer["schedulers"]:
            console.print(text_tree(_title(one), _listing(one)))


def _listing(answer: dict[str, Any]) -> Listing:
    if answer["tree"] is None:
        raise TreeListingError(answer["problem"])
    aliases = tuple(AliasEdge.from_plain(one) for one in answer.get("aliases", ()))  # an older server has none
    return replace(Listing.from_plain(answer["tree"]), aliases=aliases)


def _title(answer: dict[str, Any]) -> str:
    listing = _listing(answer)
    shown = f", {len(listing.nodes)} shown" if listing.left_out else ""
    nodes = f"{listing.total} node{'' if listing.total == 1 else 's'}"
    return f"scheduler {answer['dp_rank']}: {answer['kind']}, {nodes}{shown}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RkscError(f"--html: {path} cannot be written ({error.strerror})") from error
