from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

from rich.console import Console

from rksc_sgl.tree_view import AliasEdge, Listing, Node, largest, page, text_tree

NODES = [
    Node(0, None, 0, 1, False),
    Node(1, 0, 3, 2, True),
    Node(2, 1, 9, 0, True),
    Node(3, 1, 1, 0, False),
    Node(4, 0, 2, 0, True),
]
HOSTILE = "<script>alert('x')</script> & [red]\x1b[31m\n"


def listing(max_nodes: int = 10) -> Listing:
    shown = largest(NODES, max_nodes)
    told = {
        1: {"first_ids": (5, 6), "text": HOSTILE, "namespace": "<b>ns</b>", "salted": True},
        2: {"first_ids": tuple(range(9)), "text": None},
    }
    return replace(shown, nodes=tuple(replace(node, **told.get(node.id, {})) for node in shown.nodes))


def as_text(shown: Listing) -> str:
    out = StringIO()
    Console(file=out, width=200).print(text_tree("scheduler 0", shown))
    return out.getvalue()


class Structure(HTMLParser):
    """Which tags a page has, and whether each one that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_text_shows_each_node_and_hides_control_characters() -> None:
    lines = as_text(listing()).splitlines()
    assert lines[0] == "scheduler 0"
    assert "root, 15 tokens" in lines[1]
    assert "3 tokens  held 2x  namespace '<b>ns</b>'  salted" in lines[2]
    assert lines[2].endswith(repr(HOSTILE) + "…")
    assert "\x1b" not in "".join(lines)
    assert "9 tokens  ids 0 1 2 3 4 5 6 7 8" in lines[3]
    assert "1 token  not on the device" in lines[4]
    assert "2 tokens" in lines[5]
    assert len(lines) == 6


def test_what_is_not_shown_is_counted_where_it_is_missing() -> None:
    text = as_text(listing(3))
    assert text.count("1 more node not shown") == 2  # below the root, and below node 1


def test_the_page_is_one_file_with_every_tag_closed_and_nothing_executed() -> None:
    html = page("Tree of <you>", [("scheduler 0", listing()), ("scheduler 1 & more", listing(2))])
    structure = Structure()
    structure.feed(html)
    structure.close()
    assert structure.open == []
    assert "script" not in structure.seen
    assert "b" not in structure.seen
    assert structure.seen.count("details") == 2 + 2
    assert not [name for name, _ in structure.attributes if name in ("src", "href") or name.startswith("on")]
    assert "&lt;script&gt;" in html
    assert "scheduler 1 &amp; more" in html
    assert "2 more nodes not shown" in html


def test_a_chain_deeper_than_python_calls_becomes_a_page() -> None:
    chain = [NODES[0], *(Node(number, number - 1, 1, 0, True) for number in range(1, 3000))]
    assert page("deep", [("s", largest(chain, 3000))]).count("<details") == 2999


ALIASES = (
    AliasEdge("<b>one</b>", "anchor", None, 40, 44, 2),
    AliasEdge("two", "anchor", "ns", 41, 44, 99),
    AliasEdge("three", "anchor", None, 42, 44, None),
)


def test_an_alias_is_drawn_below_the_node_that_it_leads_to() -> None:
    lines = as_text(replace(listing(), aliases=ALIASES)).splitlines()
    place = next(index for index, line in enumerate(lines) if "<b>one</b>" in line)
    assert "9 tokens" in lines[place - 1] and lines[place].index("<-") > lines[place - 1].index("9 tokens")
    assert "40 tokens read as the 44 of 'anchor'" in lines[place]
    (two,) = (line for line in lines if "'two'" in line)
    (three,) = (line for line in lines if "'three'" in line)
    assert two.endswith("not shown") and three.endswith("not in the tree any more")


def test_a_page_has_its_aliases_with_every_tag_closed() -> None:
    html = page("aliases", [("s", replace(listing(), aliases=ALIASES))])
    structure = Structure()
    structure.feed(html)
    structure.close()
    assert structure.open == [] and "b" not in structure.seen
    assert html.count('<div class="leaf alias">') == 3
    assert html.index("9 tokens") < html.index("&lt;b&gt;one") < html.index("1 token<")
