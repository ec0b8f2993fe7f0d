from __future__ import annotations

import json

import pytest

from rksc_sgl.deciding import Decision, EarlyStop
from rksc_sgl.deciding.policies import Probable
from rksc_sgl.errors import OptionError


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"policy": "sure"}, r"early_stop\.policy: must be one of certain"),
        ({"policy": 3}, r"early_stop\.policy"),
        ({"variable": ""}, r"early_stop\.variable"),
        ({"extract": "number"}, r"early_stop\.extract: must be answer, text"),
        ({"launch": "some"}, r"early_stop\.launch"),
        ({"launch": 0}, r"early_stop\.launch"),
        ({"launch": ()}, r"early_stop\.launch"),
        ({"launch": (2, True)}, r"early_stop\.launch"),
        ({"launch": 2.5}, r"early_stop\.launch"),
        ({"risk": 0.01}, r"early_stop\.risk: goes with probable only, not with 'certain'"),
        ({"policy": "probable", "risk": 1.0}, r"early_stop\.risk: must be above 0 and below 1, got 1.0"),
        ({"policy": "probable", "risk": "low"}, r"early_stop\.risk"),
        ({"policy": "probable", "cutoff": 0}, r"early_stop\.cutoff"),
        (
            {"policy": "probable", "cutoff": 0.02},
            r"early_stop\.calibrated_for: a cutoff holds for one number",
        ),
        ({"policy": "probable", "cutoff": 0.02, "calibrated_for": 0}, r"early_stop\.calibrated_for: must be a whole"),
        ({"policy": "probable", "calibrated_for": 8}, r"early_stop\.calibrated_for: goes with a cutoff only"),
        ({"policy": "window", "window": 1}, r"early_stop\.window: must be a whole number from 2 on"),
        ({"policy": "probable", "window": 4}, r"early_stop\.window: goes with window or confidence only"),
        ({"policy": "confidence"}, r"early_stop\.threshold: confidence needs a number"),
        (
            {"policy": "confidence", "threshold": 1.0, "launch": "fewest"},
            r"early_stop\.launch: confidence has no fewest",
        ),
        ({"policy": "window", "threshold": 1.0}, r"early_stop\.threshold: goes with confidence only"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        EarlyStop(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        EarlyStop(),
        EarlyStop("probable", risk=0.05, variable="x", extract="json:answer", launch="all"),
        EarlyStop("probable", cutoff=0.02, calibrated_for=32),
        EarlyStop("window", window=4, launch=(4, 8)),
        EarlyStop("confidence", threshold=0.8, window=64, launch=2),
    ],
)
def test_options_travel_as_plain_json(spec: EarlyStop) -> None:
    assert EarlyStop.from_mapping(json.loads(json.dumps(spec.to_mapping()))) == spec


def test_a_name_alone_is_a_policy() -> None:
    assert EarlyStop.from_mapping("certain") == EarlyStop("certain")
    assert EarlyStop().to_mapping() == {"policy": "certain"}


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        ({"stop": "certain"}, r"early_stop\.stop: unknown; there are policy, variable"),
        ([1], "early_stop: must be a policy's name or an object, got list"),
        ({"policy": len}, r"early_stop\.policy: must be a plain value"),
    ],
)
def test_what_does_not_describe_a_stop_is_refused(mapping: object, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        EarlyStop.from_mapping(mapping)


@pytest.mark.parametrize("values", [{"policy": lambda standing: None}, {"extract": str.strip}])
def test_a_callable_does_not_travel_and_says_so(values: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=r"early_stop\.(policy|extract): a callable cannot be sent"):
        EarlyStop(**values).to_mapping()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "launched"),
    [
        (EarlyStop(), "fewest"),
        (EarlyStop("probable"), "fewest"),
        (EarlyStop("window"), (5,)),
        (EarlyStop("window", window=3), (3,)),
        (EarlyStop("confidence", threshold=1.0), "all"),
        (EarlyStop(lambda standing: None), "all"),
        (EarlyStop(launch=4), (4,)),
        (EarlyStop(launch=[4, 2]), (4, 2)),  # type: ignore[arg-type]
    ],
)
def test_a_policy_is_launched_as_suits_it_unless_told_otherwise(spec: EarlyStop, launched: object) -> None:
    assert spec.launched == launched


def test_a_cutoff_is_refused_for_another_number_of_branches_than_it_was_calibrated_for() -> None:
    spec = EarlyStop("probable", cutoff=0.02, calibrated_for=32)
    assert isinstance(spec.policy_for(32), Probable)
    with pytest.raises(OptionError, match=r"early_stop\.cutoff: was calibrated for 32 branches, and this fork has 16"):
        Decision(16, spec)
