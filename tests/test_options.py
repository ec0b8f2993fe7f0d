from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.errors import OptionError
from rksc_sgl.options import RequestOptions, options_of

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"grop": "x"}, "rksc.grop: unknown option"),
        ({"group": 3}, "rksc.group: must be a string"),
        ({"group": ""}, "rksc.group: must have 1 to 128"),
        ({"group": "x" * 129}, "rksc.group: must have 1 to 128"),
        ({"branch": "1"}, "rksc.branch: must be an integer"),
        ({"branch": True}, "rksc.branch: must be an integer"),
        ({"branch": 2, "branches": 2}, "rksc.branch: must be 0 to branches - 1"),
        ({"branch": -1}, "rksc.branch: must be 0"),
        ({"branches": 0}, "rksc.branches: must be 1"),
        ({"branches": 1.0}, "rksc.branches: must be an integer"),
        ({"share": "always"}, "rksc.share: must be one of auto, exact"),
        ({"share": "exact", "allow_merge": True}, "rksc.allow_merge: is for share auto"),
        ({"allow_merge": 1}, "rksc.allow_merge: must be true or false"),
        ({"tau": 1.01}, "rksc.tau: must be from -1 to 1"),
        ({"tau": float("nan")}, "rksc.tau: must be a finite number"),
        ({"tau": True}, "rksc.tau: must be a finite number"),
        ({"share_scope": "tree"}, "rksc.share_scope: must be one of group, cache"),
        ({"share": "exact", "share_scope": "cache"}, "rksc.share_scope: is for blends and merges"),
        ({"confidence": 1}, "rksc.confidence: must be true or false"),
        ({"confidence": True, "op": "verify"}, "rksc.confidence: is for op branch only, and this is op verify"),
        ({"op": None}, "rksc.op: must be one of branch, verify"),
        ("auto", "rksc: must be an object"),
        (None, "rksc: must be an object"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(values: object, named: str) -> None:
    with pytest.raises(OptionError) as caught:
        options_of({"rksc": values})
    assert named in str(caught.value)


def test_a_message_repeats_only_the_beginning_of_a_long_value() -> None:
    for values in ({"group": 7, "share": "x" * 200_000}, {"y" * 200_000: 1}, {"yes_ids": ["z"] * 100_000}):
        with pytest.raises(OptionError) as caught:
            options_of({"rksc": values})
        assert len(str(caught.value)) < 1000


def test_options_survive_the_way_through_a_request() -> None:
    options = RequestOptions(group="g", branch=3, branches=8, share="exact", op="verify")
    assert RequestOptions.from_mapping(options.to_mapping()) == options
    assert RequestOptions().to_mapping() == {}


def test_blending_is_what_was_asked_for_and_merging_that_or_allowed() -> None:
    assert not RequestOptions(group="g").blends and not RequestOptions(share_scope="cache").blends
    assert RequestOptions(share="blend").blends and not RequestOptions().blends
    assert RequestOptions(share="blend", allow_merge=True).merges
    assert not RequestOptions(group="g", share="merge").blends and not RequestOptions(group="g", share="exact").blends
    assert not RequestOptions().merges and not RequestOptions(share="blend").merges
    assert RequestOptions(share="merge").merges and RequestOptions(allow_merge=True).merges
    options = RequestOptions(share="merge", allow_merge=True, tau=-1, share_scope="cache")
    assert RequestOptions.from_mapping(options.to_mapping()) == options


@pytest.mark.parametrize("custom_params", [None, {}, {"thinking_budget": 3}, "rksc", 5])
def test_a_request_without_our_key_has_not_opted_in(custom_params: object) -> None:
    assert options_of(custom_params) is None


@given(
    st.dictionaries(
        st.sampled_from(["group", "branch", "branches", "share", "op"]) | st.text(max_size=6),
        SCALARS | st.lists(SCALARS, max_size=3),
        max_size=4,
    )
)
def test_any_value_gives_options_or_an_option_error(values: dict[str, object]) -> None:
    try:
        options = options_of({"rksc": values})
    except OptionError as error:
        assert "rksc" in str(error)
    else:
        assert options is not None
        assert 0 <= options.branch < options.branches
