"""``rksc tree``: the radix tree of a running server, in the terminal or as a page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from rksc_sgl.errors import RkscError, ServerRefusedError, ServerUnreachableError, TreeListingError
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
    answer = get_from_plugin(url.rstrip("/"), "/rksc/tree", params, api_key)
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


def get_from_plugin(url: str, path: str, params: dict[str, Any], api_key: str | None = None) -> dict[str, Any]:
    """The JSON that one of our routes answers.

    Raises:
        ServerUnreachableError: nobody answers at ``url``.
        ServerRefusedError: a server that does not have the route, or that answers with an error.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(url + path, params=params, headers=headers, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServerUnreachableError(
            f"no server answers at {url} ({error}); `rksc serve --model-path M` starts one, --url names another"
        ) from error
    if response.status_code == 404:
        raise ServerRefusedError(
            f"the server at {url} has no {path}: it runs without the rksc plugin, or with an older one; "
            "`rksc serve` starts one with it",
            404,
        )
    try:
        if response.status_code == 200:
            return response.json()
        reason = response.text.strip() or response.reason_phrase
    except json.JSONDecodeError:
        reason = "not JSON, so this is no SGLang server"
    hint = "; --api-key gives the server's key" if response.status_code in (401, 403) else ""
    raise ServerRefusedError(f"{url}{path} answered {response.status_code}: {reason}{hint}", response.status_code)


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
