"""What the pipeline benchmark asks of servers, and what it makes of what it measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import pipeline
from benchmarks.overhead import BareServer, check_bare
from benchmarks.pipeline import AGAIN, DIVERGENT, EXACT, IDENTICAL, IN_PLACE, KINDS, NONE, OURS, SATURATED, STOCK, Cell
from benchmarks.pipeline_arms import DEPTH, Ran
from benchmarks.pipeline_defaults import CERTAIN
from benchmarks.pipeline_items import items, opening
from benchmarks.result_files import read
from rksc_sgl.server_process import ServerProcess
from tests.made_up_results import answers, ran
from tests.six_layers import POOL, Served, SixLayers


def words(text: str) -> int:
    return len(text.split())


def test_prompts_are_alike_or_differ_from_their_first_word_on() -> None:
    alike = items(3, 8, 300, words, openings=False)
    assert all(len(set(item.prompts)) == 1 and item.branches == 8 for item in alike)
    assert len({item.prompts[0][:200] for item in alike}) == 3, "each problem has worked ones of its own"
    assert all(200 < words(item.prompts[0]) < 450 for item in alike)
    for item in items(2, 16, 300, words, openings=True):
        assert len({prompt.partition("\n\n")[2] for prompt in item.prompts}) == 1
    assert len({opening(branch) for branch in range(16)}) == 16
    assert items(2, 4, 300, words, openings=False, seed=1) != alike[:2]
    assert [len(one.prompts[0]) for one in items(1, 4, 900, words, openings=False)] > [len(alike[0].prompts[0])]


def cell(kind: str = IDENTICAL, **arms: list[Ran]) -> Cell:
    return Cell(kind, 8, 1024, {NONE: [ran(8.0), ran(9.0)], STOCK: [ran(2.0), ran(3.0)], **arms})


def test_ratios_are_medians_over_problems_and_above_one_where_ours_is_faster() -> None:
    one = cell(**{AGAIN: [ran(2.0), ran(2.5)], OURS: [ran(1.0, prefill=0.25), ran(1.0, prefill=0.25)]})
    result = pipeline.summary([one], [])
    assert (result["identical_vs_none"], result["identical_vs_stock"], result["noise"]) == (8.5, 2.5, 1.1)
    assert result["equal_tokens"] is True and result["divergent_vs_stock"] is None
    assert one.ratio(STOCK, stage="prefill")[0] == 2.0
    plain = one.plain()
    assert plain["ratios"][STOCK] == [2.5, 2.0, 3.0] and plain["noise"][0] == 1.1
    assert plain["arms"][OURS]["modes"] == {"exact": 16}


def test_an_arm_that_generated_less_is_seen() -> None:
    less = cell(**{AGAIN: [ran(2.0)] * 2, OURS: [ran(1.0), ran(1.0, generated=255)]})
    assert pipeline.summary([less], [])["equal_tokens"] is False


def test_the_first_cell_of_a_kind_stands_for_it() -> None:
    usual = cell(**{AGAIN: [ran(2.0)] * 2, OURS: [ran(1.0)] * 2})
    longer = Cell(IDENTICAL, 8, 2048, {name: [ran(4.0)] * 2 for name in (NONE, STOCK, AGAIN, OURS)})
    assert pipeline.summary([usual, longer], [])["identical_vs_none"] == 8.5


def test_other_sizes_differ_in_one_thing() -> None:
    assert pipeline.other_sizes(8, 1024) == [(4, 1024), (16, 1024), (8, 256), (8, 2048)]


def test_same_answers_are_counted_beside_stocks_own() -> None:
    result = pipeline.summary([], [answers()])
    assert (result["defaults_vs_stock"], result["probable_vs_stock"]) == (2.0, 4.0)
    assert (result["same_answer"], result["same_answer_probable"], result["same_answer_noise"]) == (1.0, 0.5, 0.5)
    figures = answers().figures()
    assert figures["tokens"][CERTAIN] == 110 and figures["accuracy"][STOCK] == 0.5


@pytest.fixture(scope="module")
def bare(six_layers: SixLayers) -> Iterator[ServerProcess]:
    flags = ["--model-path", str(six_layers.path), "--max-total-tokens", str(POOL), "--enable-metrics"]
    with BareServer(flags) as server:
        check_bare(server)
        yield server


@pytest.mark.server
def test_all_kinds_run_beside_stock_sglang_with_equal_tokens(
    served: Served, bare: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pipeline.json"
    servers = ["--url", served.process.url, "--stock-url", bare.url, "--out", str(path)]
    small = ["--problems", "2", "--branches", "4", "--material", "60", "--tokens", "5", "--no-sizes", "--at-once", "2"]
    few = ["--rounds", "1", "--answer-problems", "2", "--answer-tokens", "4"]
    assert pipeline.main([*servers, *small, *few]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal_tokens"] is True
    assert all(value is not None for value in result.values()), result
    content = read(path)
    assert content["figures"] == result and content["settings"]["seed"] == 0
    cells = {one["kind"]: one["arms"] for one in content["cells"]}
    assert set(cells) == set(KINDS) - {"defaults"}
    for kind, arms in cells.items():
        generated = 2 * 4 * 5 * (DEPTH if kind == "tree" else 1)
        assert {arm["generated"] for arm in arms.values()} == {generated}, kind
        assert {arm["verified"] for arm in arms.values()} == {generated // 5}, kind
        assert set(arms[STOCK]["modes"]) == set(arms[IN_PLACE]["modes"]) == {"stock"}
        assert arms[IN_PLACE]["judged"] < arms[STOCK]["judged"]
        assert kind == SATURATED or arms[NONE]["cached"] == 0
        if kind != DIVERGENT:
            assert set(arms[OURS]["modes"]) == {"exact"} and arms[OURS]["cached"] > 0.7 * arms[OURS]["prompt"]
    assert cells[DIVERGENT][OURS]["taken"] > 0 == cells[DIVERGENT][EXACT]["taken"]
    assert set(cells[DIVERGENT][OURS]["modes"]) == {"exact", "blend"}, "the first is exact"


def test_only_one_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipeline.main(["--url", "http://127.0.0.1:9"])
    assert "name both servers" in capsys.readouterr().err
