from __future__ import annotations

import json

import pytest

from rksc_sgl.deciding import EarlyStop
from rksc_sgl.errors import OptionError
from rksc_sgl.one_request.options import ForkLimits, ForkOptions, ForkSettings, Verification


def test_nothing_asked_for_is_a_vote_of_eight_that_stops_when_it_is_certain() -> None:
    options = ForkOptions.from_mapping({})
    assert (options.count, options.wordings, options.select, options.share) == (8, None, "vote", "auto")
    assert options.verify == Verification() and options.early_stop == EarlyStop("certain")
    assert options.returned == "best"


def test_every_key_has_its_short_forms() -> None:
    options = ForkOptions.from_mapping(
        {
            "branches": ["How many?", "Count them."],
            "verify": {"question": "Sure? {labels}", "labels": ["A", "B"], "exit": "off"},
            "early_stop": {"policy": "probable", "risk": 0.05},
            "return": "all",
            "extract": "json:total",
            "deadline_s": 3,
        }
    )
    assert (options.count, options.wordings) == (2, ("How many?", "Count them."))
    assert options.verify == Verification("Sure? {labels}", ("A", "B"), "off")
    assert options.early_stop == EarlyStop("probable", risk=0.05)
    assert options.returned == "all"
    assert ForkOptions.from_mapping({"verify": "Really?"}).verify == Verification("Really?")
    for off in (False, None):
        assert ForkOptions.from_mapping({"verify": off}).verify is None
        assert ForkOptions.from_mapping({"early_stop": off}).early_stop is None
    assert ForkOptions.from_mapping({"verify": True, "early_stop": "window"}).early_stop == EarlyStop("window")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"branch": 3}, r"rksc\.branch: unknown; there are branches, share"),
        ({"branches": 0}, r"rksc\.branches"),
        ({"branches": True}, r"rksc\.branches"),
        ({"branches": 2.0}, r"rksc\.branches"),
        ({"branches": []}, r"rksc\.branches"),
        ({"branches": ["a", 1]}, r"rksc\.branches"),
        ({"branches": {"a": 1}}, r"rksc\.branches"),
        ({"share": "all"}, r"rksc\.share: must be one of auto"),
        ({"select": ["vote"]}, r"rksc\.select: must be one of vote"),
        ({"select": "score", "verify": False}, r"rksc\.verify: select score needs"),
        ({"verify": 3}, r"rksc\.verify"),
        ({"verify": {"labels": ["YES"]}}, r"rksc\.verify\.labels"),
        ({"verify": {"labels": "YES"}}, r"rksc\.verify\.labels"),
        ({"verify": {"question": ""}}, r"rksc\.verify\.question"),
        ({"verify": {"exit": "soon"}}, r"rksc\.verify\.exit"),
        ({"verify": {"risk": 2}}, r"rksc\.verify\.risk"),
        ({"verify": {"scope": "all"}}, r"rksc\.verify\.scope"),
        ({"verify": {"depth": 1}}, r"rksc\.verify\.depth: unknown"),
        ({"early_stop": "soon"}, r"rksc\.early_stop\.policy"),
        ({"early_stop": {"risk": 0.1}}, r"rksc\.early_stop\.risk"),
        ({"early_stop": {"extract": "text"}}, r"rksc\.early_stop\.extract"),
        ({"early_stop": {"variable": "a"}}, r"rksc\.early_stop\.variable"),
        ({"early_stop": 4}, r"rksc\.early_stop"),
        ({"extract": "number"}, r"rksc\.extract"),
        ({"extract": 3}, r"rksc\.extract"),
        ({"return": "some"}, r"rksc\.return"),
        ({"deadline_s": 0}, r"rksc\.deadline_s"),
        ({"deadline_s": "1"}, r"rksc\.deadline_s"),
        ([], r"rksc: must be an object"),
        ("vote", r"rksc: must be an object"),
    ],
)
def test_a_wrong_key_or_value_is_named(wrong: object, named: str) -> None:
    with pytest.raises(OptionError, match=f"^{named}"):
        ForkSettings().options(wrong)


def test_what_is_said_nearer_to_the_body_goes_before_and_the_rest_is_the_servers_default() -> None:
    settings = ForkSettings.from_json(json.dumps({"branches": 3, "select": "majority", "share": "exact"}))
    options = settings.options({"branches": 4, "select": "score"}, None, {"select": "vote"})
    assert (options.count, options.select, options.share) == (4, "vote", "exact")


def test_a_server_refuses_more_than_it_allows() -> None:
    settings = ForkSettings(limits=ForkLimits(branches=4, deadline_s=2.0))
    with pytest.raises(OptionError, match=r"^rksc\.branches: must be at most 4 on this server, got 5"):
        settings.options({"branches": 5})
    with pytest.raises(OptionError, match=r"^rksc\.deadline_s: must be at most 2"):
        settings.options({"branches": 2, "deadline_s": 3})
    assert settings.deadline_s(settings.options({"branches": 2})) == 2.0
    assert settings.deadline_s(settings.options({"branches": 2, "deadline_s": 1})) == 1.0


def test_several_choices_let_as_many_branches_finish() -> None:
    settings = ForkSettings()
    assert settings.options({"branches": 4}, choices=3).early_stop is None
    assert settings.options({"branches": 4, "return": "all"}).early_stop is None
    with pytest.raises(OptionError, match=r"^rksc\.early_stop: must be false where n is 3"):
        settings.options({"branches": 4, "early_stop": "certain"}, choices=3)
    with pytest.raises(OptionError, match=r"^n: must be at most rksc\.branches, which is 4"):
        settings.options({"branches": 4}, choices=5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON object"),
        ("3", "JSON object"),
        ('{"branches": 100}', r"rksc\.branches: must be at most 64"),
        ('{"branch": 1}', r"rksc\.branch: unknown"),
        ('{"limits": {"forks": 0}}', r"limits\.forks"),
        ('{"limits": {"tokens": true}}', r"limits\.tokens"),
        ('{"limits": {"branches": 5000}}', r"limits\.branches"),
        ('{"limits": {"deadline_s": -1}}', r"limits\.deadline_s"),
        ('{"limits": {"fork": 1}}', r"limits\.fork: unknown"),
        ('{"limits": 3}', r"limits: must be an object"),
    ],
)
def test_a_wrong_default_is_found_when_the_server_is_started(text: str, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        ForkSettings.from_json(text)


def test_a_server_that_was_told_nothing_has_the_defaults() -> None:
    assert ForkSettings.from_environment({}) == ForkSettings()
