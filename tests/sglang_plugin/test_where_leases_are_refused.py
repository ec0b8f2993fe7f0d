"""Where forks are not kept, said by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context

from rksc_sgl.sglang_plugin.memory.keeper import refusal_of_keeping
from rksc_sgl.support.offers import ALLOW_VARIABLE

ARGS = {
    **dict.fromkeys(("enable_dp_attention", "enable_kv_cache_sharding", "enable_hierarchical_cache"), False),
    **dict.fromkeys(("enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker"), False),
    "speculative_algorithm": None,
}


def scheduler(device: str = "cpu", **args: Any) -> Any:
    speculates = args.get("speculative_algorithm") is not None
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**ARGS, **args}),
        tree_cache=SimpleNamespace(
            tree_core=None, disable=False, supports_swa=lambda: False, supports_mamba=lambda: False
        ),
        spec_algorithm=SimpleNamespace(is_none=lambda: not speculates),
        disaggregation_mode=SimpleNamespace(value="null"),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(device=device)),
        enable_hisparse=False,
        dllm_config=None,
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(pp_size=1))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"enable_hierarchical_cache": True}, "it was not run with KV in another tier (hicache)"),
        ({"enable_lmcache": True}, "it was not run with KV in another tier (lmcache)"),
        ({"speculative_algorithm": "NGRAM"}, "it was not run with speculative decoding (NGRAM)"),
        ({"device": "cuda"}, "it was not run on cuda"),
    ],
)
def test_what_nobody_ran_is_refused_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], said: str
) -> None:
    assert refusal_of_keeping(scheduler()) == ""
    assert refusal_of_keeping(scheduler(**args)) == said
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert refusal_of_keeping(scheduler(**args)) == ""


def test_what_cannot_be_is_refused_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert refusal_of_keeping(scheduler(enable_dp_attention=True)) == "data-parallel attention"
    monkeypatch.setenv("RKSC_LEASE_SECONDS", "0")
    assert refusal_of_keeping(scheduler()) == "off: --rksc-lease-seconds is 0"
