from __future__ import annotations

from typing import Any

import pytest

from rksc_sgl.generated.streamed import StreamedAnswer


def event(text: str, ids: list[int], tokens: int, finish: dict[str, Any] | None = None) -> dict[str, Any]:
    top = [[(-0.5, one, None)] for one in ids]
    meta_info = {"completion_tokens": tokens, "finish_reason": finish, "output_top_logprobs": top, "id": "r"}
    return {"text": text, "output_ids": ids, "meta_info": meta_info, "prompt_token_ids": [1, 2]}


LENGTH = {"type": "length"}


@pytest.mark.parametrize(
    ("incremental", "events"),
    [
        (False, [event("one", [5], 1), event("one two", [5, 6], 2), event("one two three", [5, 6, 7], 3, LENGTH)]),
        (True, [event("one", [5], 1), event(" two", [6], 2), event(" three", [7], 3, LENGTH)]),
    ],
)
def test_both_ways_to_stream_give_one_answer(incremental: bool, events: list[dict[str, Any]]) -> None:
    answer = StreamedAnswer(incremental)
    assert [answer.add(one) for one in events] == ["one", " two", " three"]
    assert answer.response == event("one two three", [5, 6, 7], 3, LENGTH)


@pytest.mark.parametrize("incremental", [False, True])
def test_an_abort_has_the_whole_text_in_both(incremental: bool) -> None:
    answer = StreamedAnswer(incremental)
    answer.add(event("one", [5], 1))
    assert answer.add(event("one two", [6], 2, {"type": "abort"})) == " two"
    assert answer.response["text"] == "one two"
