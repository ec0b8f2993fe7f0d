"""How much memory weights and KV get: by the system, by control groups, by what is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rksc_sgl.cpu_platform import pool_choice
from rksc_sgl.cpu_platform.pool_choice import Budget, bytes_of_weights, free_memory, pool_text
from rksc_sgl.errors import TooLittleMemoryError

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GB))


def group(path: Path, limit: int | str, used: int, of_files: int, names: tuple[str, str, str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used, f"anon 5\n{names[2]} {of_files}\nshmem 0"), strict=True):
        (path / (name if name != names[2] else "memory.stat")).write_text(f"{value}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_without_control_groups_the_systems_free_memory_is_taken(tmp_path: Path) -> None:
    assert free_memory(tmp_path / "none", tmp_path) == 20 * GB


@pytest.mark.parametrize(
    ("line", "where", "names"),
    [("0::/a/b", "", V2), ("4:memory:/a/b", "memory", V1), ("4:cpu,memory:/a/b", "memory", V1)],
)
def test_the_narrowest_group_over_this_process_counts(
    line: str, where: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text(f"9:name=systemd:/\n8:pids:/\n{line}\n")
    unlimited = "max" if names is V2 else 1 << 62
    group(tmp_path / where / "a/b", unlimited, 3 * GB, 0, names)
    group(tmp_path / where / "a", 8 * GB, 3 * GB, 1 * GB, names)
    group(tmp_path / where / "other", 1 * GB, 0, 0, names)
    assert free_memory(membership, tmp_path) == 6 * GB, "what files occupy can be had back"
    group(tmp_path / where / "a", 30 * GB, 3 * GB, 0, names)
    assert free_memory(membership, tmp_path) == 20 * GB


def test_a_group_that_is_not_visible_from_a_container_does_not_count(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/not/here\n")
    group(tmp_path, 4 * GB, 1 * GB, 0, V2)
    assert free_memory(membership, tmp_path) == 3 * GB


def pool_of(fraction: float, measured: float, weights: float) -> float:
    """What SGLang makes of a fraction: what is free after loading, less a share of what was free before."""
    return (measured - weights) - measured * (1 - fraction)


@pytest.mark.parametrize("measured", [20 * GB, 40 * GB], ids=["as SGLang measures", "a limit that it does not know"])
def test_the_pools_get_what_the_weights_leave_of_the_budget(measured: float) -> None:
    budget = Budget.of(20 * GB)
    assert (budget.left, budget.given) == (3 * GB, 17 * GB)
    assert pool_of(budget.fraction(1, 4 * GB, measured), measured, 4 * GB) == pytest.approx(13 * GB)
    assert 2 * pool_of(budget.fraction(2, 4 * GB, measured), measured, 4 * GB) == pytest.approx(13 * GB)
    assert Budget.of(4 * GB).left == 1.5 * GB


def test_weights_that_do_not_fit_are_refused_unless_the_pool_was_given() -> None:
    with pytest.raises(TooLittleMemoryError, match=r"take 18\.0 GB; 20\.0 GB are free here, of which 3\.0 GB"):
        Budget.of(20 * GB).fraction(1, 18 * GB, 20 * GB)
    assert Budget.of(20 * GB).fraction(1, 18 * GB, 20 * GB, limited=True) == pytest.approx(0.9)


def test_weights_take_their_files_size_and_without_the_library_float32_and_a_copy(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(bytes(100))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(50))
    assert bytes_of_weights(str(tmp_path), True) == 150
    assert bytes_of_weights(str(tmp_path), False) == 300
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    assert bytes_of_weights(str(tmp_path), False) == 600
    assert bytes_of_weights("some/model-of-a-hub", True) == 0


def test_what_a_server_took_is_said_in_a_line() -> None:
    used = {"weight": 3.0, "kvcache": 11.2, "token_capacity": 210000}  # SGLang's are of 2^30 bytes
    line = pool_text({"internal_states": [{"memory_usage": used}]})
    assert line == "memory: weights 3.2 GB, KV pool up to 12.0 GB for 210000 tokens; 20.0 GB free now"


@pytest.mark.slow
def test_what_the_user_gave_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.utils  # noqa: F401  (the platform is chosen when this is imported)

    from rksc_sgl.cpu_platform.platform import RkscCpuPlatform

    def defaults(**given: object) -> SimpleNamespace:
        arguments = {"device": None, "dtype": "auto", "max_running_requests": None, "chunked_prefill_size": None}
        arguments |= {"tp_size": 1, "pp_size": 1, "dp_size": 1, "model_path": "m", "max_total_tokens": None}
        made = SimpleNamespace(**arguments, **given)
        RkscCpuPlatform().apply_server_args_defaults(made)
        return made

    monkeypatch.setattr(pool_choice, "free_memory", lambda: 10 * GB)
    assert defaults(mem_fraction_static=0.3).mem_fraction_static == 0.3
    chosen = defaults(mem_fraction_static=None).mem_fraction_static
    assert chosen == pytest.approx((10 - 1.5) / 20), "of the 20 GB that SGLang takes for free"
