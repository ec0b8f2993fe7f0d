"""Follow a plan in one layer: read the KV pool, attend, merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import INVISIBLE, AttentionPlan, Tile

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BLOCK_ROWS = 512  # rows of logits that exist at a time where the fused kernel cannot serve


@dataclass(frozen=True)
class LogitRule:
    """What happens to ``q @ k`` before the softmax."""

    scale: float
    cap: float = 0.0  # above 0: logits become cap * tanh(logit / cap)


class Workspace:
    """Memory for gathered keys and values that every layer and pass uses again.

    Allocating megabytes anew in every layer costs more in page faults than the copy itself. It grows to the
    largest gather seen and is not given back.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def lend(self, name: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized ``[rows, width]``, valid until the same name and dtype are lent again."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < rows * width:
            buffer = self._buffers[name, dtype] = torch.empty(rows * width, dtype=dtype)
        return buffer[: rows * width].view(rows, width)


def planned_attention(
    plan: AttentionPlan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rule: LogitRule,
    out: torch.Tensor,
    workspace: Workspace,
) -> torch.Tensor:
    """Attention of one layer; equals :func:`~.reference.reference_attention` up to rounding.

    Args:
        plan: for this batch and this shape of heads.
        q: ``[rows, q_heads, qk_dim]``.
        k_cache: ``[slots, kv_heads, qk_dim]`` in any dtype, the batch's own keys included.
        v_cache: ``[slots, kv_heads, v_dim]``.
        rule: scale and soft cap of the logits.
        out: ``[rows, q_heads, v_dim]``, written.
        workspace: may serve any number of calls, one after another.

    Returns:
        ``out``.
    """
    kv_heads, v_dim = k_cache.shape[1], v_cache.shape[2]
    group = q.shape[1] // kv_heads
    by_head = (q if plan.order is None else q[plan.order]).unflatten(1, (kv_heads, group)).transpose(0, 1)
    if plan.folded:
        by_head = by_head.contiguous()
    fused = rule.cap <= 0 and q.shape[2] == v_dim
    result = out.unflatten(1, (kv_heads, group)).transpose(0, 1)
    if plan.levels == 1 and plan.order is None:
        for tile in plan.tiles:
            partial, _ = _attend(tile, by_head, k_cache, v_cache, rule, fused, workspace)
            _store(tile, _by_level(tile, partial), result.unsqueeze(0))
        return out
    if plan.whole:
        found = [_attend(tile, by_head, k_cache, v_cache, rule, fused, workspace) for tile in plan.tiles]
        partials = [_by_level(tile, partial) for tile, (partial, _) in zip(plan.tiles, found, strict=True)]
        log_sums = [_by_level(tile, log_sum) for tile, (_, log_sum) in zip(plan.tiles, found, strict=True)]
        merged = _merge(*(levels[0] if len(levels) == 1 else torch.cat(levels) for levels in (partials, log_sums)))
    else:
        shape = (plan.levels, kv_heads, plan.rows, group)
        partials = q.new_zeros((*shape, v_dim), dtype=torch.float32)
        log_sums = q.new_full(shape, float("-inf"), dtype=torch.float32)
        for tile in plan.tiles:
            partial, log_sum = _attend(tile, by_head, k_cache, v_cache, rule, fused, workspace)
            _store(tile, _by_level(tile, partial), partials)
            _store(tile, _by_level(tile, log_sum), log_sums)
        merged = _merge(partials, log_sums)
    if plan.order is None:
        result.copy_(merged)
    else:
        out.unflatten(1, (kv_heads, group))[plan.order] = merged.transpose(0, 1).to(out.dtype)
    return out


def _merge(partials: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
    """One softmax over all keys from the softmax over each part of them.

    Args:
        partials: ``[levels, kv_heads, rows, group, dim]``.
        log_sums: ``[levels, kv_heads, rows, group]``, the log-sum-exp of each part's logits; minus infinity where
            a row has no such part, which must be finite in ``partials``.
    """
    return (partials * log_sums.softmax(dim=0).unsqueeze(-1)).sum(dim=0)


def _attend(
    tile: Tile,
    by_head: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rule: LogitRule,
    fused: bool,
    workspace: Workspace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax-weighted values and log-sum-exp of a tile, both in the layout ``[batch, kv_heads, rows(, dim)]``."""
    queries = _queries(tile, by_head)
    keys = _read(tile, k_cache, queries, workspace, "keys")
    values = _read(tile, v_cache, queries, workspace, "values")
    if fused:
        return _fused(queries, keys, values, is_causal=tile.causal, attn_mask=tile.mask, scale=rule.scale)
    return _attend_in_blocks(tile, queries, keys, values, rule)


def _queries(tile: Tile, by_head: torch.Tensor) -> torch.Tensor:
    """``[batch, kv_heads, rows, dim]`` of a tile from ``[kv_heads, rows, group, dim]``."""
    rows = by_head[:, tile.rows]
    if not tile.folded:
        return rows.permute(2, 0, 1, 3)
    per_sequence = rows.unflatten(1, (tile.sequences, tile.tokens)).transpose(0, 1).flatten(2, 3)
    return per_sequence.expand(tile.parts, -1, -1, -1) if tile.parts > 1 else per_sequence


def _read(tile: Tile, cache: torch.Tensor, queries: torch.Tensor, workspace: Workspace, name: str) -> torch.Tensor:
    """``[batch, kv_heads, width, dim]`` of a tile: a view where the slots are consecutive, else a copy."""
    kv_heads, dim = cache.shape[1:]
    batch = tile.sequences * tile.parts
    if tile.index is None:
        slot = cache.stride(0)
        block = cache.as_strided(
            (batch, tile.width, kv_heads, dim),
            (tile.step * slot, slot, cache.stride(1), cache.stride(2)),
            cache.storage_offset() + tile.start * slot,
        )
    else:
        flat = workspace.lend(name, tile.index.numel(), kv_heads * dim, cache.dtype)
        torch.index_select(cache.flatten(1), 0, tile.index, out=flat)
        block = flat.view(batch, tile.width, kv_heads, dim)
    if block.dtype != queries.dtype:
        block = block.to(queries.dtype)
    block = block.transpose(1, 2)
    return block if tile.folded else block.expand(queries.shape[0], -1, -1, -1)


def _by_level(tile: Tile, value: torch.Tensor) -> torch.Tensor:
    """A tile's ``[batch, kv_heads, tile rows(, dim)]`` as ``[parts, kv_heads, rows, group(, dim)]``."""
    if not tile.folded:
        return value.movedim(0, 2).unsqueeze(0)
    value = value.unflatten(2, (tile.tokens, -1))
    if tile.sequences == 1:
        return value
    # [sequences, kv_heads, tokens, group(, dim)] with the sequences' rows one after another
    return value.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _store(tile: Tile, value: torch.Tensor, levels: torch.Tensor) -> None:
    """Write a tile's ``[parts, kv_heads, rows, group(, dim)]`` to its levels and rows of all."""
    target = levels[tile.level : tile.level + tile.parts]
    if isinstance(tile.rows, slice):
        target[:, :, tile.rows].copy_(value)
    else:
        target.index_copy_(2, tile.rows, value.to(target.dtype))


def _attend_in_blocks(
    tile: Tile, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: LogitRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fused kernel computes, with capped logits and values of any width."""
    batch, kv_heads, rows, _ = queries.shape
    out = queries.new_empty(batch, rows, kv_heads, values.shape[3]).transpose(1, 2)
    log_sum = queries.new_empty(batch, kv_heads, rows, dtype=torch.float32)
    for element in range(batch):
        for first in range(0, rows, BLOCK_ROWS):
            block = slice(first, min(first + BLOCK_ROWS, rows))
            seen = block.stop if tile.causal else tile.width
            logits = torch.bmm(queries[element, :, block], keys[element, :, :seen].transpose(1, 2))
            logits = logits.float().mul_(rule.scale)
            if rule.cap > 0:
                logits.div_(rule.cap).tanh_().mul_(rule.cap)
            if tile.causal:
                logits += _causal_block(block)
            elif tile.mask is not None:
                mask = tile.mask[element if tile.mask.shape[0] > 1 else 0, 0]
                logits += mask[block] if mask.shape[0] > 1 else mask
            top = logits.amax(dim=-1, keepdim=True)
            weights = logits.sub_(top).exp_()
            total = weights.sum(dim=-1)
            weighted = torch.bmm(weights.to(values.dtype), values[element, :, :seen])
            out[element, :, block] = weighted / total.unsqueeze(-1)
            log_sum[element, :, block] = total.log_().add_(top.squeeze(-1))
    return out, log_sum


def _causal_block(block: slice) -> torch.Tensor:
    """``[rows, block.stop]`` addend by which row i of the block sees keys ``0 .. block.start + i``."""
    addend = torch.full((block.stop - block.start, block.stop), INVISIBLE)
    return addend.triu_(block.start + 1)
