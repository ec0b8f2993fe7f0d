"""What the benchmark of routers asks, and what it makes of what it counted."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks import routing


def test_forks_share_contexts_and_no_two_ask_the_same() -> None:
    chats = routing.chats(32, 8)
    assert len(set(chats)) == 32
    contexts = Counter(chat.rpartition("\n\n")[0] for chat in chats)
    assert len(contexts) == 8 and set(contexts.values()) == {4}
    first, second = chats[:2]
    assert first.split("\n")[0] != second.split("\n")[0], "texts differ from their first line on"


def test_the_counters_of_a_worker_are_summed_over_their_labels() -> None:
    text = (
        'sglang:prompt_tokens_total{model_name="m",is_streaming="False"} 100.0\n'
        'sglang:prompt_tokens_total{model_name="m",is_streaming="True"} 1.5e+02\n'
        'sglang:prompt_tokens_total_created{model_name="m"} 1.7e+09\n'
    )
    assert routing._total(text, "sglang:prompt_tokens_total") == 250
    assert routing._total(text, "sglang:cached_tokens_total") == 0


def test_fractions_are_of_what_plain_requests_would_compute(capsys: pytest.CaptureFixture[str]) -> None:
    counted = {
        "one_request": [routing.Counted(1100, 100, 1.0, (60, 40)), routing.Counted(1100, 140, 1.5, (80, 60))],
        "keyed": [routing.Counted(1200, 150, 2.0, (100, 50)), routing.Counted(1200, 150, 2.0, (100, 50))],
        "round_robin": [routing.Counted(1000, 500, 3.0, (250, 250)), routing.Counted(1000, 600, 3.3, (300, 300))],
    }
    result = routing._result(SimpleNamespace(forks=32, branches=8, turns=2), counted)
    assert result == {
        "computed_fraction_one_request": 0.12,
        "computed_fraction_keyed": 0.15,
        "computed_fraction_round_robin": 0.55,
        "turns": 2,
        "seconds": {"one_request": 1.25, "keyed": 2.0, "round_robin": 3.15},
        "noise": {"one_request": 1.5, "keyed": 1.0, "round_robin": 1.1},
    }
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_every_way_has_a_policy_and_the_last_line_names_it() -> None:
    assert list(routing.WAYS) == ["one_request", "keyed", "round_robin"]
    assert [policy[0] for _, policy in routing.WAYS.values()] == ["cache_aware", "manual", "round_robin"]
