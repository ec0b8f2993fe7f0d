"""A faster start on a CPU: SGLang's worker processes are forked from its main process, which has imported everything.

SGLang spawns its scheduler and detokenizer as new interpreters after its main process has imported everything, and
each imports everything again: on two cores that is half of the time to the first token. When it does, there is no
thread of Python's yet and nothing was computed, so that a fork is safe. The tokenizer, which three processes load
four times, is loaded once before the fork.

Not used where an accelerator is present (a process that is to use CUDA should not be a fork), nor for a server
that was not started by ``rksc serve`` or our programs (an engine in somebody's process, which may have threads).
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import sys
import threading
from collections.abc import Callable
from typing import Any

from rksc_sgl import cpu_platform

logger = logging.getLogger(__name__)

_allowed = False
_tokenizers: dict[str, Any] = {}  # by what they were asked for with


def allow() -> None:
    """This process is SGLang's main process and nothing else."""
    global _allowed
    _allowed = sys.platform == "linux"


def use_for_workers(result: Any, server_args: Any) -> None:
    """AFTER hook on SGLang's choice of how to start workers."""
    if not _allowed or not cpu_platform.in_use():
        return
    if threading.active_count() > 1:
        logger.warning("workers are started anew, which takes longer: the main process has threads already")
        return
    if not server_args.skip_tokenizer_init:
        _load_tokenizer(server_args)
    gc.freeze()  # what is here stays: the collector need not look at it again, and workers share its pages
    multiprocessing.set_start_method("fork", force=True)
    logger.info("workers are forked from the main process")


def tokenizer_once(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on ``get_tokenizer``: what was loaded before the fork is not loaded again."""
    known = _tokenizers.get(_key(args, kwargs))
    return original(*args, **kwargs) if known is None else known


def _load_tokenizer(server_args: Any) -> None:
    from sglang.srt.utils.hf_transformers import tokenizer

    path = server_args.tokenizer_path or server_args.model_path
    names = ("tokenizer_mode", "trust_remote_code", "revision", "tokenizer_backend")
    how = {name: getattr(server_args, name) for name in names}
    try:
        _tokenizers[_key((path,), how)] = tokenizer.get_tokenizer(path, **how)
    except Exception as error:  # those who need it will say what is wrong, or ask for it in another way
        logger.info("the tokenizer is loaded by each process for itself: %s", error)


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return repr((args, sorted(kwargs.items())))
