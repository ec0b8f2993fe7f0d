"""Decoder layers of the Llama family as some thirty tensor operations each, and nothing between them.

On a CPU a decode step of a small model spends as much time between the matrix products as in them: module calls, the
bookkeeping of SGLang's residual streams, and operations written for kernels that a CPU does not have. Where a model's
layers are of a kind that is known here, its layer stack runs through :class:`LeanStack` instead: the same weights, the
same arithmetic up to rounding, the same KV in the same slots. Whatever is not known (another class of layer, several
ranks, LoRA, embeddings as input, captured states, another attention backend) runs as SGLang has it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend
from rksc_sgl.cpu_platform.native.stack import NativeStack
from rksc_sgl.cpu_platform.packed_linear import through

logger = logging.getLogger(__name__)

# Stacks, and their layers, whose forward is known to be what is written here.
_KNOWN = {
    "sglang.srt.models.llama.LlamaModel": "sglang.srt.models.llama.LlamaDecoderLayer",
    "sglang.srt.models.qwen2.Qwen2Model": "sglang.srt.models.qwen2.Qwen2DecoderLayer",
    "sglang.srt.models.qwen3.Qwen3Model": "sglang.srt.models.qwen3.Qwen3DecoderLayer",
}
LEAN, COMPILED = "lean", "lean, compiled"
_MODES = frozenset({ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.MIXED})
_INTERVAL_MODES = frozenset({ForwardMode.SPLIT_PREFILL})


def use_lean_layers(model: torch.nn.Module) -> str:
    """Let a loaded model's layer stack run through :class:`LeanStack`, where it is one that is known.

    Returns:
        What its decoder layers are now, with the reason where they stay SGLang's own.
    """
    stack = getattr(model, "model", None)
    refusal = refusal_of_stack(stack)
    if refusal:
        return f"SGLang's own: {refusal}"
    lean = LeanStack(model)
    stack.forward = lean.forward  # type: ignore[union-attr, method-assign]
    if lean.interval is not None:
        model.forward_split_prefill = lean.forward_split_prefill  # type: ignore[method-assign]
        model.rksc_write_kv = lean.write_kv  # type: ignore[assignment]
    return LEAN if lean.native is None else COMPILED


def refusal_of_stack(stack: Any) -> str:
    """Why a layer stack is none of those that are known here; empty if it is one."""
    layer_class = _KNOWN.get(_path(stack))
    if layer_class is None:
        return f"{type(stack).__name__} is not one of the known stacks"
    if stack.pp_group.world_size > 1 or _ranks() > 1:
        return "the model is split between several ranks"
    if not _is_plain_norm(stack.norm):
        return "the final norm is not a plain RMSNorm"
    for layer in stack.layers:
        if _path(layer) != layer_class:
            return f"{type(layer).__name__} is not the layer that is known for {type(stack).__name__}"
        refusal = _refusal_of_layer(layer)
        if refusal:
            return refusal
    return ""


def _refusal_of_layer(layer: Any) -> str:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    # fmt: off
    needed = {
        "a norm is not a plain RMSNorm": all(map(_is_plain_norm, norms)),
        "a linear layer is quantized or wrapped": (
            _is_plain_linear(attention.qkv_proj, QKVParallelLinear)
            and _is_plain_linear(attention.o_proj, RowParallelLinear)
            and _is_plain_linear(mlp.gate_up_proj, MergedColumnParallelLinear)
            and _is_plain_linear(mlp.down_proj, RowParallelLinear)
        ),
        "the activation is not SiLU": type(mlp.act_fn) is SiluAndMul,
        "the attention is of another kind": type(attention.attn) is RadixAttention,
        "the rotary embedding is of another kind": _is_plain_rotation(attention.rotary_emb, attention.attn.head_dim),
    }
    # fmt: on
    return next((reason for reason, found in needed.items() if not found), "")


def _is_plain_norm(norm: Any) -> bool:
    return (
        type(norm) is RMSNorm
        and norm.has_weight
        and norm.weight.dtype == torch.float32
        and norm.variance_size_override is None
        and norm.override_orig_dtype is None
    )


def _is_plain_linear(linear: Any, kind: type) -> bool:
    of_kind = type(linear) is kind
    return (
        of_kind
        and isinstance(linear.quant_method, UnquantizedLinearMethod)
        and linear.weight.dtype == torch.float32
        and not linear.skip_bias_add
    )


def _is_plain_rotation(rotary: Any, head_dim: int) -> bool:
    """Whether whole heads are turned, in halves, by a table over positions."""
    return (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == head_dim
        and rotary.cos_sin_cache.dtype == torch.float32
        and not hasattr(rotary, "sin_cos_cache")
    )


class _Memory:
    """What the layers of a pass compute on the way, in memory that each takes from the one before.

    A long prefill's largest results have some 100 MB; the system clears what is new, which takes longer than SiLU.
    """

    def __init__(self) -> None:
        self._there: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, rows: int, width: int) -> torch.Tensor:
        """Any numbers, float32 ``[rows, width]``; the same again for the same shape."""
        if (rows, width) not in self._there:
            self._there[rows, width] = torch.empty(rows, width)
        return self._there[rows, width]


class _Layer:
    """The modules of one decoder layer, looked up once."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.attn = attention.attn
        self.rotary = attention.rotary_emb
        self.qkv, self.output = attention.qkv_proj, attention.o_proj
        self.gate_up, self.down = layer.mlp.gate_up_proj, layer.mlp.down_proj
        self.before_attention = layer.input_layernorm
        self.before_mlp = layer.post_attention_layernorm
        self.of_queries = getattr(attention, "q_norm", None)
        self.of_keys = getattr(attention, "k_norm", None)
        self.queries, self.kv_heads = self.attn.tp_q_head_num, self.attn.tp_k_head_num
        self.turned, self.head_dim = self.queries + self.kv_heads, self.attn.head_dim

    def add_to(
        self,
        hidden: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        backend: RkscCpuAttnBackend,
        batch: Any,
        memory: _Memory,
    ) -> None:
        """What this layer adds to the hidden states ``[rows, hidden]``, in place."""
        out = backend.attend(*self._given(hidden, turn, batch), self.attn, batch)
        hidden.add_(through(self.output, out))
        gate_up = memory.of(len(hidden), self.gate_up.weight.shape[0])
        gate, up = through(self.gate_up, _normed(hidden, self.before_mlp), gate_up).chunk(2, dim=-1)
        gated = torch.ops.aten.silu.out(gate, out=memory.of(len(hidden), gate.shape[1])).mul_(up)
        hidden.add_(through(self.down, gated))

    def write_kv(
        self, hidden: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], backend: RkscCpuAttnBackend, batch: Any
    ) -> None:
        """The first step of :meth:`add_to` alone: KV is written, and nothing added."""
        _, keys, values = self._given(hidden, turn, batch)
        backend.write(keys, values, self.attn, batch)

    @property
    def share_of_kv(self) -> float:
        """What of the layer's products :meth:`write_kv` takes."""
        sizes = [linear.weight.shape.numel() for linear in (self.qkv, self.output, self.gate_up, self.down)]
        return sizes[0] / sum(sizes)

    def _given(
        self, hidden: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values ``[rows, heads, dim]`` that its attention is given."""
        qkv = through(self.qkv, _normed(hidden, self.before_attention)).unflatten(1, (-1, self.head_dim))
        turned = _turned(self._with_norms(qkv[:, : self.turned]), *turn)
        given = (turned[:, : self.queries], turned[:, self.queries :], qkv[:, self.turned :])
        for hook in list(self.attn._forward_pre_hooks.values()):  # as a call of the module would, for who only listens
            hook(self.attn, (*given, batch))
        return given

    def _with_norms(self, heads: torch.Tensor) -> torch.Tensor:
        """Queries and keys ``[rows, heads, dim]``, with their norms where the layer has some."""
        if self.of_queries is None or self.of_keys is None:
            return heads
        return torch.cat(
            (_normed(heads[:, : self.queries], self.of_queries), _normed(heads[:, self.queries :], self.of_keys)), dim=1
        )


class LeanStack:
    """The forward of a layer stack: embedding, layers, final norm; whole, and in layer intervals.

    Passes of at most :data:`~rksc_sgl.cpu_platform.native.stack.MOST_ROWS` rows go through the compiled operations
    where they can be had; longer ones, which are all matrix products, through PyTorch's.

    Args:
        model: SGLang's model, of a stack that :func:`refusal_of_stack` has nothing against.
    """

    def __init__(self, model: Any) -> None:
        self.stack = model.model
        self.whole = self.stack.forward
        self.interval = getattr(model, "forward_split_prefill", None)
        self.layers = [_Layer(layer) for layer in self.stack.layers]
        self.native = NativeStack.of(self.layers)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """``[rows, hidden]`` normed hidden states; SGLang's own forward where a batch needs more than that."""
        backend = _backend()
        if input_embeds is not None or not self._serves(backend, forward_batch, _MODES):
            return self.whole(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        hidden = self.stack.embed_tokens(input_ids)
        self._run(0, len(self.layers), hidden, positions, backend, forward_batch)
        return _normed(hidden, self.stack.norm)

    def forward_split_prefill(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        split_interval: tuple[int, int],
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        """The model's own of that name, with its layers: from ``split_interval[0]`` until before ``[1]``."""
        from sglang.srt.layers.layer_boundary.residual import batch as residual

        assert self.interval is not None
        (start, end), backend = split_interval, _backend()
        if input_embeds is not None or not self._serves(backend, forward_batch, _INTERVAL_MODES):
            return self.interval(input_ids, positions, forward_batch, split_interval, input_embeds)
        if start == 0:
            hidden = self.stack.embed_tokens(input_ids)
        else:
            hidden = residual.stream_of(forward_batch).snapshot(forward_batch.hidden_states)
        self._run(start, end, hidden, positions, backend, forward_batch)
        forward_batch.hidden_states = residual.set_written(hidden, forward_batch)
        if end < len(self.layers):
            return None
        return self.interval(input_ids, positions, forward_batch, (end, end))  # final norm and logits

    def write_kv(self, forward_batch: Any, layer: int) -> float:
        """Write one layer's KV of a batch in which all layers before it have run, and run no more of it.

        Args:
            forward_batch: in mode SPLIT_PREFILL.
            layer: from 1.

        Returns:
            What of the layer's products that took; 0 where nothing was done, because the batch is not served here.
        """
        from sglang.srt.layers.layer_boundary.residual import batch as residual

        backend = _backend()
        if not self._serves(backend, forward_batch, _INTERVAL_MODES):
            return 0.0
        one = self.layers[layer]
        hidden = residual.stream_of(forward_batch).snapshot(forward_batch.hidden_states)
        one.write_kv(hidden, _turn(one.rotary.cos_sin_cache, forward_batch.positions), backend, forward_batch)
        return one.share_of_kv

    def _run(
        self, start: int, end: int, hidden: torch.Tensor, positions: torch.Tensor, backend: Any, batch: Any
    ) -> None:
        """Add to hidden states ``[rows, hidden]`` what layers ``start`` until before ``end`` give, in place."""
        heard = any(layer.attn._forward_pre_hooks for layer in self.layers[start:end])
        if self.native is not None and not heard and self.native.serves(backend, batch):
            self.native.run(start, end, hidden, positions, backend, batch)
            return
        turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        memory = _Memory()
        for layer in self.layers[start:end]:
            turn = turns.get(id(layer.rotary))
            if turn is None:
                turn = turns[id(layer.rotary)] = _turn(layer.rotary.cos_sin_cache, positions)
            layer.add_to(hidden, turn, backend, batch, memory)

    def _serves(self, backend: Any, batch: Any, modes: frozenset[ForwardMode]) -> bool:
        return (
            type(backend) is RkscCpuAttnBackend
            and batch.forward_mode in modes
            and batch.encoder_lens is None
            and not self.stack.layers_to_capture
            and not any(one is not None for one in batch.lora_ids or ())
        )


def _backend() -> Any:
    from sglang.srt.layers.radix_attention import get_attn_backend

    return get_attn_backend()


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return torch.rms_norm(x, (norm.hidden_size,), norm.weight, norm.variance_epsilon)


def _turn(table: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``[rows, 1, dim]`` of a head and of its swapped halves, from a table of cosines beside sines."""
    cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _turned(heads: torch.Tensor, straight: torch.Tensor, swapped: torch.Tensor) -> torch.Tensor:
    """Heads ``[rows, heads, dim]`` turned to their positions."""
    return heads.roll(heads.shape[-1] // 2, -1).mul_(swapped).addcmul_(heads, straight)


def _path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _ranks() -> int:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_size
