from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.errors import TreeListingError
from rksc_sgl.tree_view import AliasEdge, Listing, Node, Prompt, RecentPrompts, largest

ROOT = Node(0, None, 0, 1, False)
#        0
#      /   \
#     1:10   2:3
#    /   \
#   3:5   4:1
SMALL = [ROOT, Node(1, 0, 10, 0, True), Node(3, 1, 5, 2, True), Node(4, 1, 1, 0, True), Node(2, 0, 3, 0, False)]


@st.composite
def trees(draw: st.DrawFn) -> list[Node]:
    nodes = [ROOT]
    for number in range(1, draw(st.integers(1, 40))):
        parent = draw(st.sampled_from(nodes))
        nodes.append(Node(number, parent.id, draw(st.integers(1, 50)), draw(st.integers(0, 3)), draw(st.booleans())))
    return nodes


def test_the_heaviest_parts_are_shown_and_the_rest_is_counted() -> None:
    listing = largest(SMALL, 3)
    assert [node.id for node in listing.nodes] == [0, 1, 3]
    assert (listing.total, listing.left_out) == (5, 2)
    root, first, leaf = listing.nodes
    assert (root.left_out, root.children, root.tokens_below) == (2, 2, 19)
    assert (first.left_out, first.children, first.tokens_below, first.depth) == (1, 2, 6, 1)
    assert (leaf.left_out, leaf.children, leaf.locks, leaf.depth) == (0, 0, 2, 2)


def test_depth_counts_from_the_root() -> None:
    assert [node.id for node in largest(SMALL, 10, 0).nodes] == [0]
    assert [node.id for node in largest(SMALL, 10, 1).nodes] == [0, 1, 2]
    assert len(largest(SMALL, 10, 2).nodes) == len(SMALL)


@given(trees(), st.integers(1, 45), st.none() | st.integers(0, 5))
def test_shown_and_left_out_nodes_add_up_to_the_tree(nodes: list[Node], most: int, depth: int | None) -> None:
    listing = largest(nodes, most, depth)
    assert listing.total == len(nodes) == len(listing.nodes) + listing.left_out
    assert len(listing.nodes) <= most
    shown = {node.id: node for node in listing.nodes}
    assert all(node.parent is None or node.parent in shown for node in listing.nodes)
    assert shown[0].left_out == listing.left_out
    assert shown[0].tokens_below == sum(node.tokens for node in nodes)
    assert depth is None or max(node.depth for node in listing.nodes) <= depth
    if depth is None:
        lightest = min(node.tokens + node.tokens_below for node in listing.nodes)
        every = largest(nodes, len(nodes)).nodes
        assert all(node.tokens + node.tokens_below <= lightest for node in every if node.id not in shown)


@given(trees())
def test_a_listing_survives_the_wire(nodes: list[Node]) -> None:
    listing = largest(nodes, 20)
    assert Listing.from_plain(json.loads(json.dumps(listing.to_plain()))) == listing


def test_extra_keys_of_a_newer_server_are_ignored_and_an_unreadable_answer_is_named() -> None:
    plain = largest(SMALL, 5).to_plain()
    plain["nodes"][1]["aliases"] = [7]
    assert Listing.from_plain(plain) == largest(SMALL, 5)
    del plain["nodes"][0]["tokens"]
    with pytest.raises(TreeListingError, match="tokens"):
        Listing.from_plain(plain)
    with pytest.raises(TreeListingError, match="nodes"):
        Listing.from_plain({"total": 1, "left_out": 0})


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ([], "no node"),
        ([ROOT, ROOT], "second root"),
        ([ROOT, Node(1, 9, 1, 0, True)], "before its parent 9"),
        ([ROOT, Node(1, 0, 1, 0, True), Node(1, 0, 1, 0, True)], "comes twice"),
    ],
)
def test_nodes_that_do_not_form_a_tree_are_refused(nodes: list[Node], named: str) -> None:
    with pytest.raises(TreeListingError, match=named):
        largest(nodes, 5)


def test_a_chain_deeper_than_python_calls_is_listed() -> None:
    chain = [ROOT, *(Node(number, number - 1, 1, 0, True) for number in range(1, 5000))]
    assert largest(chain, 5000).nodes[-1].depth == 4999


@given(st.lists(st.integers(0, 30), max_size=40))
def test_the_last_prompts_are_remembered_within_their_budget(lengths: list[int]) -> None:
    recent = RecentPrompts(max_tokens=50)
    for number, length in enumerate(lengths):
        recent.add(Prompt((range(length // 2), range(length - length // 2)), extra_key=str(number)))
    kept = [int(prompt.extra_key or "") for prompt in recent]
    asked = [number for number, length in enumerate(lengths) if length]
    assert kept == asked[::-1][: len(kept)]
    assert recent.tokens == sum(lengths[number] for number in kept) <= 50
    if len(kept) < len(asked):
        assert recent.tokens + lengths[asked[::-1][len(kept)]] > 50


def test_a_prompt_that_is_larger_than_the_memory_pushes_nothing_out() -> None:
    recent = RecentPrompts(max_tokens=4)
    recent.add(Prompt((range(4),)))
    recent.add(Prompt((range(5),)))
    assert [len(prompt) for prompt in recent] == [4]


def test_an_alias_that_a_server_tells_is_read_and_an_unreadable_one_is_named() -> None:
    plain = {"branch": "b", "canonical": "c", "namespace": None, "tokens": 3, "canonical_tokens": 4, "node": None}
    assert AliasEdge.from_plain({**plain, "newer": 1}) == AliasEdge("b", "c", None, 3, 4, None)
    with pytest.raises(TreeListingError, match="canonical"):
        AliasEdge.from_plain({"branch": "b"})
