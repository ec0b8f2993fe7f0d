"""Points that were recorded from seeded traces: a change of code must not move them."""

from __future__ import annotations

import numpy as np
import pytest

from rksc_sgl.calibration.thresholds import SkipOutcomes, Traces, certify, certify_skip, simulate
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.options import Scope

LAYERS, MODEL_LAYERS, BRANCHES, FORKS = (4, 8, 12, 16), 20, 5, 600
SCALES = (1.0, 0.6, 0.4, 0.25)
CALLS = FORKS * BRANCHES
READOUTS = {
    layer: LinearReadout(np.array([1, 0, 0], np.float32), 0.0, scale)
    for layer, scale in zip(LAYERS, SCALES, strict=True)
}


def seeded(seed: int) -> Traces:
    """The first hidden unit of each layer is the margin with noise that falls with depth."""
    random = np.random.default_rng(seed)
    margin = np.repeat(random.normal(0.3, 1.2, FORKS), BRANCHES) + random.normal(0, 1.5, CALLS)
    hidden = np.zeros((CALLS, len(LAYERS), 3), dtype=np.float32)
    for column, scale in enumerate(SCALES):
        hidden[:, column, 0] = margin + scale * random.standard_t(5, CALLS)
    confidence = random.uniform(0.5, 1.0, CALLS)
    return Traces(hidden, margin, np.repeat(np.arange(FORKS), BRANCHES), confidence, LAYERS, MODEL_LAYERS)


@pytest.mark.parametrize(
    ("seed", "scope", "recorded"),
    [  # risk, t, flips, other selections, layer intervals of four
        (1, "verdict", [(0.01, 1.8, 4, 95, 9810), (0.02, 1.2, 20, 100, 8891), (0.2, 0.0, 171, 141, 6881)]),
        (1, "selection", [(0.01, 64.0, 0, 0, 15000), (0.02, 1.7, 4, 5, 13617), (0.2, 0.2, 122, 96, 7962)]),
        (2, "verdict", [(0.01, 1.8, 4, 81, 9752), (0.02, 1.1, 20, 99, 8690), (0.2, 0.0, 167, 132, 6906)]),
        (2, "selection", [(0.01, 2.5, 1, 1, 14804), (0.02, 1.4, 5, 6, 12755), (0.2, 0.2, 122, 94, 7994)]),
    ],
)
def test_certified_points_are_those_of_before(seed: int, scope: Scope, recorded: list[tuple]) -> None:
    points = certify(seeded(seed), READOUTS, (0.01, 0.02, 0.2), 0.05, scope=scope, prefer="cheapest")
    found = [
        (
            point.risk,
            point.t,
            round(point.flip_mean * CALLS),
            round(point.selection_mean * FORKS),
            round(point.layers_fraction * CALLS * MODEL_LAYERS / 4),
        )
        for point in points
    ]
    assert found == recorded


@pytest.mark.parametrize(
    ("resolve", "t", "left", "reruns", "flips", "others"),
    [
        (False, 6.0, [0, 69, 349, 598], 0, 0, 27),
        (False, 1.5, [0, 1389, 598, 374], 0, 7, 91),
        (False, 0.0, [0, 2392, 391, 165], 0, 155, 126),
        (True, 6.0, [0, 36, 160, 267], 553, 0, 0),
        (True, 3.0, [0, 323, 357, 315], 826, 0, 0),
        (True, 1.5, [0, 884, 439, 285], 753, 5, 9),
        (True, 0.5, [0, 1780, 430, 235], 342, 70, 49),
        (True, 0.0, [0, 2392, 391, 165], 0, 155, 126),
    ],
)
def test_verdicts_are_those_of_before(
    resolve: bool, t: float, left: list[int], reruns: int, flips: int, others: int
) -> None:
    run = simulate(seeded(3), READOUTS, t, resolve_ties=resolve)
    assert [int((run.exit_layer == layer).sum()) for layer in LAYERS] == left
    assert (int(run.rerun.sum()), int(run.flip.sum()), int(run.selected_differs.sum())) == (reruns, flips, others)


def test_certified_skips_are_those_of_before() -> None:
    random = np.random.default_rng(4)
    agreement = random.integers(1, 9, 1200) / 8
    differs = random.random(1200) < np.where(agreement == 1.0, 0.0, 0.5 * (1 - agreement))
    points = certify_skip(SkipOutcomes(agreement, differs), (0.01, 0.05, 0.3), 0.05)
    found = [(p.risk, p.agreement, round(p.skipped_share * 1200), round(p.differ_mean * 1200)) for p in points]
    assert found == [(0.01, 1.0, 174, 0), (0.05, 0.75, 481, 33), (0.3, 0.125, 1200, 261)]
