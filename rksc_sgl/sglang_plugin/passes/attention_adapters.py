"""What attention backends must be told, and what they cannot take, where a sequence goes on as several runs.

A blend computes runs of a sequence as sequences of their own: a run's prefix is what comes before it in the same
sequence, also where another run of the same pass writes it. That is right only on a backend that writes a layer's keys
and values before it reads any. Everything here is read from SGLang's objects, so that it can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FLASHINFER = "FlashInferAttnBackend"
_WRAPPERS = {"HybridAttnBackend": "prefill_backend", "TboAttnBackend": "primary"}  # what they extend with
_ONE_A_RUN = ("kv_last_page_len",)  # buffers with an entry for each sequence of a batch ...
_ONE_MORE = ("kv_indptr", "qo_indptr", "window_kv_indptr", "mask_indptr")  # ... and those with one more


def extending_backend(backend: Any) -> Any:
    """The backend that runs extend batches: the prefill half of a mixed one, the plain half of two-batch overlap."""
    while type(backend).__name__ in _WRAPPERS:
        backend = getattr(backend, _WRAPPERS[type(backend).__name__])
    return backend


def most_runs(backend: Any) -> int | None:
    """How many runs a batch may have; None where the backend makes its buffers as large as the batch.

    FlashInfer, Triton and those written after them allocate their index buffers once, for as many sequences as the
    request pool has. A larger batch raises in the scheduler, which ends the server.
    """
    backend = extending_backend(backend)
    sizes = [size for name in _ONE_A_RUN for size in _lengths(getattr(backend, name, None))]
    sizes += [size - 1 for name in _ONE_MORE for size in _lengths(getattr(backend, name, None))]
    if not sizes and getattr(backend, "extend_dummy_seqs_capped_by_req_pool", False):
        return int(backend.req_to_token_pool.size)  # SGLang says that there is a limit, in buffers of other names
    return min(sizes, default=None)


def _lengths(buffers: torch.Tensor | list[torch.Tensor] | None) -> list[int]:
    """Of one buffer, or of one for each kind of layer."""
    if buffers is None:
        return []
    return [int(one.numel()) for one in (buffers if isinstance(buffers, (list, tuple)) else [buffers])]


def refusal_of_runs(backend: Any) -> str:
    """Why a sequence cannot go on as several runs on this backend, whatever is tried; empty if it can.

    FlashInfer reads before it writes on its default path, and :func:`writing_first` cannot help where SGLang's paged
    path does not write first either, or leaves out what the ragged one does.
    """
    backend = extending_backend(backend)
    if type(backend).__name__ != FLASHINFER:
        return ""
    # fmt: off
    unsupported = {
        "it reads a 4-bit KV cache through a workspace that later runs of a prompt are not in":
            backend.prefill_uses_dequant_workspace,
        "multi-item scoring (--enable-mis) counts positions by whole prompts": backend.enable_mis,
        "block diffusion attends in both directions": backend.is_dllm_model,
        "a model with an encoder attends to what is no prefix":
            getattr(backend.dispatch_reason, "name", None) == "CROSS_ATTENTION",
    }
    # fmt: on
    reason = next((reason for reason, found in unsupported.items() if found), "")
    return reason and f"FlashInfer attention: {reason}"


@contextmanager
def writing_first(backend: Any) -> Iterator[None]:
    """Batches that are planned inside write a layer's keys and values before they read any.

    FlashInfer's default for extend batches attends to the new tokens as they come (ragged) and to the prefix in the
    pool, merges the two, and writes the new tokens last: a later run of a prompt reads slots of an earlier one that
    were not written yet. Its paged path writes all and reads everything from the pool. SGLang takes that one for the
    whole server with ``SGLANG_FLASHINFER_USE_PAGED=1``; the switch is read whenever metadata is made for a batch
    (``init_forward_metadata``), so it can be set for one batch. Every other known backend writes first anyway.
    """
    backend = extending_backend(backend)
    if type(backend).__name__ != FLASHINFER:
        yield
        return
    before = backend.use_paged
    backend.use_paged = True
    try:
        yield
    finally:
        backend.use_paged = before
