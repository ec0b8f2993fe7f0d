"""Models are tried before they serve: in real schedulers, on the CPU platform."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from two_wordings import branch, problem, reworded

from rksc_sgl.server_process import ServerProcess
from rksc_sgl.support import Facts
from rksc_sgl.testing import write_tiny_model
from tests.six_layers import Served, SixLayers, report_of, server_of

pytestmark = [pytest.mark.server, pytest.mark.slow]


def offers_on(served: Served) -> dict[str, Any]:
    (scheduler,) = served.process.get_json("/rksc/info")["schedulers"]
    return scheduler["offers"]


def test_a_model_that_can_be_walked_is_offered_everything_and_no_slot_is_lost(variant: Served) -> None:
    offers = offers_on(variant)
    assert len(offers) == 5
    assert all(offer["offered"] and not offer["warning"] for offer in offers.values())
    variant.check_pool()


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("gemma2", "the layers of Gemma2ForCausalLM cannot be walked"),  # its split prefill begins no residual stream
        ("granite", "GraniteForCausalLM has no split prefill"),
    ],
)
def test_a_model_that_cannot_be_walked_is_served_exactly_and_says_why(
    architecture: str, said: str, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / architecture, architecture, num_hidden_layers=4)
    with server_of(model, variables={"RKSC_ALLOW_UNTESTED": "1"}) as process:
        served = Served.of(process, model)
        offers = offers_on(served)
        assert {name for name, offer in offers.items() if offer["offered"]} == {"exact", "verify"}
        assert said in offers["exit"]["refusal"] and said in process.log_tail(200)
        text = problem(29)
        exact = served.ask(reworded(text), tokens=4)
        for share in ("merge", "blend"):
            served.flush()
            served.ask(text, branch(share, 0, share=share))
            answer = served.ask(reworded(text), branch(share, 1, share=share), 4)
            report = report_of(answer)
            assert report["mode"] == "exact" and said in report["declined"]
            assert answer["output_ids"] == exact["output_ids"]
        exit_report = report_of(served.ask([5, 6, 7], {"op": "verify"}))["exit"]
        assert exit_report["rule"] is None and said in exit_report["reason"]
        served.check_pool()


class WalkingServer(ServerProcess):
    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("walking_server.py")), str(os.getpid()), *self.args]


def test_a_split_prefill_that_leaves_out_a_layer_is_found_by_its_logits(six_layers: SixLayers, tmp_path: Path) -> None:
    variables = {"WALK_RESULT": str(tmp_path / "found"), "XDG_CACHE_HOME": str(six_layers.cache())}
    arguments = server_of(six_layers.path, "--kv-cache-dtype", "bf16").args
    with WalkingServer(arguments[: arguments.index("--host")], variables=variables) as process:
        served = Served.of(process, six_layers.path)
        assert served.ask(list(range(3, 60)), tokens=4)["meta_info"]["completion_tokens"] == 4
        assert not offers_on(served)["exit"]["offered"]
    found = json.loads((tmp_path / "found").read_text())
    assert "to other logits" in found["refusal"]
    assert (found["slots_lost"], found["rows_free"]) == (0, True)
    assert Facts(**found["facts"]) == Facts(walk_refusal=found["refusal"], kv_dtype="bfloat16")
