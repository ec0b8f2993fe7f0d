"""What ``pass_cost`` counts: operations, launches and reads by place, and the goals that a blended pass must keep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import pass_cost
from benchmarks.pass_cost import Pass, summary

COUNTED = """
import json, sys, torch, numpy
from benchmarks import counted_server
from benchmarks.counted_server import Counting, PassCounts
counted_server._watch_reads()
counting = Counting(PassCounts(1))
counted_server._active.append(counting)
x, mask = torch.arange(6.0), torch.arange(6) % 2 == 0
with counting:
    y = x.view(2, 3) + 1
    with counting.inside("layer 0", "after"):
        int(y.sum())
        x[mask]
    z = y.cpu() * 2
    z.sum().tolist()
    host = torch.from_numpy(numpy.arange(3))
    host = host + host
    float(x.to("cpu").sum())
    host.to("cpu").sum()
    host.to(torch.device("cpu"))
print(json.dumps(counting.counts.to_plain()))
"""


def test_operations_launches_and_reads_are_counted_where_they_are_asked_for() -> None:
    """In a process of its own: PyTorch's methods are watched there."""
    run = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    counts = json.loads(run.stdout.splitlines()[-1])
    assert counts["operations"] == {"before": 2, "layer 0": 2, "after": 1}, "a view, a sum; what is on the host is free"
    assert counts["launches"] == {"before": 1, "layer 0": 2, "after": 1}
    assert [(place, what.split(":")[0]) for place, what in counts["reads"]] == [
        ("layer 0", "__int__"),
        ("layer 0", "an index by a mask"),
        ("after", "cpu"),
        ("after", "cpu"),
    ]


ROOT = Path(__file__).parents[2]


def counted(layers: int, between: dict[int, int], reads: int, late: int = 20) -> Pass:
    operations = {f"layer {layer}": late for layer in range(layers)}
    operations |= {f"between {layer}": count for layer, count in between.items()}
    return Pass(layers, operations, operations, [("before", "somebody")] * reads)


def test_the_last_line_is_of_the_blend_and_of_the_looks() -> None:
    passes = {
        "plain": counted(6, {}, 1),
        "blended": counted(6, {2: 33}, 3),
        "exiting": counted(6, {1: 9, 3: 14, 4: 11}, 4),
        "in_place": counted(6, {}, 1, late=21),
        "unasked": counted(6, {}, 1),
    }
    assert summary(passes, {"blended": counted(12, {2: 34}, 3)}) == {
        "synchronizations_blend": 2,
        "operations_take_over": 33,
        "operations_take_over_double_layers": 34,
        "operations_layer_ratio": 1.0,
        "operations_look": 14,
        "operations_verify_ratio": 1.05,
    }


@pytest.mark.server
@pytest.mark.slow
def test_a_blended_pass_keeps_its_goals(capsys: pytest.CaptureFixture[str]) -> None:
    assert pass_cost.main([]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["synchronizations_blend"] <= 2
    assert found["operations_take_over"] == found["operations_take_over_double_layers"] <= 70
    assert found["operations_layer_ratio"] == found["operations_verify_ratio"] == 1.0
