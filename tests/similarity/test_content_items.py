from __future__ import annotations

import pytest

from rksc_sgl.similarity.content_guard import same_content
from rksc_sgl.similarity.content_items import RULES, Kind, Rule, read_items

REASONS = {
    *("code", "quoted", "numbers", "units", "names", "negation", "quantifier", "comparison", "operator", "words")
}


@pytest.mark.parametrize(("kind", "rule"), RULES.items(), ids=lambda value: getattr(value, "name", ""))
def test_the_examples_of_every_rule_are_refused_and_forgiven_as_it_says(kind: Kind, rule: Rule) -> None:
    assert not same_content(*rule.refused).same
    assert rule.forgiven is None or same_content(*rule.forgiven).same


def test_every_kind_has_a_rule_and_a_reason_that_counters_know() -> None:
    assert list(RULES) == list(Kind)
    assert {kind.reason for kind in Kind} == REASONS


def test_a_text_is_read_into_items_of_these_kinds() -> None:
    text = 'Tom isn\'t sure: is "it" $5.50 or 7kg?\n- a few, at 8 a.m. `x`'
    read = [(item.kind.name, item.text) for item in read_items(text)]
    assert read == [
        ("NAME", "Tom"),
        ("NEGATION", "isn't"),
        ("WORD", "sure"),
        ("PUNCTUATION", ": "),
        ("WORD", "is"),
        ("QUOTED", '"it"'),
        ("UNIT", "$"),
        ("NUMBER", "5.50"),
        ("WORD", "or"),
        ("NUMBER", "7"),
        ("UNIT", "kg"),
        ("BREAK", "?"),
        ("OPERATOR", "- "),
        ("WORD", "a"),
        ("QUANTIFIER", "few"),
        ("PUNCTUATION", ", "),
        ("WORD", "at"),
        ("NUMBER", "8"),
        ("UNIT", "a.m."),
        ("CODE", "`x`"),
    ]


@pytest.mark.parametrize(
    "layout", ["He ran.\n\nWhy?", "He ran.\r\nWhy?", "He ran. Why?\n", "He  ran. Why?", "He ran.  Why?"]
)
def test_layout_between_sentences_says_nothing_but_columns_do(layout: str) -> None:
    assert (read_items(layout) == read_items("He ran. Why?")) == ("He  ran" not in layout)


def test_every_character_but_layout_is_in_some_item() -> None:
    text = "a\u200bb \u3000 c\x0bd\u2028e \u202f\u00a0"
    assert "".join(item.text for item in read_items(text)).replace(" ", "") == text.replace(" ", "")
