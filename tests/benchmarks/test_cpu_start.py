from __future__ import annotations

from benchmarks.cpu_start import STAGES, StockProcess, Stopwatch


def test_each_stage_is_noted_once_and_in_order() -> None:
    watch = Stopwatch()
    for words in [*STAGES.values(), *STAGES.values()]:
        watch.write(f"[2026-01-01 00:00:00{words} and more\n")
    assert list(watch.seconds) == list(STAGES)
    assert list(watch.seconds.values()) == sorted(watch.seconds.values())


def test_the_other_arm_is_sglangs_own_launcher_without_our_plugin() -> None:
    process = StockProcess(["--model-path", "m"])
    assert process.command()[1:3] == ["-m", "sglang.launch_server"]
    assert process.environment()["SGLANG_PLUGINS"] == "rksc_cpu"
