"""Which prompts one scheduler shares: donors, aliases, and what it remembers of the whole cache; as plain values."""

from __future__ import annotations

from itertools import islice
from typing import Any

from rksc_sgl.donors.forks import Donor, Namespace
from rksc_sgl.sglang_plugin.placing.queue import known_queue_of
from rksc_sgl.sglang_plugin.tree import as_ids

MOST_SHOWN = 1000  # donors, and as many aliases: each is looked up in the tree


def state(scheduler: Any) -> dict[str, Any]:
    """``donors`` (group None: of the whole cache), ``aliases``, and what ``sharing`` holds in memory.

    At most :data:`MOST_SHOWN` donors and aliases; ``sharing`` counts them all.
    """
    queue = known_queue_of(scheduler)
    if queue is None:
        return {"donors": [], "aliases": [], "sharing": {"forks": 0, "tokens": 0, "indexed": None}}
    residents, tree_cache = queue.residents, scheduler.tree_cache
    donors: list[tuple[str | None, Namespace, Donor]] = [
        (key.group, key.namespace, donor) for key, donor in queue.table.donors()
    ]
    donors += [(None, namespace, donor) for namespace, donor in residents or ()]
    sharing: dict[str, Any] = {"forks": len(queue.table), "tokens": queue.table.tokens, "indexed": None}
    if residents is not None:
        sharing["indexed"] = {
            "prompts": len(residents),
            "tokens": residents.tokens,
            "bytes": residents.memory_bytes,
        }
    return {
        "donors": [
            {
                "name": donor.name,
                "tokens": donor.tokens.size,
                "group": group,
                "resident": _node_of(tree_cache, donor, namespace) is not None,
            }
            for group, namespace, donor in donors[:MOST_SHOWN]
        ],
        "aliases": [
            {
                "branch": alias.name,
                "canonical": alias.canonical.name,
                "namespace": key.extra_key,
                "tokens": alias.tokens.size,
                "canonical_tokens": alias.canonical.tokens.size,
                "node": _node_of(tree_cache, alias.canonical, key.namespace),
            }
            for key, alias in islice(queue.table.aliases(), MOST_SHOWN)
        ],
        "sharing": sharing,
    }


def _node_of(tree_cache: Any, donor: Donor, namespace: Namespace) -> int | None:
    """The tree's number of the node in which a prompt ends; None where it is not all there.

    Only looked at: this runs on one rank, and the trees of all must stay the same.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(as_ids(donor.tokens), extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
    matched, node, _ = tree_cache.tree_core.match_full_device_prefix(key)
    return node if matched > donor.tokens.size - tree_cache.page_size else None
