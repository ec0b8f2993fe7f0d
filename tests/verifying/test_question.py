from __future__ import annotations

import pytest

from rksc_sgl.verifying.question import Turns, question_with_labels, verification_suffix, with_thought_closed


def test_a_question_names_the_labels_and_stands_in_a_turn_of_its_own() -> None:
    asked = question_with_labels("Right? {labels}", ("A", "B", "C"))
    assert asked == "Right? A or B or C"
    assert question_with_labels(None, ("YES", "NO")).endswith("Reply with YES or NO.")
    turns = Turns("<end>\n", ("<user>", "<end>\n"), "<assistant>")
    assert verification_suffix(asked, turns) == "<end>\n<user>Right? A or B or C<end>\n<assistant>"
    assert verification_suffix(asked, None) == "\n\nRight? A or B or C\n"


@pytest.mark.parametrize(
    ("opening", "thinks", "closed"),
    [
        ("<assistant>\n", False, "<assistant>\n"),
        ("<assistant>\n", True, "<assistant>\n<think>\n\n</think>\n\n"),
        ("<assistant>\n<think>\n", False, "<assistant>\n<think>\n\n</think>\n\n"),
        ("<assistant>\n<think>\n", True, "<assistant>\n<think>\n\n</think>\n\n"),
        ("<assistant><think>", False, "<assistant><think>\n\n</think>\n\n"),
        ("<assistant>\n<think>\n\n</think>\n\n", False, "<assistant>\n<think>\n\n</think>\n\n"),
    ],
)
def test_a_thought_is_closed_so_that_the_next_token_is_the_reply(opening: str, thinks: bool, closed: str) -> None:
    assert with_thought_closed(opening, "<think>", "</think>", thinks=thinks) == closed
