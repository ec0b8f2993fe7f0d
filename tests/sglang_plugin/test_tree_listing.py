"""The listing of SGLang's own trees, the one in Rust and the one in Python, without a server."""

from __future__ import annotations

import os
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.errors import TreeListingError
from rksc_sgl.sglang_plugin.inspection.inquiry import Inquiry
from rksc_sgl.sglang_plugin.inspection.tree_listing import first_ids, namespace_of, nodes_of, parse
from rksc_sgl.tree_view import Prompt, largest

PRINTED = [
    " [6] 0 full_lock=1 Full=no",
    "   [30] 5 full_lock=0 Full=yes",
    "     [33] 4 full_lock=2 Full=no",
    "   [31] 7 full_lock=0 Full=yes",
]
PROMPTS = [
    Prompt((range(1, 6),)),
    Prompt(((1, 2, 3), (7, 8, 9))),
    Prompt(((1, 2, 3, 7, 8, 9),), extra_key="tenant-7"),
    Prompt(((50, 51),), extra_key="tenant-8", cache_salt="secret"),
]


def test_indentation_is_the_parent() -> None:
    nodes = parse(PRINTED)
    assert [(node.id, node.parent, node.tokens, node.locks, node.resident) for node in nodes] == [
        (6, None, 0, 1, False),
        (30, 6, 5, 0, True),
        (33, 30, 4, 2, False),
        (31, 6, 7, 0, True),
    ]


def test_a_line_of_a_model_with_more_than_one_kind_of_cache_is_read() -> None:
    (node,) = parse([" [0] 0 full_lock=1 Full=no SWA=no Mamba=no"])
    assert node.locks == 1


@pytest.mark.parametrize(
    "lines",
    [
        ["[6] 0 full_lock=1 Full=no"],
        [" [6] 0 lock=1 Full=no"],
        [PRINTED[0], PRINTED[2]],
        [PRINTED[1]],
        [PRINTED[0], PRINTED[0]],
    ],
)
def test_what_is_not_the_listing_of_this_release_is_refused(lines: list[str]) -> None:
    with pytest.raises(TreeListingError, match="listing of the tree has the line"):
        parse(lines)


def test_a_question_survives_the_trip_to_the_scheduler() -> None:
    question = Inquiry("tree", nodes=7, depth=0)
    assert Inquiry.from_rid(question.to_rid()) == question
    assert Inquiry.from_rid(None) is None
    assert Inquiry.from_rid("0123") is None


def test_a_cache_without_a_tree_is_named() -> None:
    with pytest.raises(TreeListingError, match="SimpleNamespace is not a tree that can be listed"):
        nodes_of(SimpleNamespace())


@pytest.fixture(params=["rust", "python"])
def tree_cache(request: pytest.FixtureRequest) -> Any:
    """A tree with the prompts above; 1 to 3 is a node of its own, because two prompts share it."""
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    allocator = SimpleNamespace(device="cpu", free_segment=lambda indices, start_pos: None)
    cache = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=request.param,
        )
    )
    slot = 0
    for prompt in PROMPTS:
        ids = array("q", [number for part in prompt.parts for number in part])
        key = RadixKey(ids, extra_key=prompt.extra_key, cache_salt=prompt.cache_salt)
        cache.insert(InsertParams(key=key, value=torch.arange(slot, slot + len(ids))))
        slot += len(ids)
    return cache


@pytest.mark.slow
def test_every_node_is_listed_with_its_tokens_namespace_and_first_ids(tree_cache: Any) -> None:
    listing = largest(nodes_of(tree_cache), 50)
    known = first_ids(tree_cache, PROMPTS, {node.id for node in listing.nodes if node.parent is not None}, 2)
    parents = {node.id: node.parent for node in listing.nodes}
    (root,) = (number for number, parent in parents.items() if parent is None)
    seen = {
        (known[node.id], node.tokens, namespace_of(tree_cache, node.id), parents[node.id] == root)
        for node in listing.nodes
        if node.parent is not None
    }
    assert seen == {
        ((1, 2), 3, (None, None), True),
        ((4, 5), 2, (None, None), False),
        ((7, 8), 3, (None, None), False),
        ((1, 2), 6, ("tenant-7", None), True),
        ((50, 51), 2, ("tenant-8", "secret"), True),
    }
    assert sum(node.tokens for node in listing.nodes) == tree_cache.evictable_size() + tree_cache.protected_size()


@pytest.mark.slow
def test_looking_changes_nothing_and_a_prompt_that_ends_inside_a_node_tells_only_its_own_tokens(
    tree_cache: Any,
) -> None:
    before = nodes_of(tree_cache)
    every = {node.id for node in before}
    known = first_ids(tree_cache, [Prompt(((1, 2, 3, 7),)), Prompt(((99,),))], every, 8)
    assert sorted(known.values()) == [(1, 2, 3), (7,)]
    assert nodes_of(tree_cache) == before


@pytest.mark.slow
def test_a_node_that_a_request_holds_says_so(tree_cache: Any) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    _, held, _ = tree_cache.tree_core.match_full_device_prefix(RadixKey(array("q", range(1, 6))))
    tree_cache.inc_lock_ref(held)
    locks = {node.id: node.locks for node in nodes_of(tree_cache) if node.parent is not None}
    assert locks.pop(held) == 1
    assert sorted(locks.values()) == [0, 0, 0, 1]  # what is above it is held with it


@pytest.mark.slow
@pytest.mark.parametrize("tree_cache", ["rust"], indirect=True)
def test_what_others_print_meanwhile_still_arrives(tree_cache: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The tree in Python is walked, not printed."""
    core = tree_cache.tree_core
    listed = nodes_of(tree_cache)

    class Talking:
        """The same tree, with somebody who writes to standard output in the middle of its listing."""

        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def pretty_print(self) -> None:
            os.write(1, b"from another thread\n")
            core.pretty_print()

    assert nodes_of(SimpleNamespace(tree_core=Talking())) == listed
    os.write(1, b"afterwards\n")
    out = capfd.readouterr().out
    assert "afterwards" in out
    assert "full_lock" not in out
    assert "from another thread" in out


@pytest.mark.slow
@pytest.mark.parametrize("tree_cache", ["rust"], indirect=True)
def test_a_listing_that_does_not_add_up_is_refused(tree_cache: Any) -> None:
    """The tree in Python is walked, not printed."""
    core = tree_cache.tree_core

    class Larger:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def evictable_size(self) -> int:
            return core.evictable_size() + 1

    with pytest.raises(TreeListingError, match=r"has 16 tokens and the tree 17"):
        nodes_of(SimpleNamespace(tree_core=Larger()))
