"""The load benchmark: its generator, its figures, and that nothing passes that was not served as it was asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load
from benchmarks.load import AGAIN, ARMS, FIGURES, OPTED_IN, OURS, STOCK, Cell, Run
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.server_process import ServerProcess
from tests.made_up_results import load_cell, load_run


def told(**others: Any) -> dict[str, Any]:
    """A result of the generator, with two requests."""
    return {
        **{figure.name: 2.0 for figure in FIGURES.values()},
        "input_lens": [10, 10],
        "output_lens": [4, 4],
        "errors": ["", ""],
        "cache_report": {"total_prompt_tokens": 20, "total_cached_tokens": 5},
        **others,
    }


def test_ratios_are_above_one_where_an_arm_is_better() -> None:
    cell = load_cell()
    assert cell.ratio(OURS, "throughput") == (2.0, 2.0, 2.0), "more is better"
    assert cell.ratio(OURS, "ttft_p99") == (0.5, 0.5, 0.5), "less is better"
    plain = cell.plain()
    assert plain["throughput_ratio_opted_in"] == 0.5 and plain["tpot_p50_ratio_opted_in"] == 2.0
    assert plain["throughput_ratio_noise"] == plain["ttft_p50_ratio_noise"] == 1.0
    assert plain["intervals"]["throughput_ratio_ours"] == [2.0, 2.0]
    assert plain["medians"][STOCK]["throughput"] == 2.0 and plain["cached"][OURS] == 0.25
    assert len(plain["intervals"]) == len(FIGURES) * (len(ARMS) - 1)


def test_other_numbers_of_tokens_are_seen() -> None:
    assert load_cell().equal_tokens
    less = Cell({**load_cell().runs, AGAIN: [load_run(2.0), load_run(2.0, tokens=((10, 4), (10, 3)))]})
    assert not less.equal_tokens


def test_a_run_in_which_a_request_failed_has_no_figures() -> None:
    assert Run.of(told()) == load_run(2.0)
    with pytest.raises(RkscError, match="1 of 2 requests failed: no room"):
        Run.of(told(errors=["", "no room"]))
    with pytest.raises(RkscError, match="measured no ttft_p50"):
        Run.of(told(median_ttft_ms=0.0))


def test_requests_that_opted_in_must_be_those_of_one_arm() -> None:
    load.check_opted_in(OPTED_IN, Counter(exact=9), 9)
    load.check_opted_in(OURS, Counter(), 9)
    for arm, grown in ((OPTED_IN, Counter()), (OPTED_IN, Counter(exact=8, blend=1)), (OURS, Counter(exact=1))):
        with pytest.raises(RkscError, match=arm):
            load.check_opted_in(arm, grown, 9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--url", "http://127.0.0.1:9"], "name both servers"),
        (["--requests", "9", "--groups", "4"], "equally many in each of 4 groups"),
        (["--concurrency", "128"], "must be 1 to --requests = 64"),
        (["--tokens", "1"], "--tokens 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.main(words)
    assert said in capsys.readouterr().err


def test_a_quick_run_is_smaller_in_all() -> None:
    usual, quick = load._options([]), load._options(["--quick"])
    assert usual.model_path == quick.model_path == DEFAULT_MODEL and usual.concurrency == [1, 4, 16]
    assert all(getattr(quick, name) < getattr(usual, name) for name in ("requests", "common", "tokens", "rounds"))


def asked(ours: ServerProcess, stock: ServerProcess, model: Path) -> list[str]:
    servers = ["--model-path", str(model), "--url", ours.url, "--stock-url", stock.url]
    small = ["--requests", "6", "--groups", "2", "--common", "40", "--own", "8", "--tokens", "6"]
    return [*servers, *small, "--concurrency", "1", "3", "--rounds", "2"]


@pytest.mark.server
@pytest.mark.slow
def test_sglangs_own_generator_runs_against_both_servers(
    tiny_server: ServerProcess, bare_tiny_server: ServerProcess, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load.main(asked(tiny_server, bare_tiny_server, tiny_model)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal_tokens"] is True and list(result["by_concurrency"]) == ["1", "3"]
    for cell in result["by_concurrency"].values():
        assert all(cell[f"{name}_ratio_{arm}"] > 0 for name in FIGURES for arm in load.NAMES.values())
        assert all(share > 0.3 for share in cell["cached"].values()), "the groups' beginnings are found"


@pytest.mark.server
@pytest.mark.slow
def test_a_server_that_nobody_can_opt_in_on_ends_it(
    bare_tiny_server: ServerProcess, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load.main(asked(bare_tiny_server, bare_tiny_server, tiny_model)) == 1
    assert "load: opted in: the server counted {} of 7 requests as opted in" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_generator_says_of_its_failure_is_shown() -> None:
    with load.LoadGenerator() as generator, pytest.raises(RkscError, match="unrecognized arguments: --none"):
        generator.run(["--none"])
