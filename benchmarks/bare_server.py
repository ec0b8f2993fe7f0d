"""A server on our CPU platform with SGLang's default tree and without our hooks: the baseline of ``overhead``.

Every worker process is forked from this one, so the change is made in each of them. What is left are the hooks that
the platform itself needs.
"""

from __future__ import annotations

from rksc_sgl.cpu_platform import warm_fork, without_triton
from rksc_sgl.server_process import main
from rksc_sgl.sglang_plugin.wiring import hooks

_OF_THE_PLATFORM = (warm_fork.use_for_workers, warm_fork.tokenizer_once, without_triton.last_slots)

hooks.HOOKS = tuple(hook for hook in hooks.HOOKS if hook.function in _OF_THE_PLATFORM)

if __name__ == "__main__":
    main()
