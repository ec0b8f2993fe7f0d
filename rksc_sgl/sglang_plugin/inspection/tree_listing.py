"""SGLang's radix tree, node by node.

The default tree keeps its nodes in Rust (``RustUnifiedTreeCore``) and has no way to enumerate them: ``root_node`` and
``node_by_id`` raise NotImplementedError in 0.5.23, and what else takes a node takes its number. But ``pretty_print``
writes each node's number, tokens and locks to standard output, and that is read here. What is read must add up
to the tokens that the tree itself says it holds. Token ids come from prompts that were seen lately: how far each
matches, and through which nodes, are two questions that the tree answers without being changed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rksc_sgl.errors import TreeListingError
from rksc_sgl.tree_view import Node, Prompt

# One step to the right for each level are two spaces; the root stands behind one.
_LINE = re.compile(r" ((?:  )*)\[(\d+)\] (\d+) full_lock=(\d+) Full=(yes|no)(?: \w+=(?:yes|no))*")


def nodes_of(tree_cache: Any) -> list[Node]:
    """Every node, each after its parent.

    It takes the scheduler's time, in proportion to the tree.

    Raises:
        TreeListingError: a kind of tree that we cannot walk, or a listing that does not add up.
    """
    core = getattr(tree_cache, "tree_core", None)
    if core is None:
        raise TreeListingError(f"{type(tree_cache).__name__} is not a tree that can be listed; UnifiedRadixCache is")
    try:
        root = core.root_node
    except NotImplementedError:
        return _printed_nodes(core)
    return list(_python_nodes(root))


def namespace_of(tree_cache: Any, node_id: int) -> tuple[str | None, str | None]:
    """The ``extra_key`` and ``cache_salt`` of a node."""
    return tree_cache.tree_core.prefetch_anchor_info(node_id)


def first_ids(tree_cache: Any, prompts: Iterable[Prompt], wanted: set[int], count: int) -> dict[int, tuple[int, ...]]:
    """The first ``count`` token ids of the wanted nodes, of those that are on the way of a prompt."""
    core = tree_cache.tree_core
    known: dict[int, tuple[int, ...]] = {}
    for prompt in prompts:
        if len(known) == len(wanted):
            break
        key = _radix_key(prompt)
        matched, end, _ = core.match_full_device_prefix(key)
        if not matched:
            continue
        for step in core.collect_path_info([end])[0]:
            if step.node_id in wanted and step.node_id not in known:
                end_of_ids = min(step.path_start + count, step.path_end, matched)
                known[step.node_id] = tuple(key.token_ids[step.path_start : end_of_ids])
    return known


def _radix_key(prompt: Prompt) -> Any:
    from array import array

    from sglang.srt.mem_cache.radix_cache import RadixKey

    ids = array("q")
    for part in prompt.parts:
        ids.extend(part)
    return RadixKey(ids, extra_key=prompt.extra_key, cache_salt=prompt.cache_salt)


def _python_nodes(root: Any) -> Iterable[Node]:
    """The nodes of SGLang's tree in Python, which serves what the one in Rust cannot."""
    from sglang.srt.mem_cache.unified_cache.component_type import BASE_COMPONENT_TYPE

    waiting = [root]
    while waiting:
        node = waiting.pop()
        data = node.component_data[BASE_COMPONENT_TYPE]
        parent = None if node is root else node.parent.id
        yield Node(node.id, parent, len(node.key), data.lock_ref, data.value is not None)
        waiting += node.children.values()


def _printed_nodes(core: Any) -> list[Node]:
    nodes = parse(_standard_output_of(core.pretty_print))
    held = core.evictable_size() + core.protected_size()
    listed = sum(node.tokens for node in nodes if node.resident)
    if listed != held:
        raise TreeListingError(f"the listing of the tree has {listed} tokens and the tree {held}")
    return nodes


def parse(lines: Iterable[str]) -> list[Node]:
    """Nodes from the lines of ``pretty_print``.

    Raises:
        TreeListingError: a line is not what SGLang 0.5.23 prints, or stands too far to the right.
    """
    nodes: list[Node] = []
    path: list[int] = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise TreeListingError(f"the listing of the tree has the line {line!r}, which is not one of a node")
        depth = len(match[1]) // 2
        if depth > len(path) or (depth == 0 and path):
            raise TreeListingError(f"the listing of the tree has the line {line!r} where no such node can be")
        del path[depth:]
        number, tokens, locks = int(match[2]), int(match[3]), int(match[4])
        nodes.append(Node(number, path[-1] if path else None, tokens, locks, match[5] == "yes"))
        path.append(number)
    return nodes


def _standard_output_of(print_something: Callable[[], None]) -> list[str]:
    """The lines that a function writes to file descriptor 1, as code that is not Python's does.

    What other threads write in that moment and is no line of a node goes where it was to go.
    """
    sys.stdout.flush()
    kept, caught = os.dup(1), os.memfd_create("rksc-tree")
    try:
        os.dup2(caught, 1)
        try:
            print_something()
        finally:
            os.dup2(kept, 1)
        with open(os.dup(caught), "rb") as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
    finally:
        os.close(kept)
        os.close(caught)
    others = [line for line in lines if not _LINE.fullmatch(line)]
    if others:
        sys.stdout.write("\n".join([*others, ""]))
    return [line for line in lines if _LINE.fullmatch(line)]
