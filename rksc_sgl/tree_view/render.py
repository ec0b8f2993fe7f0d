"""A listing as text for a terminal, and as one HTML page without anything to load."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rich.text import Text
from rich.tree import Tree

from rksc_sgl.tree_view.listing import AliasEdge, Listing, ShownNode

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
details, .leaf { margin-left: 1.2rem; border-left: 1px solid #ddd; padding-left: .5rem; }
.tokens { font-weight: 600; } .held { color: #b35900; } .words { font-family: ui-monospace, monospace; color: #064; }
.more { color: #777; font-style: italic; } .alias { color: #06c; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } details, .leaf { border-color: #444; }
  .held { color: #fb4; } .words { color: #8d8; }
}
"""


def words(node: ShownNode) -> str:
    """How the node's tokens begin, as text or else as ids; empty where that is not known."""
    more = "…" if node.first_ids is not None and len(node.first_ids) < node.tokens else ""
    if node.text is not None:
        return repr(node.text) + more
    if node.first_ids is not None:
        return f"ids {' '.join(map(str, node.first_ids))}{more}"
    return ""


def facts(node: ShownNode) -> list[str]:
    """What is to be said of a node beside its tokens and words."""
    found = []
    if node.parent is not None and node.locks:
        found.append(f"held {node.locks}x")
    if node.leases:
        found.append(f"leased: {', '.join(node.leases)}")
    if node.parent is not None and not node.resident:
        found.append("not on the device")
    if node.namespace is not None:
        found.append(f"namespace {node.namespace!r}")
    if node.salted:
        found.append("salted")
    return found


def heading(node: ShownNode) -> str:
    """A node's number of tokens."""
    if node.parent is None:
        return f"root, {node.tokens_below} tokens"
    return f"{node.tokens} token{'' if node.tokens == 1 else 's'}"


def more_below(node: ShownNode, shown_below: int) -> str:
    """What to say of nodes that are not shown; empty where all are, or where a shown child says it.

    Args:
        shown_below: what is left out below the shown children.
    """
    hidden = node.left_out - shown_below
    return f"{hidden} more node{'' if hidden == 1 else 's'} not shown" if hidden else ""


def alias_line(alias: AliasEdge) -> str:
    """What to say of an alias beside the node that it leads to."""
    return (
        f"<- alias {alias.branch!r}: {alias.tokens} tokens read as the {alias.canonical_tokens} of {alias.canonical!r}"
    )


def _by_node(listing: Listing) -> dict[int | None, list[AliasEdge]]:
    """Aliases by the shown node that they lead to; None has those whose node is not shown or not there."""
    shown = {node.id for node in listing.nodes}
    found: dict[int | None, list[AliasEdge]] = {}
    for alias in listing.aliases:
        found.setdefault(alias.node if alias.node in shown else None, []).append(alias)
    return found


def _astray(alias: AliasEdge) -> str:
    """What to say of an alias whose node is not shown."""
    where = "not in the tree any more" if alias.node is None else "not shown"
    return f"{alias_line(alias)}, {where}"


def text_tree(title: str, listing: Listing) -> Tree:
    """For a terminal; an alias is a line below the node that it leads to."""
    top = Tree(Text(title, "bold"))
    branches: dict[int | None, Tree] = {None: top}
    children = _children_of(listing.nodes)
    waiting = list(listing.nodes[:1])
    while waiting:
        node = waiting.pop()
        branches[node.id] = branches[node.parent].add(_label(node))
        waiting += reversed(children[node.id])
    edges = _by_node(listing)
    for node in listing.nodes:
        for alias in edges.get(node.id, ()):
            branches[node.id].add(Text(alias_line(alias), "cyan"))
        more = more_below(node, sum(child.left_out for child in children[node.id]))
        if more:
            branches[node.id].add(Text(more, "dim italic"))
    for alias in edges.get(None, ()):
        top.add(Text(_astray(alias), "cyan"))
    return top


def _label(node: ShownNode) -> Text:
    label = Text(heading(node), "bold")
    label.append("".join(f"  {fact}" for fact in facts(node)), "yellow")
    label.append(f"  {words(node)}" if words(node) else "", "green")
    return label


def page(title: str, listings: Sequence[tuple[str, Listing]]) -> str:
    """One HTML page.

    Args:
        title: of the page.
        listings: a heading and a listing for each scheduler.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]
    for name, listing in listings:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += _details(listing)
    return "\n".join([*parts, "</body></html>\n"])


def _alias_leaf(line: str) -> str:
    return f'<div class="leaf alias">{html.escape(line)}</div>'


def _details(listing: Listing) -> list[str]:
    """Nested details; a stack, because a tree may be deeper than Python likes to call."""
    children, edges = _children_of(listing.nodes), _by_node(listing)
    parts: list[str] = []
    waiting: list[ShownNode | str] = list(listing.nodes[:1])
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            parts.append(node)
            continue
        more = more_below(node, sum(child.left_out for child in children[node.id]))
        leaves = [_alias_leaf(alias_line(alias)) for alias in edges.get(node.id, ())]
        if not children[node.id] and not more and not leaves:
            parts.append(f'<div class="leaf">{_line(node)}</div>')
            continue
        parts.append(f"<details{' open' if node.depth < 2 else ''}><summary>{_line(node)}</summary>")
        parts += leaves
        waiting.append("</details>")
        if more:
            waiting.append(f'<div class="leaf more">{html.escape(more)}</div>')
        waiting += reversed(children[node.id])
    return [*parts, *(_alias_leaf(_astray(alias)) for alias in edges.get(None, ()))]


def _line(node: ShownNode) -> str:
    spans = [("tokens", heading(node)), *(("held", fact) for fact in facts(node)), ("words", words(node))]
    return " ".join(f'<span class="{name}">{html.escape(text)}</span>' for name, text in spans if text)


def _children_of(nodes: Sequence[ShownNode]) -> dict[int, list[ShownNode]]:
    """The shown children of each shown node, those with most tokens first."""
    children: dict[int, list[ShownNode]] = {node.id: [] for node in nodes}
    for node in nodes:
        if node.parent is not None:
            children[node.parent].append(node)
    for siblings in children.values():
        siblings.sort(key=lambda node: (-(node.tokens + node.tokens_below), node.id))
    return children
