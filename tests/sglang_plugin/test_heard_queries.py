"""Who asks in a pass of several sequences, and what they attend to: on doubles of SGLang's objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rksc_sgl.blending.attended import QUERIES, asking
from rksc_sgl.donors.forks import Donor
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.values import BlendPlan
from rksc_sgl.sglang_plugin.branch_state import BranchState
from rksc_sgl.sglang_plugin.passes import heard_queries
from rksc_sgl.sglang_plugin.passes.blends import BlendJob, Blends, _rows_of
from rksc_sgl.sglang_plugin.passes.claims import Batch

HEADS, KV_HEADS, SIZE, SLOTS = 4, 2, 8, 600
PREFIXES, LENGTHS = [10, 0, 37], [80, 25, 50]  # of three sequences, of which the second is exact
PLACES, COMPLETE = (0, 2), {0: True, 2: False}


class Attention(torch.nn.Module):
    """As far as a listener knows it."""

    tp_q_head_num, scaling, logit_cap, sliding_window_size = HEADS, 0.4, 0.0, -1

    def forward(self, q: torch.Tensor, *more: Any) -> torch.Tensor:
        return q


class Pool:
    def __init__(self) -> None:
        self.keys = torch.randn(SLOTS, KV_HEADS, SIZE, generator=torch.Generator().manual_seed(1))

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        assert layer == 1, "the last layer of the probe"
        return self.keys


def job(place: int, table: torch.Tensor) -> BlendJob:
    length, begin = LENGTHS[place], PREFIXES[place]
    source, always = np.arange(length), np.zeros(length, dtype=np.bool_)
    plan = BlendPlan(Donor("d", np.arange(300)), None, source, always, RequestOptions())
    ask = asking(length, complete=COMPLETE[place])
    stays = np.zeros(length, dtype=np.bool_)
    own = table[place, : begin + length]
    return BlendJob(place, BranchState(RequestOptions()), plan, source, always, own, ask, stays)


def plainly(queries: torch.Tensor, keys: torch.Tensor, place: int) -> torch.Tensor:
    """Attention of one token over those up to it."""
    mine = keys[: place + 1].repeat_interleave(HEADS // KV_HEADS, dim=1)
    return (torch.einsum("hd,nhd->hn", queries, mine) * Attention.scaling).softmax(-1).mean(0)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    attention = Attention()
    monkeypatch.setattr(heard_queries, "attention_modules", lambda model: [None, attention])
    config = SimpleNamespace(num_hidden_layers=6)
    return SimpleNamespace(model=None, model_config=config, token_to_kv_pool=Pool(), attention=attention)


def test_each_sequence_is_asked_by_its_own_tokens_at_their_own_places(runner: Any) -> None:
    table = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(2))[:450].view(3, 150)
    slots = torch.cat([table[place, PREFIXES[place] : PREFIXES[place] + LENGTHS[place]] for place in range(3)])
    forward_batch = SimpleNamespace(extend_prefix_lens_cpu=PREFIXES, extend_seq_lens_cpu=LENGTHS, out_cache_loc=slots)
    batch = Batch(
        runner,
        forward_batch,
        SimpleNamespace(reqs=[], tree_cache=SimpleNamespace(token_to_kv_pool_allocator=object)),
        "",
        lambda found: found,
    )
    jobs = [job(place, table) for place in PLACES]
    rows, heard = _rows_of(batch, jobs, [torch.arange(450, 600), torch.arange(450, 600)])
    queries = torch.randn(sum(LENGTHS), HEADS * SIZE, generator=torch.Generator().manual_seed(3))
    blends = Blends(batch, jobs, rows, heard)
    with blends.at_work():
        runner.attention(queries, None, None, forward_batch)
        runner.attention(torch.zeros_like(queries), None, None, forward_batch)  # only the first call counts
        found = blends._attended(torch.zeros(LENGTHS[0] + LENGTHS[2]))
    expected = []
    for place in PLACES:
        first, begin = sum(LENGTHS[:place]), PREFIXES[place]
        keys = runner.token_to_kv_pool.keys[table[place, : begin + LENGTHS[place]]]
        total = torch.zeros(len(keys))
        ask = asking(LENGTHS[place], complete=COMPLETE[place])
        assert ask.size == min(QUERIES, LENGTHS[place])
        for row in ask.tolist():
            own = plainly(queries[first + row].view(HEADS, SIZE), keys, begin + row)
            total[: begin + row + 1] += own
        expected.append(total[begin:] / ask.size)
    torch.testing.assert_close(found, torch.cat(expected))


def test_where_nothing_is_heard_all_are_attended_to_alike_and_it_is_said(
    runner: Any, caplog: pytest.LogCaptureFixture
) -> None:
    heard_queries._warn_once.cache_clear()
    listener = heard_queries.HeardQueries(runner, 1, torch.arange(4), torch.arange(4))
    with listener.listening():
        assert listener.attention_received([(4, torch.arange(4))]) is None
    assert "Attention was not called with its queries" in caplog.text
    assert not runner.attention._forward_pre_hooks, "the listener is gone"


def test_a_listener_is_gone_where_the_pass_fails(runner: Any) -> None:
    listener = heard_queries.HeardQueries(runner, 1, torch.arange(4), torch.arange(4))
    with pytest.raises(ZeroDivisionError), listener.listening():
        _ = 1 / 0
    assert not runner.attention._forward_pre_hooks
