"""A radix tree to look at: which nodes are worth showing, and how they read as text and as a page."""

from rksc_sgl.tree_view.listing import AliasEdge, Listing, Node, ShownNode, largest
from rksc_sgl.tree_view.prompts import Prompt, RecentPrompts
from rksc_sgl.tree_view.render import page, text_tree

__all__ = ["AliasEdge", "Listing", "Node", "Prompt", "RecentPrompts", "ShownNode", "largest", "page", "text_tree"]
