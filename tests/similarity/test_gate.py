from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.gate import auc, layer_weights, pooled_similarity, published_similarity


def test_weights_grow_with_depth_and_sum_to_one() -> None:
    weights = layer_weights(30)
    assert weights.sum().item() == pytest.approx(1.0)
    assert bool((weights.diff() > 0).all())
    assert (weights[-1] / weights[0]).item() == pytest.approx(math.exp(1.5), rel=1e-5)
    assert layer_weights(1).tolist() == [1.0]
    with pytest.raises(OptionError, match="at least 1"):
        layer_weights(0)


def test_the_published_score_is_the_weighted_cosine() -> None:
    donor = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    branch = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    assert published_similarity(donor, branch) == pytest.approx(layer_weights(2)[0].item())
    assert published_similarity(donor, -donor) == pytest.approx(-1.0)
    assert published_similarity(donor.to(torch.bfloat16), donor.to(torch.bfloat16)) == pytest.approx(1.0)


def test_pooled_states_are_compared_less_their_mean() -> None:
    mean = torch.full((2, 3), 100.0)
    donor = mean + torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    branch = mean + torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert published_similarity(donor, branch) > 0.99
    assert pooled_similarity(donor, branch, mean) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 3e38])
def test_states_without_a_direction_are_never_similar(value: float) -> None:
    donor = torch.ones(2, 3)
    branch = donor.clone()
    branch[1] = value
    assert published_similarity(donor, branch) == float("-inf")
    assert pooled_similarity(branch, donor, torch.zeros(2, 3)) == float("-inf")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match=r"\[2, 3\] and \[2, 4\]"):
        published_similarity(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(OptionError, match="mean"):
        pooled_similarity(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3))


scores = st.lists(st.sampled_from([float("-inf"), -1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12)


@given(scores, scores)
def test_auc_is_the_share_of_pairs_in_order_with_ties_half(positives: list[float], negatives: list[float]) -> None:
    pairs = [(one, other) for one in positives for other in negatives]
    expected = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs) / len(pairs)
    assert auc(positives, negatives) == pytest.approx(expected)
    assert auc(positives, negatives) + auc(negatives, positives) == pytest.approx(1.0)


def test_auc_needs_numbers_on_both_sides() -> None:
    with pytest.raises(OptionError, match="both sides"):
        auc([], [1.0])
    with pytest.raises(OptionError, match="nan"):
        auc([float("nan")], [1.0])
