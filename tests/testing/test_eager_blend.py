"""The plain blend against the plain prefill, where the two must agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rksc_sgl.testing.eager_blend import Probed, served_choice
from tests.six_layers import VOCABULARY, SixLayers

PROBE = 2


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(60, VOCABULARY - 10, count).tolist()


@pytest.fixture(scope="module")
def prompts() -> tuple[list[int], list[int], torch.Tensor]:
    """Donor, branch, and where the branch's tokens stand in the donor."""
    material = words(1, 80)
    source = torch.cat([torch.full((9,), -1), torch.arange(5, 85)])
    return [*words(2, 5), *material], [*words(3, 9), *material], source


def test_with_everything_computed_it_is_the_prefill(
    six_layers: SixLayers, prompts: tuple[list[int], list[int], torch.Tensor]
) -> None:
    donor, branch, source = prompts
    after, eager = words(4, 6), six_layers.eager
    exact = eager.prefill([*branch, *after], tail=len(after) + 1)
    for choose in (served_choice(threshold=-1.0, share=1.0), lambda probed: torch.ones(len(branch), dtype=torch.bool)):
        blended = eager.blend(branch, eager.prefill(donor), source, choose, probe=PROBE, after=after)
        assert blended.computed.all()
        torch.testing.assert_close(blended.logits, exact.logits, atol=1e-4, rtol=1e-4)


def test_what_follows_reads_the_kv_that_was_taken_over(
    six_layers: SixLayers, prompts: tuple[list[int], list[int], torch.Tensor]
) -> None:
    donor, branch, source = prompts
    after, eager, seen = words(4, 6), six_layers.eager, list[Probed]()

    def choose(probed: Probed) -> torch.Tensor:
        seen.append(probed)
        return served_choice(threshold=0.0, share=0.2)(probed)

    kv = eager.prefill(donor)
    blended = eager.blend(branch, kv, source, choose, probe=PROBE, after=after)
    exact = eager.prefill([*branch, *after], tail=len(after) + 1)
    assert not torch.allclose(blended.logits, exact.logits, atol=1e-3), "it is an approximation"
    (probed,) = seen
    taken = (~blended.computed).nonzero().flatten()
    assert len(taken) > 40 and len(probed.attended) == len(branch)
    assert float(probed.attended.sum()) == pytest.approx(1.0, abs=1e-4)
    for layer in range(PROBE, len(kv.kv)):
        for own, theirs in zip(blended.kv[layer], kv.kv[layer], strict=True):
            assert torch.equal(own[taken], theirs[source[taken]])
