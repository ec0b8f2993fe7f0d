"""The nodes of a radix tree as plain values, and the choice of those that are shown."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rksc_sgl.errors import TreeListingError


@dataclass(frozen=True)
class Node:
    """One node of a tree.

    Attributes:
        id: SGLang's number of the node.
        parent: that of its parent; None for the root.
        tokens: tokens that the node itself stands for.
        locks: how many requests (or nodes below) hold it; the root is always held.
        resident: whether its KV is on the device; it may be on the host only.
    """

    id: int
    parent: int | None
    tokens: int
    locks: int
    resident: bool


@dataclass(frozen=True)
class ShownNode:
    """A node that is shown, and what is known of it.

    What else somebody knows of a node belongs here as one more field with a default, and into
    :func:`rksc_sgl.tree_view.render.facts`.

    Attributes:
        id, parent, tokens, locks, resident: as in :class:`Node`.
        depth: steps from the root.
        children: how many it has, shown or not.
        left_out: nodes below it that are not shown.
        tokens_below: tokens of all nodes below it.
        namespace: its ``extra_key``; None for the common one.
        salted: whether a ``cache_salt`` keeps it apart. The salt itself is a secret and never shown.
        first_ids: its first token ids; None where nobody remembers the prompt.
        text: what they spell; None where that is not known.
        leases: what is kept of forks that ends in it, in words.
    """

    id: int
    parent: int | None
    tokens: int
    locks: int
    resident: bool
    depth: int
    children: int
    left_out: int
    tokens_below: int
    namespace: str | None = None
    salted: bool = False
    first_ids: tuple[int, ...] | None = None
    text: str | None = None
    leases: tuple[str, ...] = ()


@dataclass(frozen=True)
class AliasEdge:
    """A prompt that is read as another one of the tree.

    Attributes:
        branch: the request whose prompt it was.
        canonical: the request whose prompt is read in its place.
        namespace: the ``extra_key`` of both; None for the common one.
        tokens, canonical_tokens: of the two prompts.
        node: where the canonical prompt ends in the tree; None where it is not there any more.
    """

    branch: str
    canonical: str
    namespace: str | None
    tokens: int
    canonical_tokens: int
    node: int | None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> AliasEdge:
        """What the server said of it; facts that this release does not know are left out.

        Raises:
            TreeListingError: a fact that this release needs is not there.
        """
        try:
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except KeyError as error:
            raise TreeListingError(f"the server's aliases are not such as this release can read: {error}") from error


@dataclass(frozen=True)
class Listing:
    """The shown part of one scheduler's tree.

    Attributes:
        total: nodes in the tree, with the root.
        left_out: nodes that are not shown.
        nodes: those that are, each after its parent.
        aliases: prompts that are read as others; they travel beside the listing, not in it.
    """

    total: int
    left_out: int
    nodes: tuple[ShownNode, ...]
    aliases: tuple[AliasEdge, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """As values that JSON and msgpack have; flat, so that a deep tree is no deep nesting."""
        nodes = [asdict(node) for node in self.nodes]
        for node in nodes:
            node["first_ids"] = None if node["first_ids"] is None else list(node["first_ids"])
            node["leases"] = list(node["leases"])
        return {"total": self.total, "left_out": self.left_out, "nodes": nodes}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Listing:
        """What :meth:`to_plain` gave; facts of a newer server that this release does not know are left out.

        Raises:
            TreeListingError: a fact that this release needs is not there.
        """
        known = {field.name for field in fields(ShownNode)}
        try:
            nodes = tuple(
                ShownNode(**{key: value for key, value in node.items() if key in known} | _tuples(node))
                for node in values["nodes"]
            )
            return cls(values["total"], values["left_out"], nodes)
        except (KeyError, TypeError) as error:
            raise TreeListingError(f"the server's tree is not one that this release can read: {error}") from error


def largest(nodes: Sequence[Node], max_nodes: int, max_depth: int | None = None) -> Listing:
    """The root and the largest parts of the tree: those nodes with which and below which there are most tokens.

    Args:
        nodes: each after its parent, the root first.
        max_nodes: how many to show at most, at least 1.
        max_depth: steps from the root that are shown; None shows all.

    Raises:
        TreeListingError: the nodes are no tree.
    """
    children = _children(nodes)
    below = {node.id: 0 for node in nodes}  # tokens
    under = {node.id: 0 for node in nodes}  # nodes
    for node in reversed(nodes):
        if node.parent is not None:
            below[node.parent] += below[node.id] + node.tokens
            under[node.parent] += under[node.id] + 1
    # A node's weight is at least that of any node below it, so taking the heaviest first takes parents first.
    depths: dict[int, int] = {}
    waiting = [(0, nodes[0].id, 0, nodes[0])]
    while waiting and len(depths) < max_nodes:
        _, _, depth, node = heapq.heappop(waiting)
        depths[node.id] = depth
        if max_depth is None or depth < max_depth:
            for child in children[node.id]:
                heapq.heappush(waiting, (-(child.tokens + below[child.id]), child.id, depth + 1, child))
    shown_under = {identity: 0 for identity in depths}
    for node in reversed(nodes):
        if node.id in depths and node.parent is not None:
            shown_under[node.parent] += shown_under[node.id] + 1
    shown = tuple(
        ShownNode(
            **asdict(node),
            depth=depths[node.id],
            children=len(children[node.id]),
            left_out=under[node.id] - shown_under[node.id],
            tokens_below=below[node.id],
        )
        for node in nodes
        if node.id in depths
    )
    return Listing(len(nodes), len(nodes) - len(shown), shown)


def _children(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """The children of each node."""
    children: dict[int, list[Node]] = {}
    for place, node in enumerate(nodes):
        if (node.parent is None) != (place == 0) or node.id in children:
            raise TreeListingError(f"node {node.id} is a second root, or comes twice")
        if node.parent is not None:
            if node.parent not in children:
                raise TreeListingError(f"node {node.id} comes before its parent {node.parent}")
            children[node.parent].append(node)
        children[node.id] = []
    if not children:
        raise TreeListingError("a tree has at least its root, and this one has no node")
    return children


def _tuples(node: Mapping[str, Any]) -> dict[str, Any]:
    """What is a tuple here and a list on the way."""
    ids = node.get("first_ids")
    return {"first_ids": None if ids is None else tuple(ids), "leases": tuple(node.get("leases", ()))}
