"""Blending written down plainly, on a Hugging Face Llama: the oracle of the served one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rksc_sgl.blending.attended import asking, attention_received
from rksc_sgl.blending.plan import after_breaks, to_compute

KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class EagerResult:
    """What a prefill gave.

    Attributes:
        kv: by layer, keys before their rotation and values, ``[n, kv_heads, size]`` each.
        logits: ``[tail, vocabulary]`` of the last tokens.
        computed: ``[n]`` bool, the tokens that went through every layer.
    """

    kv: list[KV]
    logits: torch.Tensor
    computed: torch.Tensor


@dataclass(frozen=True)
class Probed:
    """What is known of a prompt beside its donor's after the probe.

    Attributes:
        source: int64 ``[n]``, the donor position of each token, -1 where there is none.
        deviation: ``[n]``, how far values are from the donor's, relative to these.
        attended: ``[n]``, how much the last tokens attend to each.
        spread: ``[n]``, how much tokens from all of the prompt do, as in a chunk that is not the last.
    """

    source: torch.Tensor
    deviation: torch.Tensor
    attended: torch.Tensor
    spread: torch.Tensor


Choice = Callable[[Probed], torch.Tensor]  # bool [n], tokens that are computed in all layers


def served_choice(*, threshold: float, share: float) -> Choice:
    """What a server computes with these options."""

    def choose(probed: Probed) -> torch.Tensor:
        always = after_breaks(probed.source)
        sizes = (probed.source >= 0, probed.deviation, probed.attended, always)
        return to_compute(*sizes, threshold=threshold, share=share)

    return choose


class EagerLlama:
    """A Llama for causal language modelling, one sequence at a time, without caches or kernels."""

    def __init__(self, model: Any) -> None:
        self.model, self.inner = model, model.model

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], tail: int = 1) -> EagerResult:
        """Every token through every layer."""
        hidden = self.inner.embed_tokens(torch.tensor(ids))
        rows, kv = torch.arange(len(ids)), []
        for layer in self.inner.layers:
            kv.append(self._kv(layer, hidden))
            hidden = self._layer(layer, hidden, rows, kv[-1])
        return EagerResult(kv, self._logits(hidden[-tail:]), torch.ones(len(ids), dtype=torch.bool))

    @torch.no_grad()
    def blend(
        self,
        ids: Sequence[int],
        donor: EagerResult,
        source: torch.Tensor,
        choose: Choice,
        *,
        probe: int,
        own: int | None = None,
        after: Sequence[int] = (),
    ) -> EagerResult:
        """The first ``probe`` layers for every token; then what is to be computed, on the donor's keys and values.

        Args:
            ids: of the prompt.
            source: int64 ``[n]``, the donor position of each token, -1 where there is none.
            choose: of the prompt.
            own: in so many first layers what is taken over has the KV that the probe computed; None is all of these.
                Fewer are where a donor's slots are used, which are slots of every layer.
            after: tokens that follow the prompt and read it; all of them are computed.

        Returns:
            Of prompt and following tokens; logits of the prompt's last one and of all that follow.
        """
        prompt, total = len(ids), len(ids) + len(after)
        hidden = self.inner.embed_tokens(torch.tensor([*ids, *after]))
        rows, kv, entering = torch.arange(total), list[KV](), [hidden]
        for layer in self.inner.layers[:probe]:
            kv.append(self._kv(layer, hidden))
            probed = (layer, hidden[:prompt], kv[-1][0][:prompt])
            hidden = self._layer(layer, hidden, rows, kv[-1])
            entering.append(hidden)
        attended, spread = (self._attended(*probed, complete=complete) for complete in (True, False))
        there = source.clamp(min=0)
        theirs = donor.kv[probe - 1][1][there].flatten(1)
        deviation = (kv[-1][1][:prompt].flatten(1) - theirs).norm(dim=1) / theirs.norm(dim=1)
        mask = torch.ones(total, dtype=torch.bool)
        mask[:prompt] = choose(Probed(source, deviation, attended, spread))
        first = probe if own is None else own
        hidden, rows, kv = entering[first][mask], rows[mask], kv[:first]
        for index, layer in enumerate(self.inner.layers[first:], start=first):
            keys, values = (part.new_zeros(total, *part.shape[1:]) for part in donor.kv[index])
            keys[:prompt], values[:prompt] = (part[there] for part in donor.kv[index])
            keys[mask], values[mask] = self._kv(layer, hidden)
            kv.append((keys, values))
            hidden = self._layer(layer, hidden, rows, kv[-1])
        return EagerResult(kv, self._logits(hidden[-len(after) - 1 :]), mask)

    def _kv(self, layer: Any, hidden: torch.Tensor) -> KV:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        size = attention.head_dim
        return attention.k_proj(normed).unflatten(-1, (-1, size)), attention.v_proj(normed).unflatten(-1, (-1, size))

    def _attended(self, layer: Any, hidden: torch.Tensor, keys: torch.Tensor, *, complete: bool) -> torch.Tensor:
        """How much those that ask attend to each token."""
        attention, positions = layer.self_attn, torch.arange(len(hidden))
        places = torch.from_numpy(asking(len(hidden), complete=complete))
        queries = attention.q_proj(layer.input_layernorm(hidden[places])).unflatten(-1, (-1, attention.head_dim))
        turned = (self._rotated(queries, places), self._rotated(keys, positions), places)
        return attention_received(*turned, scaling=attention.scaling)

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
        return self.model.lm_head(self.inner.norm(hidden))
