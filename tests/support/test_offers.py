"""What is offered where, and the matrix in the docs, which is what the code says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rksc_sgl.support import Facts, offers_of
from rksc_sgl.support.axes import AXES, CAPABILITIES, RUNS, Standing
from rksc_sgl.support.matrix import as_markdown
from rksc_sgl.support.offers import ALLOW_UNTESTED, refusal_text, row_of

ROOT = Path(__file__).parents[2]
PLAIN = Facts()
H100_TRITON = replace(PLAIN, attention="TritonAttnBackend", pool="MHATokenToKVPool", kv_dtype="bfloat16")
SHARED = {"blend", "merge"}
WALKED = {"blend", "merge", "exit"}

# One server for each row that refuses something, and what it may not have.
REFUSED: list[tuple[dict[str, Any], set[str], str]] = [
    ({"attention_refusal": "FlashInfer attention: x"}, {"blend"}, "FlashInfer attention: x"),
    ({"tree_is_off": True}, {"exact", "blend", "merge", "verify"}, "without --disable-radix-cache"),
    ({"tree": "PureSWARadixCache", "tree_is_unified": False}, {"exact", *SHARED}, "a PureSWARadixCache"),
    ({"kv_is_quantized": True, "kv_dtype": "float8_e4m3fn"}, SHARED, "float8_e4m3fn"),
    ({"pool": "SWAKVPool"}, SHARED, "--disable-hybrid-swa-memory"),
    ({"pool": "MHATokenToKVPool", "pool_layout": "hnd"}, SHARED, "SGLANG_USE_HND_KVCACHE"),
    ({"pool": "MLATokenToKVPool"}, SHARED, "a MLATokenToKVPool does not have"),
    ({"walk_refusal": "the layers of Gemma2ForCausalLM cannot be walked"}, WALKED, "cannot be walked"),
    ({"model": "Llama4ForCausalLM", "attention_chunk": 8192}, WALKED, "chunked attention of Llama4ForCausalLM"),
    ({"rotation_refusal": "it caches latent keys"}, {"blend"}, "latent keys"),
    ({"pp": 2}, WALKED, "--pp-size"),
    ({"dp_attention": True}, WALKED, "--enable-dp-attention"),
    ({"cp": 2}, WALKED, "context parallelism"),
    ({"dcp": 2}, WALKED, "context parallelism"),
    ({"rows_are_split": True}, WALKED, "--enable-attn-tp-input-scattered"),
    ({"two_batch_overlap": True}, WALKED, "--enable-two-batch-overlap"),
    ({"pdmux": True}, WALKED, "--enable-pdmux"),
    ({"speculative": "NGRAM"}, {"blend", "exit"}, "NGRAM speculation"),
    ({"disaggregation": "prefill"}, SHARED, "on a prefill server"),
    ({"disaggregation": "decode"}, SHARED, "on a decode server"),
    ({"kv_sharding": True}, SHARED, "--enable-kv-cache-sharding"),
    ({"tiers": "hicache"}, SHARED, "does not lock its donor against the hierarchical cache: start without"),
    ({"tokenizer": False}, {"merge"}, "--skip-tokenizer-init"),
]


def offered(facts: Facts, **options: Any) -> set[str]:
    return {name for name, offer in offers_of(facts, **options).items() if offer.offered}


def test_a_plain_server_on_the_cpu_platform_offers_everything_on_the_evidence_of_tests() -> None:
    offers = offers_of(PLAIN)
    assert offered(PLAIN) == set(CAPABILITIES)
    assert all(not offer.untested and not offer.warning and not offer.refusal for offer in offers.values())
    assert "tests/sglang_plugin/test_exits_on_a_server.py" in offers["exit"].evidence


@pytest.mark.parametrize("model", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_the_models_that_are_known_are_offered_everything_and_others_are_not(model: str) -> None:
    """That these can be walked, each on a live server, is a test of ``benchmarks.gpu_check``."""
    assert offered(replace(PLAIN, model=model)) == set(CAPABILITIES)
    assert offered(replace(PLAIN, model=f"New{model}")) == set(CAPABILITIES) - WALKED


def test_what_ran_on_the_gpu_is_offered_there_and_nothing_else() -> None:
    offers = offers_of(H100_TRITON)
    assert offered(H100_TRITON) == {"exact", "blend", "verify"}
    assert any(name in offers["blend"].evidence for name in RUNS)
    assert "was not run with this attention backend (TritonAttnBackend)" in offers["exit"].refusal
    assert "it ran with RkscCpuAttnBackend or TorchNativeAttnBackend. " in offers["exit"].refusal
    assert offers["exit"].refusal.endswith(f". {ALLOW_UNTESTED} offers it all the same")


def test_fa4_is_another_backend_than_fa3() -> None:
    third = replace(H100_TRITON, attention="FlashAttentionBackend", attention_version=3)
    assert "blend" in offered(third)
    assert "blend" not in offered(replace(third, attention_version=4))


@pytest.mark.parametrize(
    "facts",
    [replace(PLAIN, kv_dtype="bfloat16"), replace(PLAIN, kv_dtype="float16"), replace(H100_TRITON, kv_dtype="float16")],
)
def test_kv_of_a_number_type_that_nobody_ran_is_neither_blended_nor_merged(facts: Facts) -> None:
    offers = offers_of(facts)
    assert {"exact", "verify"} <= offered(facts) and not SHARED & offered(facts)
    for name in SHARED:
        assert f"{facts.pool}, {facts.kv_dtype}" in offers[name].refusal
        assert offers_of(replace(facts, attention="RkscCpuAttnBackend"), allow_untested=True)[name].offered


def test_what_nobody_ran_is_offered_with_a_warning_where_the_server_was_told_to() -> None:
    facts = replace(H100_TRITON, attention="FlashInferAttnBackend")
    assert "blend" not in offered(facts)
    offer = offers_of(facts, allow_untested=True)["blend"]
    assert offer.offered and offer.untested
    assert "FlashInferAttnBackend" in offer.warning
    assert offer.refusal == ""


@pytest.mark.parametrize(("change", "refused", "named"), REFUSED)
@pytest.mark.parametrize("allow_untested", [False, True])
def test_what_is_known_to_be_wrong_is_refused_whatever_the_server_was_told(
    change: dict[str, Any], refused: set[str], named: str, allow_untested: bool
) -> None:
    offers = offers_of(replace(PLAIN, **change), allow_untested=allow_untested)
    for name in refused:
        assert not offers[name].offered
        assert named in offers[name].refusal
        assert "{" not in offers[name].refusal, "a fact was not filled in"
        assert ALLOW_UNTESTED not in offers[name].refusal
    if allow_untested:
        assert {name for name, offer in offers.items() if offer.offered} == set(CAPABILITIES) - refused


@pytest.mark.parametrize("change", [{"speculative": "NGRAM"}, {"speculative": "EAGLE"}])
def test_ordinary_requests_go_on_beside_speculation(change: dict[str, Any]) -> None:
    assert {"exact", "verify"} <= offered(replace(PLAIN, **change))
    assert "merge" in offered(replace(PLAIN, **change), allow_untested=True)


def test_every_row_that_refuses_is_walked_above() -> None:
    walked = {(axis.name, row_of(axis, replace(PLAIN, **change)).name) for change, _, _ in REFUSED for axis in AXES}
    rows = {
        (axis.name, row.name)
        for axis in AXES
        for row in axis.rows
        if any(cell.standing is Standing.WRONG for cell in row.cells)
    }
    assert rows <= walked


def test_every_axis_ends_with_a_row_for_any_server_and_names_a_row_once() -> None:
    strange = replace(
        PLAIN, attention="?", tree="?", tree_is_unified=False, pool="?", model="?", quantization="?", tp=8
    )
    strange = replace(strange, speculative="?", disaggregation="?", tiers="?", lora=True, tokenizer=False)
    for axis in AXES:
        assert row_of(axis, strange) is axis.rows[-1]
        assert len({row.name for row in axis.rows}) == len(axis.rows)


def test_all_evidence_is_a_file_of_this_repository_or_a_recorded_run() -> None:
    named = {
        part
        for axis in AXES
        for row in axis.rows
        for cell in row.cells
        if cell.standing is Standing.RAN
        for part in cell.text.split("; ")
    }
    assert named
    for part in named:
        assert part in RUNS or (ROOT / part).is_file(), part


def test_a_refusal_says_what_would_work() -> None:
    for axis in AXES:
        for row in axis.rows:
            for name, cell in zip(CAPABILITIES, row.cells, strict=True):
                text = refusal_text(name, axis, row, cell)
                assert bool(text) == (cell.standing in (Standing.WRONG, Standing.NOT_RUN))
                if cell.standing is Standing.NOT_RUN:
                    assert "; it ran with " in text


def test_the_docs_have_the_matrix_and_every_refusal_in_the_words_of_the_code() -> None:
    text = (ROOT / "docs/support.md").read_text()
    found = re.search(r"<!-- python -m rksc_sgl.support.matrix -->\n(.*)<!-- end -->", text, re.DOTALL)
    assert found is not None
    assert found.group(1) == "\n" + as_markdown() + "\n"
