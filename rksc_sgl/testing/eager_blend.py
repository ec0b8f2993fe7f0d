"""Blending written down plainly, on a Hugging Face Llama: the oracle of the served one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rksc_sgl.blending.plan import always_computed, runs_of, to_compute

KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class EagerResult:
    """What a prefill gave.

    Attributes:
        kv: by layer, keys before their rotation and values, ``[n, kv_heads, size]`` each.
        logits: ``[vocabulary]`` of the last token.
        computed: ``[n]`` bool, the tokens that went through every layer.
    """

    kv: list[KV]
    logits: torch.Tensor
    computed: torch.Tensor


class EagerLlama:
    """A Llama for causal language modelling, one sequence at a time, without caches or kernels."""

    def __init__(self, model: Any) -> None:
        self.model, self.inner = model, model.model

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> EagerResult:
        """Every token through every layer."""
        hidden = self.inner.embed_tokens(torch.tensor(ids))
        rows, kv = torch.arange(len(ids)), []
        for layer in self.inner.layers:
            kv.append(self._kv(layer, hidden))
            hidden = self._layer(layer, hidden, rows, kv[-1])
        return EagerResult(kv, self._logits(hidden), torch.ones(len(ids), dtype=torch.bool))

    @torch.no_grad()
    def blend(
        self,
        ids: list[int],
        donor: EagerResult,
        source: torch.Tensor,
        number: torch.Tensor,
        *,
        probe: int,
        threshold: float,
        share: float,
    ) -> EagerResult:
        """The first ``probe`` layers for every token; then what is to be computed, on the donor's keys and values.

        Args:
            source: int64 ``[n]``, the donor position of each token, -1 where there is none.
            number: bool ``[n]``, tokens that are parts of numbers.
        """
        hidden = self.inner.embed_tokens(torch.tensor(ids))
        rows, kv = torch.arange(len(ids)), []
        for layer in self.inner.layers[:probe]:
            kv.append(self._kv(layer, hidden))
            hidden = self._layer(layer, hidden, rows, kv[-1])
        candidate, there = source >= 0, source.clamp(min=0)
        theirs = donor.kv[probe - 1][1][there].flatten(1)
        deviation = (kv[-1][1].flatten(1) - theirs).norm(dim=1) / theirs.norm(dim=1)
        mask = torch.zeros(len(ids), dtype=torch.bool)
        always = always_computed(source, number)
        chosen = to_compute(candidate, deviation, always, threshold=threshold, share=share)
        for begin, end in runs_of(chosen):
            mask[begin:end] = True
        hidden, rows = hidden[mask], rows[mask]
        for index, layer in enumerate(self.inner.layers[probe:], start=probe):
            keys, values = (part[there].clone() for part in donor.kv[index])
            keys[mask], values[mask] = self._kv(layer, hidden)
            kv.append((keys, values))
            hidden = self._layer(layer, hidden, rows, kv[-1])
        return EagerResult(kv, self._logits(hidden), mask)

    def _kv(self, layer: Any, hidden: torch.Tensor) -> KV:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        size = attention.head_dim
        return attention.k_proj(normed).unflatten(-1, (-1, size)), attention.v_proj(normed).unflatten(-1, (-1, size))

    def _layer(self, layer: Any, hidden: torch.Tensor, rows: torch.Tensor, kv: KV) -> torch.Tensor:
        """One decoder layer for the tokens at ``rows``, on the keys and values of all tokens."""
        attention = layer.self_attn
        queries = attention.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
        positions = torch.arange(kv[0].shape[0])
        queries, keys = self._rotated(queries, rows), self._rotated(kv[0], positions)
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), kv[1].repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * attention.scaling
        scores = scores.masked_fill(positions[None, None] > rows[None, :, None], float("-inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)
        hidden = hidden + attention.o_proj(mixed)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.inner.rotary_emb(heads, positions[None])
        batch = heads.transpose(0, 1)[None]
        return apply_rotary_pos_emb(batch, batch, cos, sin)[0][0].transpose(0, 1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.inner.norm(hidden[-1]))
