"""What the tree has of a prompt, and where; and the namespaces of ours in it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import torch

from rksc_sgl.donors.forks import Namespace

SHIFTED = "\x1frksc-shift-"
BLENDED = "\x1frksc-blended"  # ends the extra_key of blended KV; no printable key ends so


def blended_key(extra_key: str | None, shift: int = 0) -> str:
    """The namespace of blended KV beside that of exact KV, one for each shift of its positions."""
    return f"{extra_key or ''}{f'{SHIFTED}{shift}' if shift else ''}{BLENDED}"


def is_reserved(extra_key: str | Iterable[str] | None) -> bool:
    """Whether a client's ``extra_key`` is one that only we may use."""
    keys = [extra_key] if isinstance(extra_key, str) else list(extra_key or ())
    return any(isinstance(key, str) and (key.endswith(BLENDED) or SHIFTED in key) for key in keys)


def resident_tokens(tree_cache: Any, ids: Any, namespace: Namespace) -> int:
    """How many tokens of a prompt, from the first on, the tree has on the device.

    Only looked at: nothing is split, made younger or gathered, so it may be asked on one rank alone.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(as_ids(ids), extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
    return tree_cache.tree_core.match_full_device_prefix(key)[0]


def resident_slots(tree_cache: Any, ids: Any, extra_key: str | None, cache_salt: str | None) -> torch.Tensor:
    """Slots of the longest prefix of a prompt that the tree has on the device; it counts as just used."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(token_ids=as_ids(ids), extra_key=extra_key, cache_salt=cache_salt)
    found = tree_cache.match_prefix(MatchPrefixParams(key=key))
    if not found.device_prefix_len:
        return torch.empty(0, dtype=torch.int64)
    root = tree_cache.root_node_handle(extra_key)
    return tree_cache.tree_core.collect_full_device_indices(found.last_device_node, root)[: found.device_prefix_len]


def as_ids(ids: Any) -> array[int]:
    """Token ids as SGLang's radix keys and requests have them."""
    return ids if isinstance(ids, array) else array("q", ids.tolist() if hasattr(ids, "tolist") else ids)
