"""The backend on real SGLang pools, batches and layers, next to ``torch_native``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from rksc_sgl.cpu_platform.attention import BACKEND_NAME, arm
from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend
from rksc_sgl.cpu_platform.attention.reference import reference_attention

SIZE, CONTEXT, KV_HEADS, HEADS, DIM = 600, 256, 2, 6, 16
SCALE = 0.21


def make_runner(*, page_size: int = 1, v_dim: int = DIM, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """As much of a model runner as an attention backend asks for."""
    kv_pool = MHATokenToKVPool(
        size=SIZE,
        page_size=page_size,
        dtype=dtype,
        head_num=KV_HEADS,
        head_dim=DIM,
        v_head_dim=v_dim,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )
    requests = ReqToTokenPool(size=8, max_context_len=CONTEXT, device="cpu", enable_memory_saver=False)
    return SimpleNamespace(device="cpu", req_to_token_pool=requests, token_to_kv_pool=kv_pool)


def make_layer(**changes) -> RadixAttention:
    return RadixAttention(HEADS, DIM, SCALE, KV_HEADS, layer_id=1, **changes)


def fill(runner: SimpleNamespace, *, page_size: int = 1, shared: int = 100) -> None:
    """Random KV everywhere; requests 1 .. 5 have their first ``shared`` slots in common, in shuffled pages."""
    torch.manual_seed(3)
    for buffer in (*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer):
        buffer.normal_()
    pages = torch.randperm(SIZE // page_size)
    slots = (pages[:, None] * page_size + torch.arange(page_size)).reshape(-1).int()
    aligned = shared // page_size * page_size
    own = (SIZE - aligned) // 5 // page_size * page_size
    for request in range(1, 6):
        table = runner.req_to_token_pool.req_to_token
        table[request, :aligned] = slots[:aligned]
        first = aligned + (request - 1) * own
        table[request, aligned : aligned + own] = slots[first : first + own]


def make_batch(
    runner: SimpleNamespace, mode: ForwardMode, requests: list[int], prefixes: list[int], extends: list[int]
) -> ForwardBatch:
    table = runner.req_to_token_pool.req_to_token
    written = [
        table[request, prefix : prefix + extend].long()
        for request, prefix, extend in zip(requests, prefixes, extends, strict=True)
    ]
    seq_lens = torch.tensor([p + e for p, e in zip(prefixes, extends, strict=True)], dtype=torch.int64)
    batch = ForwardBatch(
        forward_mode=mode,
        batch_size=len(requests),
        input_ids=torch.zeros(sum(extends), dtype=torch.int64),
        req_pool_indices=torch.tensor(requests, dtype=torch.int64),
        seq_lens=seq_lens,
        out_cache_loc=torch.cat(written) if written else torch.empty(0, dtype=torch.int64),
        seq_lens_sum=int(seq_lens.sum()),
    )
    if mode is not ForwardMode.DECODE:
        batch.extend_prefix_lens = torch.tensor(prefixes)
        batch.extend_seq_lens = torch.tensor(extends)
    return batch


def run(backend_class, runner, batch: ForwardBatch, layer: RadixAttention, rows: int | None = None) -> torch.Tensor:
    """One layer of one pass with inputs that are the same at every call."""
    torch.manual_seed(4)
    rows = batch.out_cache_loc.numel() if rows is None else rows
    q = torch.randn(rows, HEADS * DIM)
    k = torch.randn(rows, KV_HEADS, DIM)
    v = torch.randn(rows, KV_HEADS, layer.v_head_dim)
    backend = backend_class(runner)
    backend.init_forward_metadata(batch)
    return backend.forward(q, k, v, layer, batch)


PASSES = {
    "decode": (ForwardMode.DECODE, [1, 2, 3, 5], [120, 131, 100, 57], [1, 1, 1, 1]),
    "extend": (ForwardMode.EXTEND, [1, 2, 4], [100, 0, 112], [20, 90, 1]),
    "mixed": (ForwardMode.MIXED, [1, 2, 4], [100, 130, 112], [30, 1, 1]),
    "split prefill": (ForwardMode.SPLIT_PREFILL, [1, 2], [100, 0], [20, 70]),
    "runs on one row": (ForwardMode.SPLIT_PREFILL, [3, 3, 3], [20, 60, 118], [9, 14, 3]),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("changes", [{}, {"sliding_window_size": 24}], ids=["full", "windowed"])
def test_every_pass_gives_the_numbers_of_torch_native(name, page_size, changes):
    runner = make_runner(page_size=page_size)
    fill(runner, page_size=page_size)
    batch, layer = make_batch(runner, *PASSES[name]), make_layer(**changes)
    ours = run(RkscCpuAttnBackend, runner, batch, layer)
    torch.testing.assert_close(ours, run(TorchNativeAttnBackend, runner, batch, layer), atol=1e-4, rtol=0)


def test_values_of_another_width_give_the_numbers_of_torch_native():
    runner = make_runner(v_dim=8)
    fill(runner)
    for arguments in PASSES.values():
        batch, layer = make_batch(runner, *arguments), make_layer(v_head_dim=8)
        ours = run(RkscCpuAttnBackend, runner, batch, layer)
        assert ours.shape == (batch.out_cache_loc.numel(), HEADS * 8)
        torch.testing.assert_close(ours, run(TorchNativeAttnBackend, runner, batch, layer), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PASSES)
def test_a_soft_cap_which_torch_native_ignores_is_applied(name):
    runner = make_runner()
    fill(runner)
    mode, requests, prefixes, extends = PASSES[name]
    batch, layer = make_batch(runner, mode, requests, prefixes, extends), make_layer(logit_cap=0.5)
    ours = run(RkscCpuAttnBackend, runner, batch, layer)
    torch.manual_seed(4)
    expected = reference_attention(
        torch.randn(sum(extends), HEADS * DIM).view(-1, HEADS, DIM),
        runner.token_to_kv_pool.get_key_buffer(1),
        runner.token_to_kv_pool.get_value_buffer(1),
        runner.req_to_token_pool.req_to_token,
        requests,
        prefixes,
        extends,
        scale=SCALE,
        logit_cap=0.5,
    )
    torch.testing.assert_close(ours, expected.flatten(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["decode", "extend"])
def test_layers_with_a_window_read_the_sliding_window_part_of_the_pool(name):
    pool = SWAKVPool(
        size=SIZE,
        size_swa=SIZE,
        page_size=1,
        dtype=torch.float32,
        head_num=KV_HEADS,
        head_dim=DIM,
        swa_attention_layer_ids=[1],
        full_attention_layer_ids=[0],
        device="cpu",
    )
    runner = make_runner()
    runner.token_to_kv_pool = SimpleNamespace(
        k_buffer=[*pool.full_kv_pool.k_buffer, *pool.swa_kv_pool.k_buffer],
        v_buffer=[*pool.full_kv_pool.v_buffer, *pool.swa_kv_pool.v_buffer],
    )
    fill(runner)
    runner.token_to_kv_pool = pool
    mapping = torch.cat([torch.randperm(SIZE), torch.tensor([-1])])
    pool.register_mapping(mapping)
    mode, requests, prefixes, extends = PASSES[name]
    window = 24
    for request, prefix in zip(requests, prefixes, strict=True):
        left = runner.req_to_token_pool.req_to_token[request, : max(prefix - window, 0)].long()
        still_seen = torch.cat(
            [
                runner.req_to_token_pool.req_to_token[r, max(p - window, 0) : p + e].long()
                for r, p, e in zip(requests, prefixes, extends, strict=True)
            ]
        )
        mapping[left[~torch.isin(left, still_seen)]] = -1
    batch, layer = make_batch(runner, mode, requests, prefixes, extends), make_layer(sliding_window_size=window)
    ours = run(RkscCpuAttnBackend, runner, batch, layer)
    torch.manual_seed(4)
    expected = reference_attention(
        torch.randn(sum(extends), HEADS * DIM).view(-1, HEADS, DIM),
        pool.get_key_buffer(1),
        pool.get_value_buffer(1),
        mapping[runner.req_to_token_pool.req_to_token.long()].clamp(min=0),
        requests,
        prefixes,
        extends,
        scale=SCALE,
        window=window,
    )
    torch.testing.assert_close(ours, expected.flatten(1), atol=1e-4, rtol=0)


def test_rows_that_only_pad_a_batch_come_out_as_zeros():
    runner = make_runner()
    fill(runner)
    batch = make_batch(runner, *PASSES["extend"])
    real = batch.out_cache_loc.numel()
    plain = run(RkscCpuAttnBackend, runner, batch, make_layer())
    batch.out_cache_loc = torch.cat([batch.out_cache_loc, torch.full((5,), SIZE - 1)])
    padded = run(RkscCpuAttnBackend, runner, batch, make_layer(), rows=real + 5)
    assert padded.shape[0] == real + 5
    assert not padded[real:].any()
    assert plain.shape[0] == real


def test_an_idle_pass_and_an_empty_batch_need_no_plan():
    runner = make_runner()
    backend = RkscCpuAttnBackend(runner)
    idle = make_batch(runner, ForwardMode.IDLE, [], [], [])
    backend.forward_metadata = None
    empty = torch.empty(0, HEADS * DIM)
    assert backend.forward(empty, None, None, make_layer(), idle).shape == (0, HEADS * DIM)
    decode = make_batch(runner, ForwardMode.DECODE, [], [], [])
    backend.init_forward_metadata(decode)
    assert backend.forward(empty, None, None, make_layer(), decode).shape == (0, HEADS * DIM)


def test_a_batch_between_two_intervals_of_a_split_prefill_does_no_harm():
    runner = make_runner()
    fill(runner)
    prefill = make_batch(runner, *PASSES["split prefill"])
    decode = make_batch(runner, *PASSES["decode"])
    expected = run(TorchNativeAttnBackend, runner, prefill, make_layer())
    backend = RkscCpuAttnBackend(runner)
    backend.init_forward_metadata(prefill)
    backend.init_forward_metadata(decode)
    torch.manual_seed(4)
    rows = prefill.out_cache_loc.numel()
    q, k = torch.randn(rows, HEADS * DIM), torch.randn(rows, KV_HEADS, DIM)
    out = backend.forward(q, k, torch.randn(rows, KV_HEADS, DIM), make_layer(), prefill)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_all_layers_of_a_kind_follow_one_plan():
    runner = make_runner()
    fill(runner)
    batch = make_batch(runner, *PASSES["decode"])
    backend = RkscCpuAttnBackend(runner)
    backend.init_forward_metadata(batch)
    q = torch.randn(4, HEADS * DIM)
    for layer in (make_layer(), make_layer(), make_layer(sliding_window_size=9)):
        backend.forward(q, None, None, layer, batch)
    assert len(backend.forward_metadata.plans) == 2


def test_keys_that_were_not_written_are_read_as_they_were_where_asked():
    runner = make_runner()
    fill(runner)
    batch = make_batch(runner, *PASSES["decode"])
    before = runner.token_to_kv_pool.get_key_buffer(1).clone()
    backend = RkscCpuAttnBackend(runner)
    backend.init_forward_metadata(batch)
    k = torch.randn(4, KV_HEADS, DIM)
    backend.forward(torch.randn(4, HEADS * DIM), k, k, make_layer(), batch, save_kv_cache=False)
    assert torch.equal(before, runner.token_to_kv_pool.get_key_buffer(1))


@pytest.mark.parametrize("attn_type", [AttentionType.ENCODER_ONLY, AttentionType.DECODER_BIDIRECTIONAL])
def test_other_kinds_of_attention_are_left_to_torch_native(attn_type):
    runner = make_runner()
    fill(runner)
    batch, layer = make_batch(runner, *PASSES["extend"]), make_layer(attn_type=attn_type)
    ours = run(RkscCpuAttnBackend, runner, batch, layer)
    assert torch.equal(ours, run(TorchNativeAttnBackend, runner, batch, layer))


def test_encoder_decoder_batches_are_left_to_torch_native():
    runner = make_runner()
    fill(runner)
    batch = make_batch(runner, *PASSES["decode"])
    batch.encoder_lens = torch.tensor([4, 0, 2, 1])
    ours = run(RkscCpuAttnBackend, runner, batch, make_layer())
    assert torch.equal(ours, run(TorchNativeAttnBackend, runner, batch, make_layer()))


def test_arming_twice_makes_the_backend_known_once():
    arm()
    arm()
    assert ATTENTION_BACKEND_CHOICES.count(BACKEND_NAME) == 1
    assert isinstance(ATTENTION_BACKENDS[BACKEND_NAME](make_runner()), RkscCpuAttnBackend)
