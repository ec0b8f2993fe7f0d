"""Which data-parallel rank a fork runs on: SGLang spreads requests over its ranks, and each has a cache of its own."""

from __future__ import annotations

import zlib

from rksc_sgl.options import RequestOptions


def rank_of_fork(options: RequestOptions | None, ranks: int) -> int | None:
    """The rank of every request of a fork, branches and verifications; the same wherever it is asked.

    Args:
        options: of one of its requests; None where that did not opt in.
        ranks: of the server.

    Returns:
        None where SGLang may choose.
    """
    together = None if options is None else options.root or options.group
    return zlib.crc32(together.encode()) % ranks if together is not None and ranks > 1 else None
