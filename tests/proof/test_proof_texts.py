"""The text of a proof is what its rows take it for."""

from __future__ import annotations

from dataclasses import asdict

from rksc_sgl.proof.texts import NUMBER, OTHER_NUMBER, prompts
from rksc_sgl.similarity.content_guard import same_content


def test_the_prompt_to_merge_asks_the_same_in_other_words() -> None:
    texts = prompts()
    assert texts.same != texts.first
    assert same_content(texts.first, texts.same).same


def test_the_prompt_that_must_not_merge_differs_in_its_number_only() -> None:
    texts = prompts()
    assert texts.changed.replace(OTHER_NUMBER, NUMBER) == texts.same
    assert same_content(texts.first, texts.changed).reason == "numbers"


def test_the_prompt_to_blend_has_the_same_notes_after_another_opening() -> None:
    texts = prompts()
    notes = texts.first.split("\n\n", 1)[1]
    assert texts.other.endswith(notes) and len(notes) > 2500
    assert texts.wrong.replace(OTHER_NUMBER, NUMBER) == texts.other


def test_each_number_of_the_shelf_marks_begins_with_another_digit() -> None:
    marks = [part[:3] for part in prompts().first.split("H-")[1:-1]]
    assert len(marks) == 6 and len({mark[0] for mark in marks}) == 6
    assert OTHER_NUMBER[0] not in {mark[0] for mark in marks}, "a changed number is told by its first digit"


def test_only_prompts_that_differ_late_begin_alike() -> None:
    texts = asdict(prompts())
    beginnings = {name: text.split()[0] for name, text in texts.items() if name not in ("wrong", "changed")}
    assert len(set(beginnings.values())) == len(beginnings)


def test_the_prompt_ends_where_the_number_begins() -> None:
    texts = prompts()
    assert all(text.endswith("H-") for text in (texts.first, texts.other, texts.same, texts.changed, texts.wrong))
