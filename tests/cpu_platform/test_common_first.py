"""Prefixes that share slots in their midst: read once, with the numbers that plain attention gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rksc_sgl.cpu_platform.attention.common_first import CommonFirst
from rksc_sgl.cpu_platform.attention.kernels import LogitRule, Workspace, planned_attention
from rksc_sgl.cpu_platform.attention.plan import AttentionPlan, HeadShape, build_plan
from rksc_sgl.cpu_platform.attention.prefix_tree import Trunk, shared_prefix_forest
from rksc_sgl.cpu_platform.attention.reference import reference_attention
from rksc_sgl.cpu_platform.attention.sequences import batch_sequences
from rksc_sgl.memory.shared_slots import SharedSlots

SLOTS, PREFIX, BRANCHES = 4096, 600, 4
HEADS = HeadShape(6, 2)


class Fork:
    """A donor, and branches that use its slots but for an opening and every ninth token of theirs."""

    def __init__(self) -> None:
        self.shared = SharedSlots(SLOTS, "cpu")
        self.table = torch.zeros(BRANCHES, PREFIX + 40, dtype=torch.int32)
        free = iter(np.random.default_rng(0).permutation(np.arange(1, SLOTS)).tolist())
        donor = [next(free) for _ in range(PREFIX)]
        self.rows = [donor]
        for branch in range(1, BRANCHES):
            theirs = [place > 20 and (place + branch) % 9 > 0 for place in range(PREFIX)]
            self.rows.append([donor[place] if one else next(free) for place, one in enumerate(theirs)])
            self.shared.share(torch.tensor([donor[place] for place, one in enumerate(theirs) if one]))
        for row, slots in enumerate(self.rows):
            self.table[row, :PREFIX] = torch.tensor(slots)
        self.table[:, PREFIX:] = torch.tensor([[next(free) for _ in range(40)] for _ in range(BRANCHES)])
        self.order = CommonFirst(self.shared)

    def plan(self, prefix: int, tokens: int, order: CommonFirst | None) -> AttentionPlan:
        lists = (list(range(BRANCHES)), [prefix] * BRANCHES, [tokens] * BRANCHES)
        return build_plan(batch_sequences(self.table, *lists, order), HEADS, threads=2)


def width(plan: AttentionPlan) -> int:
    """Keys that a plan reads from the pool."""
    return sum(tile.sequences * tile.parts * tile.width for tile in plan.tiles)


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_branches_share_is_read_once_and_the_numbers_are_the_same(tokens: int) -> None:
    fork = Fork()
    torch.manual_seed(0)
    queries = torch.randn(BRANCHES * tokens, 6, 16)
    keys, values = torch.randn(SLOTS, 2, 16), torch.randn(SLOTS, 2, 16)
    for prefix in (PREFIX, PREFIX + 1, PREFIX + 17):  # it only grows
        plan = fork.plan(prefix, tokens, fork.order)
        out = torch.full((BRANCHES * tokens, 6, 16), float("nan"))
        planned_attention(plan, queries, keys, values, LogitRule(0.3, 0.0), out, Workspace())
        lists = (list(range(BRANCHES)), [prefix] * BRANCHES, [tokens] * BRANCHES)
        expected = reference_attention(queries, keys, values, fork.table, *lists, scale=0.3, window=None, logit_cap=0.0)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
        assert width(plan) < 0.65 * width(fork.plan(prefix, tokens, None))


def test_the_slots_are_the_same_ones_whoever_comes_and_goes() -> None:
    fork = Fork()
    for _ in range(3):
        for row, slots in enumerate(fork.rows):
            found = fork.order.ordered(row, np.array(slots))
            assert sorted(found) == sorted(slots)
        fork.shared.share(torch.tensor(fork.rows[0][40:90]))
    fork.shared.clear()
    slots = np.array(fork.rows[1])
    assert fork.order.ordered(1, slots) is slots, "nothing is shared any more"


def test_another_request_in_the_same_row_is_seen() -> None:
    fork = Fork()
    fork.order.ordered(1, np.array(fork.rows[1]))
    other = np.array(fork.rows[2])
    assert sorted(fork.order.ordered(1, other)) == sorted(other)
    shorter = other[:300]
    assert sorted(fork.order.ordered(1, shorter)) == sorted(shorter)


def test_owners_order_a_prefix_that_comes_before_others_are_there() -> None:
    fork = Fork()
    sequences = batch_sequences(fork.table, list(range(BRANCHES)), [PREFIX] * BRANCHES, [1] * BRANCHES, fork.order)
    (tree,) = shared_prefix_forest(sequences, min_shared=32, window=None)
    assert isinstance(tree, Trunk) and tree.start == 0 and tree.stop > 350, "what all four read is one stretch"
