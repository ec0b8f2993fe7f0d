from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cpu_decode
from benchmarks.cpu_decode import BASELINE, OURS, Cell, Outcome, Server
from rksc_sgl.server_process import ServerProcess


def test_shared_prompts_differ_in_their_last_token_only_and_others_from_the_first() -> None:
    shared = Cell(4, 50, True).prompts(seed=1)
    assert len({tuple(prompt[:-1]) for prompt in shared}) == 1
    assert len({prompt[-1] for prompt in shared}) == 4
    apart = Cell(4, 50, False).prompts(seed=1)
    assert len({prompt[0] for prompt in apart}) == 4
    assert {len(prompt) for prompt in shared + apart} == {50}


def test_work_is_alternated_and_unequal_tokens_are_found() -> None:
    order: list[str] = []

    def work(server: str, seed: int) -> tuple[float, list[list[int]]]:
        order.append(server)
        return (2.0 + seed if server == "a" else 1.0), [[seed if server == "a" else 0]]

    outcome = cpu_decode.compare({BASELINE: "a", OURS: "b"}, work, 2)  # type: ignore[dict-item, arg-type]
    assert order == ["a", "b", "b", "a"]
    assert outcome == Outcome({BASELINE: 2.5, OURS: 1.0}, noise=1.5, equal=False)
    assert outcome.ratio == 2.5


def test_cells_that_take_the_baseline_too_long_are_run_on_our_server_only() -> None:
    assert Cell(32, 4096, True).ours_alone and Cell(32, 1331, False).ours_alone
    assert not Cell(32, 1331, True).ours_alone and not Cell(8, 1331, False).ours_alone
    outcome = cpu_decode.compare({OURS: "b"}, lambda server, seed: (1.0 + seed, [[0]]), 2)  # type: ignore[dict-item]
    assert outcome == Outcome({OURS: 1.5}, noise=2.0, equal=True)


def test_growth_is_of_the_longest_shared_prefix_and_the_most_branches() -> None:
    seconds = {Cell(1, 50, True): 1.0, Cell(8, 50, True): 9.0, Cell(1, 90, True): 2.0, Cell(8, 90, True): 3.0}
    outcomes = {cell: Outcome({OURS: value}, 1.0, True) for cell, value in seconds.items()}
    outcomes[Cell(32, 200, False)] = Outcome({OURS: 99.0}, 1.0, True)
    assert cpu_decode.growth(outcomes) == {"batch": 8, "prefix": 90, "step_ratio": 1.5}


@pytest.mark.server
@pytest.mark.slow
def test_the_measured_work_is_what_it_says(
    tiny_server: ServerProcess, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr(cpu_decode, "FIRST_WORD", 3)
    monkeypatch.setattr(cpu_decode, "LAST_WORD", 300)
    server = Server(tiny_server)
    _, tokens = cpu_decode.decode_step(Cell(3, 40, True), server, 0)
    assert [len(one) for one in tokens] == [cpu_decode.STEPS + 1] * 3
    cold, extended = cpu_decode.prefill(server, 100, 0)[1], cpu_decode.extend(server, 100, 0)[1]
    assert [len(one) for one in cold + extended] == [1, 1]
    assert cpu_decode.prefill(server, 100, 0)[1] == cold and cpu_decode.extend(server, 100, 0)[1] == extended
    whole = cpu_decode.bytes_of_step(str(tiny_model), Cell(2, 100, False))
    assert whole - cpu_decode.bytes_of_step(str(tiny_model), Cell(2, 100, True)) == 100 * 2 * 2 * 2 * 16 * 4


def test_a_step_reads_no_embedding_but_the_head_of_a_model_that_has_both(tmp_path: Path) -> None:
    config = {"hidden_size": 10, "num_attention_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 1}
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    cell, kv = Cell(1, 5, True), 5 * 2 * 10 * 4
    for dtype, tied, read in (("bfloat16", False, 600), ("float32", False, 200), ("bfloat16", True, 1000)):
        more = {"vocab_size": 20, "tie_word_embeddings": tied, "dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        assert cpu_decode.bytes_of_step(str(tmp_path), cell) == read + kv
