from __future__ import annotations

import gc
import multiprocessing
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rksc_sgl import cpu_platform
from rksc_sgl.cpu_platform import PLATFORM_CLASS, activate, warm_fork


@pytest.mark.parametrize(
    ("accelerator", "environment", "expected"),
    [
        (None, {}, PLATFORM_CLASS),
        ("cuda", {}, None),
        ("cuda", {"SGLANG_PLATFORM": "rksc_cpu"}, PLATFORM_CLASS),
        (None, {"SGLANG_USE_CPU_ENGINE": "1"}, None),
    ],
)
def test_the_platform_answers_only_without_an_accelerator_or_when_named(
    monkeypatch: pytest.MonkeyPatch, accelerator: str | None, environment: dict[str, str], expected: str | None
) -> None:
    for name in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_platform, "accelerator_present", lambda: accelerator)
    assert activate() == expected


@pytest.mark.parametrize(("allowed", "threads", "forked"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_workers_are_forked_only_from_a_main_process_of_our_own_without_threads(
    monkeypatch: pytest.MonkeyPatch, allowed: bool, threads: int, forked: bool
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(warm_fork, "_allowed", allowed)
    monkeypatch.setattr(cpu_platform, "in_use", lambda: True)
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda name, force: chosen.append(name))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    warm_fork.use_for_workers(None, SimpleNamespace(skip_tokenizer_init=True))
    assert chosen == (["fork"] if forked else [])


@pytest.mark.slow
def test_a_tokenizer_that_was_loaded_before_the_fork_is_not_loaded_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.utils.hf_transformers import tokenizer

    def load(name: str, **kwargs: object) -> object:
        if name == "broken":
            raise OSError("no such tokenizer")
        return object()

    monkeypatch.setattr(warm_fork, "_tokenizers", {})
    monkeypatch.setattr(tokenizer, "get_tokenizer", load)
    how = {"tokenizer_mode": "auto", "trust_remote_code": False, "revision": None, "tokenizer_backend": "huggingface"}
    warm_fork._load_tokenizer(SimpleNamespace(tokenizer_path="model", **how))
    (loaded,) = warm_fork._tokenizers.values()
    assert warm_fork.tokenizer_once(load, "model", **how) is loaded
    assert warm_fork.tokenizer_once(load, "other", **how) is not loaded
    assert warm_fork.tokenizer_once(load, "model", **(how | {"tokenizer_mode": "slow"})) is not loaded
    with caplog.at_level("INFO"):
        warm_fork._load_tokenizer(SimpleNamespace(tokenizer_path="broken", **how))
    assert len(warm_fork._tokenizers) == 1 and "no such tokenizer" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1, 8, 13, 600])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["PanelWeight", "OneDnnWeight"])
def test_a_packed_weight_is_a_linear_layer(rows: int, biased: bool, kind: str) -> None:
    from rksc_sgl.cpu_platform import packed_linear

    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96), torch.randn(80, 96)
    bias = torch.randn(80) if biased else None
    packed = getattr(packed_linear, kind).of(weight)
    result = packed(x, bias)
    assert result.is_contiguous()
    torch.testing.assert_close(result, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    assert packed(x.view(1, rows, 96), bias).shape == (1, rows, 80)


def _layer(dtype: torch.dtype, method: object) -> torch.nn.Linear:
    made = torch.nn.Linear(4, 4, dtype=dtype)
    made.quant_method = method  # type: ignore[assignment]
    return made


def _layers() -> tuple[torch.nn.Linear, torch.nn.Linear, torch.nn.Linear]:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    return (
        _layer(torch.float32, UnquantizedLinearMethod()),
        _layer(torch.bfloat16, UnquantizedLinearMethod()),
        _layer(torch.float32, object()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_only_plain_float32_layers_are_packed_and_they_follow_an_update(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rksc_sgl.cpu_platform.held_weight import held_of
    from rksc_sgl.cpu_platform.native import build
    from rksc_sgl.cpu_platform.packed_linear import ONEDNN_ROWS, PackedLinearMethod, use_packed_linear

    if not compiled:
        monkeypatch.setattr(build, "library", lambda: None)
    plain, half, other = _layers()
    model = torch.nn.ModuleList([plain, half, other, torch.nn.Linear(4, 4)])
    before = plain.weight.detach().clone()
    packed = "float32 panels, multiplied in float32" if compiled else "float32 rows with oneDNN's copies"
    found = use_packed_linear(model)
    assert f"1 of {packed}" in found and "1 of SGLang's own, bfloat16" in found
    assert isinstance(plain.quant_method, PackedLinearMethod)
    assert (held_of(plain) is not None) is compiled
    assert not isinstance(half.quant_method, PackedLinearMethod)
    assert type(other.quant_method) is object
    x = torch.randn(3, 4)
    many = torch.randn(ONEDNN_ROWS + 1, 4)
    with torch.inference_mode():
        torch.testing.assert_close(plain.quant_method.apply(plain, many), F.linear(many, before))
        torch.testing.assert_close(plain.quant_method.apply(plain, x), F.linear(x, before))
        after = torch.randn(4, 4)
        plain.weight.data.copy_(after)
        plain.quant_method.process_weights_after_loading(plain)
        torch.testing.assert_close(plain.quant_method.apply(plain, x), F.linear(x, after))


@pytest.mark.slow
def test_layers_stay_as_they_are_where_copies_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rksc_sgl.cpu_platform import packed_linear
    from rksc_sgl.cpu_platform.native import build

    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(packed_linear, "_MEMORY_SHARE", 0.0)
    plain, _, _ = _layers()
    before = plain.quant_method
    assert packed_linear.use_packed_linear(torch.nn.ModuleList([plain])) == "SGLang's own, float32"
    assert plain.quant_method is before
    assert "packed copies would take" in caplog.text


@pytest.mark.slow
def test_plain_layers_are_made_with_panels_and_others_as_sglang_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

    from rksc_sgl.cpu_platform import packed_linear
    from rksc_sgl.cpu_platform.held_weight import held_of
    from rksc_sgl.cpu_platform.native import build

    for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        monkeypatch.setattr(kind, "create_weights", kind.create_weights)
    monkeypatch.setattr(packed_linear, "declared_type", lambda: torch.bfloat16)
    packed_linear.hold_from_the_start()
    packed_linear.hold_from_the_start()

    def made(kind: type, dtype: torch.dtype) -> torch.nn.Module:
        layer = torch.nn.Module()
        layer.quant_method = kind()
        layer.quant_method.create_weights(layer, 4, [16, 8], 4, 24, params_dtype=dtype, weight_loader=_copy_all)
        return layer

    numbers, x, tokens = torch.randn(24, 4).bfloat16(), torch.randn(3, 4), torch.tensor([0, 23])
    for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        layer = made(kind, torch.float32)
        held = held_of(layer)
        assert held is not None and held.dtype is None and held.declared == torch.bfloat16
        layer.weight.weight_loader(layer.weight, numbers)
        layer.quant_method.process_weights_after_loading(layer)
        assert held.in_rows is (kind is UnquantizedEmbeddingMethod)
        if held.in_rows:
            assert torch.equal(layer.quant_method.embedding(layer, tokens), numbers[tokens].float())
        torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ numbers.float().T)
        assert not held.in_rows and held.dtype == torch.bfloat16
        if kind is UnquantizedEmbeddingMethod:
            assert torch.equal(layer.quant_method.embedding(layer, tokens), numbers[tokens].float())
        assert held_of(made(kind, torch.bfloat16)) is None
    monkeypatch.setattr(build, "library", lambda: None)
    assert held_of(made(UnquantizedLinearMethod, torch.float32)) is None


def _copy_all(param: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    assert param.output_dim == 0 and param.input_dim == 1
    param.data.copy_(loaded)


@pytest.mark.slow
def test_the_pool_is_zero_writable_and_costs_memory_only_where_it_is_written() -> None:
    import psutil

    from rksc_sgl.cpu_platform.kv_pool import _LazyZeros, mapped_zeros

    before = psutil.Process().memory_info().rss
    pool = mapped_zeros((1 << 20, 16, 16), torch.float32)  # 1 GiB
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert pool[12345].abs().sum() == 0
    pool[7] = 3.0
    assert pool[7].sum() == 3.0 * 256
    assert pool[6].sum() == 0
    assert mapped_zeros((0, 4), torch.float32).shape == (0, 4)
    with _LazyZeros():
        made = torch.zeros((3, 4), dtype=torch.int64, device="cpu")
    assert torch.equal(made, torch.zeros(3, 4, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [([0, 1], 2, "0|1"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([4, 5, 6], 2, "4|5"), ([0, 1], 3, "0|1|0")],
)
def test_ranks_share_the_cores_evenly(cores: list[int], ranks: int, expected: str) -> None:
    from rksc_sgl.cpu_platform.platform import cores_of_ranks

    assert cores_of_ranks(cores, ranks) == expected
