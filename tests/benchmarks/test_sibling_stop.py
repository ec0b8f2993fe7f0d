from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import sibling_stop
from benchmarks.fork_recordings import RecordedFork, Settings, load, record
from programs.problems import load_problems
from rksc_sgl.deciding import EarlyStop
from rksc_sgl.deciding.bound import boundary
from rksc_sgl.deciding.replay import RecordedBranch, replay
from rksc_sgl.errors import OptionError
from rksc_sgl.server_process import ServerProcess

SETTINGS = Settings("m", "gsm8k", 0, 8, 64, 0.7, confidence=False)


def write(path: Path, forks: list[RecordedFork], settings: Settings = SETTINGS) -> Path:
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in [settings, *forks]))
    return path


def test_tokens_and_steps_of_a_replay_are_counted_exactly() -> None:
    branches = [RecordedBranch(tokens, "a") for tokens in (10, 30, 20, 40, 50, 60, 70, 80)]
    few = replay(branches, EarlyStop("certain"))
    assert (few.steps, few.record.tokens_spent) == (40, 100)  # the first four decide
    assert (few.tokens_fraction, few.steps_ratio) == (100 / 360, 0.5)
    all_at_once = replay(branches, EarlyStop("certain", launch="all"))
    # 10, 20 and 30 tokens: branches 0, 2 and 1; with 40 tokens four of eight lead, the first branch among them
    assert (all_at_once.steps, all_at_once.record.tokens_spent) == (40, 10 + 30 + 20 + 40 * 5)
    assert all_at_once.done.branch == 0
    in_turn = replay(branches, EarlyStop("certain", launch=2))
    assert (in_turn.steps, in_turn.record.tokens_spent) == (30 + 40, 100)


def test_a_replay_drops_branches_by_their_recorded_confidence() -> None:
    sure = RecordedBranch(200, "a", confidence=(2.0,) * 200)
    unsure = RecordedBranch(400, "b", confidence=(2.0,) * 64 + (0.0,) * 336)
    found = replay([unsure, sure, unsure, unsure], EarlyStop("confidence", threshold=1.0, window=32))
    assert found.done.answer == "a"
    assert [branch.tokens for branch in found.record.branches] == [96, 200, 96, 96]
    assert found.record.of_fate("stopped") == [0, 2, 3]


def test_a_replay_of_failed_and_cut_branches_counts_their_tokens_and_no_votes() -> None:
    branches = [
        RecordedBranch(5, None, failed="status 500"),
        RecordedBranch(64, None, truncated=True),
        RecordedBranch(20, "a"),
    ]
    found = replay(branches, EarlyStop("certain"))
    assert (found.done.answer, found.record.tokens_spent, found.steps) == ("a", 89, 84)
    assert found.record.of_fate("failed") == [0] and found.record.branches[1].truncated


def test_policies_are_replayed_on_a_recording_and_end_with_one_json_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "r.jsonl", sibling_stop.made_up(0.9, 32, 20))
    assert sibling_stop.main(["--recordings", str(path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["problems"] == 20 and 0.8 < result["leader_share"] < 1.0
    for size in ("8", "16", "32"):
        certain = result["policies"]["certain"][size]
        assert certain["answer_same_as_full"] == 1.0 and certain["tokens_fraction"] < 0.8
        assert certain["accuracy_stop"] == certain["accuracy_full"]
        assert result["policies"]["probable(0.01)"][size]["tokens_fraction"] <= certain["tokens_fraction"]
        assert result["policies"]["certain, all at once"][size]["steps_ratio"] <= 1.0
    assert result["tokens_fraction"] == result["policies"]["certain"]["8"]["tokens_fraction"]


def test_a_calibrated_cutoff_is_replayed_on_the_problems_it_was_not_calibrated_on() -> None:
    forks = sibling_stop.made_up(1.0, 8, 620)
    replayed = sibling_stop.replay_all(forks, [8])
    assert replayed["calibrated(0.01)"]["8"]["tokens_fraction"] < replayed["probable(0.01)"]["8"]["tokens_fraction"]


@pytest.mark.parametrize(
    ("share", "most"), [(1.0, (0.50, 0.50, 0.19)), (0.9, (0.62, 0.56, 0.28)), (0.75, (0.76, 0.65, 0.42))]
)
def test_what_is_saved_at_a_known_share_is_what_the_docs_say(share: float, most: tuple[float, float, float]) -> None:
    forks = sibling_stop.made_up(share, 32, 60)
    found = [
        sibling_stop.figures([sibling_stop.play(fork.branches(size), fork.correct[:size], spec) for fork in forks])
        for size, spec in ((8, EarlyStop("certain")), (32, EarlyStop("certain")), (32, EarlyStop("probable")))
    ]
    assert [one["tokens_fraction"] for one in found] <= [limit + 0.02 for limit in most]
    assert all(one["tokens_fraction"] <= limit + 0.02 for one, limit in zip(found, most, strict=True))
    assert [one["answer_same_as_full"] for one in found[:2]] == [1.0, 1.0]


def test_the_synthetic_run_reports_every_set_of_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert sibling_stop.main(["--synthetic", "--trials", "300", "--made-up", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["trials"] == 300 and result["sets_of_answers"] == 66 and result["bounds_hold"]
    assert result["shares"]["1"]["certain"]["32"]["answer_same_as_full"] == 1.0
    assert set(result["shares"]) == {"1", "0.9", "0.75", "0.6", "mixed"}


def test_a_boundary_that_breaks_its_risk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = lambda size, risk: replace(boundary(size, risk), cutoff=0.2)  # noqa: E731
    monkeypatch.setattr(sibling_stop, "boundary", broken)
    rows = sibling_stop.bounds(2000, sizes=(16,), risks=(0.01,))
    assert any(row["refuted"] for row in rows)


def test_a_recording_that_was_cut_in_the_middle_of_a_line_goes_on_after_its_last_whole_one(tmp_path: Path) -> None:
    forks = sibling_stop.made_up(1.0, 8, 3)
    path = write(tmp_path / "r.jsonl", forks)
    path.write_text(path.read_text()[:-20])
    assert [fork.problem for fork in load(path)[1]] == [fork.problem for fork in forks[:2]]


def test_a_recording_of_other_settings_or_none_at_all_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "r.jsonl", [])
    other = Settings("m", "gsm8k", 0, 8, 128, 0.7, confidence=False)
    with pytest.raises(OptionError, match="other settings \\(max_tokens\\)"):
        record("http://127.0.0.1:9", [], other, path, 1)
    assert sibling_stop.main(["--recordings", str(path)]) == 1
    assert "has no forks" in capsys.readouterr().err
    assert sibling_stop.main(["--recordings", str(tmp_path / "none.jsonl")]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.server
def test_full_runs_of_a_server_are_recorded_once_and_replayed(tiny_server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    settings = Settings("tiny", "gsm8k", 0, 3, 6, 0.7, confidence=True)
    record(tiny_server.url, load_problems("gsm8k", 1), settings, path, 8)
    first = path.read_text()
    record(tiny_server.url, load_problems("gsm8k", 2), settings, path, 8)
    assert path.read_text().startswith(first)
    known, forks = load(path)
    assert known == settings and len(forks) == 2
    for fork in forks:
        assert all(1 <= tokens <= 6 for tokens in fork.tokens)
        assert [len(one) for one in fork.confidence] == fork.tokens
        assert fork.truncated == [tokens == 6 for tokens in fork.tokens]
        found = replay(fork.branches(3), EarlyStop("certain"))
        assert found.record.tokens_spent <= sum(fork.tokens)


@pytest.mark.server
def test_a_run_records_replays_and_solves_live_beside_stock_sglang(
    tiny_server: ServerProcess, bare_tiny_server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = ["--url", tiny_server.url, "--stock-url", bare_tiny_server.url]
    recorded = ["--recordings", str(tmp_path / "r.jsonl"), "--problems", "2", "--branches", "3", "--max-tokens", "6"]
    live = ["--live", "3", "--live-branches", "4", "--live-at-once", "2", "--live-turns", "1"]
    assert sibling_stop.main([*servers, *recorded, *live]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["problems"], result["live"]["problems"], result["live"]["branches"]) == (2, 3, 4)
    # Six random tokens state no answer, so that no vote is decided before all have ended.
    assert 0.5 <= result["live_tokens_fraction"] <= 1.1
    assert result["problems_per_minute_ratio"] > 0 and result["live"]["noise"] == 1.0


def test_a_live_run_without_a_stock_server_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sibling_stop.main(["--url", "http://127.0.0.1:9"])
    assert "--stock-url: name a server of stock SGLang" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sibling_stop.main([])
    assert "--recordings: name a file" in capsys.readouterr().err


@pytest.mark.server
def test_the_embedded_model_reads_facts_so_that_votes_win_and_stops_fire(
    smollm_server: ServerProcess, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    settings = Settings("smollm2-135m-instruct", "reading", 0, 8, 16, 0.7, confidence=False)
    record(smollm_server.url, load_problems("reading", 8), settings, path, 16)
    forks = load(path)[1]
    right = [sum(fork.correct) / 8 for fork in forks]
    assert 0.5 <= sum(right) / 8 <= 1.0
    played = [sibling_stop.play(fork.branches(8), fork.correct, EarlyStop("certain")) for fork in forks]
    assert all(one.same for one in played)
    assert sum(one.correct_full for one in played) >= 5
    assert sum(one.spent for one in played) < 0.9 * sum(one.total for one in played)
