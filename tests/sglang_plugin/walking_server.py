"""A server whose split prefill loses a layer, as one would that is out of step with the model.

It tries its model before it serves and writes what it found into a file: ``WALK_RESULT``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rksc_sgl.on_import import when_imported
from rksc_sgl.server_process import main
from rksc_sgl.sglang_plugin.offering.server_facts import facts_of
from rksc_sgl.sglang_plugin.offering.walkable import prove_walkable


def _arm(module: ModuleType) -> None:
    original = module.Scheduler.__init__

    def init(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        original(scheduler, *args, **kwargs)
        runner = scheduler.tp_worker.model_runner
        walked = runner.model.forward_split_prefill
        runner.model.forward_split_prefill = lambda ids, positions, batch, layers: walked(
            ids, positions, batch, (max(layers[0], 2) if layers[0] else 0, layers[1])
        )
        before = scheduler.token_to_kv_pool_allocator.available_size()
        result = prove_walkable(scheduler)
        after = scheduler.token_to_kv_pool_allocator.available_size()
        rows = scheduler.req_to_token_pool.available_size() == scheduler.req_to_token_pool.size
        facts = asdict(facts_of(scheduler, result))
        report = {"refusal": result, "slots_lost": before - after, "rows_free": rows, "facts": facts}
        Path(os.environ["WALK_RESULT"]).write_text(json.dumps(report))

    module.Scheduler.__init__ = init


when_imported("sglang.srt.managers.scheduler", _arm)

if __name__ == "__main__":
    main()
