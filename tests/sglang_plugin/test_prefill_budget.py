"""What a blend counts against the budget of a prefill batch, on doubles of SGLang's and on a real server."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_check import Model
from benchmarks.pass_cost import Passes, counted_server
from rksc_sgl.donors.forks import Donor
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.values import BlendPlan
from rksc_sgl.sglang_plugin.placing import budget
from rksc_sgl.testing import write_tiny_model

SHARE = 0.25  # layers of the probe


def plan(tokens: int, new: int, always: int = 0, recompute: float = 0.0) -> BlendPlan:
    """The first tokens are new, the next ones always computed, the others may be taken over."""
    source = np.arange(tokens) - new
    leading = np.zeros(tokens, dtype=np.bool_)
    leading[: new + always] = True
    donor = Donor("donor", np.arange(tokens))
    return BlendPlan(donor, None, np.maximum(source, -1), leading, RequestOptions(recompute=recompute))


def request(tokens: int, blend: BlendPlan | None, cached: int = 0, generated: int = 0) -> Any:
    return SimpleNamespace(
        full_untruncated_fill_ids=range(tokens + generated),
        prefix_len=cached,
        extend_len=tokens + generated - cached,
        rksc=SimpleNamespace(blend=blend, sharing=SharingReport()),
    )


class Adder:
    """SGLang's rule in short: what does not fit is cut, and nothing comes after it."""

    def __init__(self, chunk: int | None, limit: int = 10_000) -> None:
        self.rem_chunk_tokens, self.rem_input_tokens = chunk, limit
        self.can_run_list: list[Any] = []
        self.new_chunked_req: Any = None

    def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> str:
        tokens = len(req.full_untruncated_fill_ids) - req.prefix_len
        if tokens > self.rem_input_tokens and self.can_run_list:
            return "other"
        if self.rem_chunk_tokens is not None and tokens > self.rem_chunk_tokens:
            tokens = self.rem_chunk_tokens
            self.new_chunked_req = req
        self.can_run_list.append(req)
        self.rem_input_tokens -= tokens
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= tokens
        return "continue"


def admitted(adder: Adder, *requests: Any, rows: int = 10_000) -> list[Any]:
    scheduler = SimpleScheduler()
    budget._rooms[scheduler] = budget.ProbeRoom(rows, SHARE)
    with budget.admitting(scheduler):
        for req in requests:
            budget.admit_by_computed(Adder.add_one_req, adder, req, False, None)
    return adder.can_run_list


class SimpleScheduler:
    pass


def test_what_is_computed_is_known_before_the_probe_but_for_what_moved() -> None:
    assert plan(100, 10).computed(0) == 10
    assert plan(100, 10, always=20).computed(0) == 30
    assert plan(100, 10, always=20, recompute=0.1).computed(0) == 30, "what always is counts among those that moved"
    assert plan(100, 10, always=20, recompute=0.5).computed(0) == 55
    assert plan(100, 10, always=20).computed(25) == 5, "the rest of it, behind what is cached"


def test_blends_are_admitted_by_what_they_compute() -> None:
    blends = [request(400, plan(400, 40)) for _ in range(3)]
    adder = Adder(chunk=512)
    assert admitted(adder, *blends) == blends and adder.new_chunked_req is None
    charged = math.ceil(400 * SHARE + 40 * (1 - SHARE))
    assert adder.rem_chunk_tokens == 512 - 3 * charged and adder.rem_input_tokens == 10_000 - 3 * charged
    assert [one.rksc.sharing.budget_tokens for one in blends] == [charged] * 3


def test_every_token_counts_without_a_blend_before_the_room_is_known_and_where_nothing_would_fit() -> None:
    plain, own = request(400, None), request(400, plan(400, 40))
    own.rksc = None
    adder = Adder(chunk=512)
    assert admitted(adder, plain) == [plain] and adder.rem_chunk_tokens == 112
    assert admitted(Adder(chunk=400), own) == [own]
    unknown, adder = request(400, plan(400, 40)), Adder(chunk=512)
    budget.admit_by_computed(Adder.add_one_req, adder, unknown, False, None)
    assert adder.rem_chunk_tokens == 112 and unknown.rksc.sharing.budget_tokens is None
    large, adder = request(400, plan(400, 380)), Adder(chunk=300)
    admitted(adder, large)
    assert adder.new_chunked_req is large and adder.rem_chunk_tokens == 0, "it is cut as ever"


def test_the_rows_of_a_probe_are_bounded() -> None:
    blends = [request(400, plan(400, 40)) for _ in range(3)]
    adder = Adder(chunk=500)
    admitted(adder, *blends, rows=800)
    assert [one.rksc.sharing.budget_tokens is not None for one in blends] == [True, True, False]
    assert adder.new_chunked_req is blends[2]


def test_a_budget_that_was_raised_for_nothing_is_lowered_again() -> None:
    refused, adder = request(400, plan(400, 40)), Adder(chunk=None)
    adder.rem_input_tokens = 100
    adder.can_run_list.append(request(50, None))

    def refuse(adder: Any, req: Any, has_chunked_req: bool, align: int | None) -> str:
        assert adder.rem_input_tokens > 100
        return "no token"

    scheduler = SimpleScheduler()
    budget._rooms[scheduler] = budget.ProbeRoom(10_000, SHARE)
    with budget.admitting(scheduler):
        assert budget.admit_by_computed(refuse, adder, refused, False, None) == "no token"
    assert adder.rem_input_tokens == 100 and refused.rksc.sharing.budget_tokens is None


def test_tokens_that_a_retracted_branch_generated_are_computed() -> None:
    back, adder = request(400, plan(400, 40), generated=60), Adder(chunk=512)
    admitted(adder, back)
    charged = math.ceil(460 * SHARE + (40 + 60) * (1 - SHARE))
    assert back.rksc.sharing.budget_tokens == charged == 512 - adder.rem_chunk_tokens


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=8), st.integers(1, 600))
def test_what_is_admitted_whole_computes_no_more_than_the_budget(sizes: list[tuple[int, float]], chunk: int) -> None:
    blends = [request(tokens, plan(tokens, int(share * tokens))) for tokens, share in sizes]
    adder = Adder(chunk)
    admitted(adder, *blends)
    assert adder.rem_chunk_tokens is not None and adder.rem_chunk_tokens >= 0


@pytest.mark.server
@pytest.mark.slow
def test_siblings_that_waited_for_one_anchor_run_in_one_pass(tmp_path: Any) -> None:
    model = Model.at(write_tiny_model(tmp_path / "six", num_hidden_layers=6))
    with counted_server(model, "--chunked-prefill-size", "600") as server:
        passes = Passes(server, model)
        material = passes._words(1, 400)
        prompts = [[*passes._words(2 + index, 23 - index), *material] for index in range(4)]
        asked = {"group": "together", "branches": 4, "share": "blend", "recompute": 0.0}
        passes._ask(prompts, [None] * 4)  # the server has compiled what it needs
        passes._flush()
        passes._taken()
        reports = passes._ask(prompts, [{**asked, "branch": index} for index in range(4)])
        together = [one["rows"] for one in passes._taken()]
    anchor, *siblings = reports
    assert anchor["mode"] == "exact" and "budget_tokens" not in anchor
    for report, prompt in zip(siblings, prompts[1:], strict=True):
        assert report["mode"] == "blend" and report["taken_tokens"] > 300
        assert len(prompt) / 3 < report["budget_tokens"] < len(prompt) / 2
    assert together == [len(prompts[0]), sum(map(len, prompts[1:]))], "1,266 tokens with a budget of 600"
