"""What the benchmark of right answers asks, records, and makes of what it recorded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import answers
from benchmarks.answers_arms import (
    AGAIN,
    ARMS,
    BLEND,
    EXACT,
    MERGE,
    Branch,
    Fork,
    Settings,
    Solved,
    recordings,
    shared_by,
)
from benchmarks.answers_figures import mcnemar, of_problems, pairs, ratio_interval, summary
from benchmarks.answers_items import CLOSING, OPENINGS, SOURCES, items
from programs.problems import load_problems
from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.content_guard import same_content
from rksc_sgl.similarity.instructions import is_harmless_text
from tests.six_layers import Served

SETTINGS = Settings("m", 0, 3, 2, 64)


def branch(
    answer: str | None = "7",
    right: bool = True,
    *,
    shared: str = EXACT,
    p_yes: float | None = 0.9,
    tokens: int = 10,
    computed: float = 100.0,
    declined: str = "",
    judged: str = EXACT,
    said: str = "",
) -> Branch:
    text = "I do not know" if answer is None else f"{said}The answer is {answer}."
    return Branch(text, tokens, False, right, shared, declined, computed, p_yes, 0.5, judged)


def blended(answer: str | None = "7", right: bool = True, **more: object) -> Branch:
    return branch(answer, right, **{"shared": BLEND, "judged": BLEND, "computed": 25.0, **more})  # type: ignore[arg-type]


def solved(name: str, exact: list[Branch], selected: int = 0, source: str = "s", **arms: Fork) -> Solved:
    """All arms as the exact one, but for those that are given."""
    return Solved(source, name, {arm: Fork(exact, selected) for arm in ARMS} | arms)


def arm_of(first: Branch, *others: Branch, selected: int = 0) -> Fork:
    return Fork([first, *others], selected)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_branches_read_the_same_after_openings_of_their_own_that_the_guard_forgives() -> None:
    assert len(set(OPENINGS)) == 8 and all(map(is_harmless_text, OPENINGS))
    for item in items("gsm8k", 3, branches=8, worked=2):
        assert [prompt.partition("\n\n")[0] for prompt in item.prompts] == list(OPENINGS)
        assert len({prompt.partition("\n\n")[2] for prompt in item.prompts}) == 1
        assert item.prompts[0].count("The answer is ") == 3 and item.prompts[0].endswith(CLOSING), "two and the closing"
        assert "<<" not in item.prompts[0] and "####" not in item.prompts[0]
        assert item.problem.question in item.prompts[0] and item.problem.solution not in item.prompts[0]
        assert same_content(item.prompts[0], item.prompts[7]).same


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_problem_reads_does_not_depend_on_how_many_there_are(source: str) -> None:
    few, more = items(source, 2, branches=2, worked=3), items(source, 4, branches=3, worked=3)
    assert [item.prompts for item in few] == [item.prompts[:2] for item in more[:2]]
    assert len({item.key for item in more}) == 4
    for item in more:
        assert item.prompts[0].count(item.problem.question.strip()) == 1, "it is never among its own worked ones"
    other = items(source, 2, branches=2, worked=3, seed=1)
    assert [item.prompts for item in other] != [item.prompts for item in few]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"branches": 9}, "branches: must be 2 to 8"),
        ({"branches": 1}, "branches: must be 2 to 8"),
        ({"worked": 0}, "worked: must be 1 to"),
        ({"count": 61}, "gsm8k has 60 to be asked"),
        ({"source": "gsm9k"}, "source: must be gsm8k"),
        ({"source": "reasoning-gym:propositional_logic"}, "has 0 problems that can be shown with answers"),
    ],
)
def test_what_cannot_be_asked_is_refused(wrong: dict[str, object], message: str) -> None:
    chosen = {"source": "gsm8k", "count": 2, "branches": 3, "worked": 2, **wrong}
    with pytest.raises(OptionError, match=message):
        items(chosen.pop("source"), chosen.pop("count"), **chosen)  # type: ignore[arg-type]


def test_solutions_of_gsm8k_have_neither_notes_nor_the_answers_mark() -> None:
    problem = load_problems("gsm8k", 1)[0]
    assert "5 * 2 = 10\n" in problem.solution and problem.solution.endswith("x = 18")
    assert load_problems("reasoning-gym:aiw", 1)[0].solution == ""


# --- what the reports say ---------------------------------------------------------------------------------------------


def test_a_branch_is_blended_or_merged_only_where_the_report_says_what_was_taken() -> None:
    meta = {"prompt_tokens": 100, "cached_tokens": 10}
    assert shared_by({"mode": "exact"}, meta, 10) == {"shared": "exact", "declined": "", "computed": 90.0}
    taken = {"mode": "blend", "taken_tokens": 50, "probe_layers": 2}
    assert shared_by(taken, meta, 10) == {"shared": "blend", "declined": "", "computed": 50.0}
    assert shared_by({"mode": "blend", "declined": "why"}, meta, 10)["shared"] == ""
    merged = {"mode": "merge", "replaced_tokens": 120, "probe_layers": 2, "merged_tokens": 99}
    assert shared_by(merged, {"prompt_tokens": 100, "cached_tokens": 99}, 10)["computed"] == 1 + 24
    assert shared_by({}, meta, 10)["shared"] == "", "a server without a report proves nothing"


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_mcnemars_test_is_exact_and_two_sided() -> None:
    assert (mcnemar(0, 0), mcnemar(6, 0), mcnemar(0, 6)) == (1.0, 0.03125, 0.03125)
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6, abs=1e-5)
    assert mcnemar(3, 3) == 1.0


def test_pairs_are_the_blended_branches_after_the_first_and_the_others_are_counted_by_reason() -> None:
    exact = [branch(), branch(), branch(), branch("8", False), branch(None, False)]
    other = arm_of(
        blended(), blended(), blended("8", False), blended(), branch(None, False, declined="too few"), selected=1
    )
    (row,) = rows = [solved("p", exact, **{BLEND: other})]
    assert [pair.other for pair in pairs(rows, BLEND)] == row.arms[BLEND].branches[1:4]
    found = summary(rows)[BLEND]
    assert (found["branches"], found["pairs"], found["problems"], found["declined"]) == (4, 3, 1, {"too few": 1})
    assert (found["both"], found["lost"], found["won"], found["neither"]) == (1, 1, 1, 0)
    assert (found["difference"], found["mcnemar_p"], found["losing_problems"]) == (0.0, 1.0, 1)
    assert (found["accuracy_exact"], found["accuracy"], found["computed_fraction"]) == (0.6667, 0.6667, 0.25)
    assert (found["equal_answers"], found["equal_texts"]) == (0.3333, 0.3333)
    again = summary(rows)[AGAIN]
    assert (again["pairs"], again["equal_texts"], again["computed_fraction"]) == (4, 1.0, 1.0)
    assert (again["equal_answers"], again["answered_pairs"]) == (1.0, 3), "without an answer nothing is compared"


def test_the_difference_has_an_interval_over_problems() -> None:
    loses = {BLEND: arm_of(branch(), *[blended("8", False)] * 4)}
    keeps = {BLEND: arm_of(branch(), *[blended()] * 4)}
    rows = [solved(f"{index}", [branch()] * 5, **(loses if index == 0 else keeps)) for index in range(4)]
    found = summary(rows)[BLEND]
    assert (found["both"], found["lost"], found["difference"]) == (12, 4, -0.25)
    # A resample of four problems has the losing one 0, 1, 2 or 3 times with probabilities 0.32, 0.42, 0.21 and 0.05.
    assert found["interval"] == [-0.75, 0.0]
    assert (found["mcnemar_p"], found["losing_problems"]) == (0.125, 1)
    assert found["losing_problems_upper95"] == pytest.approx(0.7514, abs=1e-4)
    same = summary(rows)[AGAIN]
    assert (same["interval"], same["losing_problems_upper95"]) == ([0.0, 0.0], pytest.approx(1 - 0.05**0.25, abs=1e-4))


def test_intervals_of_ratios_weigh_problems_by_their_pairs() -> None:
    assert ratio_interval([1, 1, 1], [2, 2, 2]) == [0.5, 0.5]
    assert ratio_interval([0, 9], [1, 9]) == [0.0, 1.0]
    assert ratio_interval([1], [2]) is None
    assert of_problems([]) == {"mean": None, "interval": None, "n": 0}


def test_merges_are_no_blends_and_nothing_is_said_of_an_arm_in_which_nothing_fired() -> None:
    merged = branch("8", False, shared=MERGE, judged=MERGE)
    rows = [solved("p", [branch(), branch()], **{MERGE: arm_of(branch(), merged), BLEND: arm_of(branch(), branch())})]
    found = summary(rows)
    assert (found[MERGE]["pairs"], found[MERGE]["lost"]) == (1, 1)
    assert (found[BLEND]["pairs"], found[BLEND]["declined"]) == (0, {"no reason given": 1})
    assert found[BLEND]["difference"] is found[BLEND]["mcnemar_p"] is found[BLEND]["interval"] is None
    assert found[BLEND]["judge"]["equal_verdicts"] is None


def test_verdicts_are_compared_where_blended_kv_was_read_and_apart_where_texts_are_equal() -> None:
    exact = [branch(), branch(), branch(), branch(p_yes=0.2), branch()]
    other = arm_of(
        branch(),
        blended(p_yes=0.6),  # the same text and verdict
        blended(said="So: ", p_yes=0.4),  # another text, another verdict
        blended(p_yes=0.7),  # the same text, another verdict
        blended(p_yes=0.1, judged=EXACT),  # a verification that did not read blended KV
        selected=2,
    )
    found = summary([solved("p", exact, **{BLEND: other})])[BLEND]["judge"]
    assert (found["verdicts"], found["equal_verdicts"], found["judged_on_exact_kv"]) == (3, 0.3333, 1)
    assert (found["verdicts_on_equal_texts"], found["equal_verdicts_on_equal_texts"]) == (2, 0.5)
    assert found["yes_exact"] == 0.6667
    assert (found["selections"], found["equal_selections"], found["equal_selected_answers"]) == (1, 0.0, 1.0)


# --- what verification is worth ---------------------------------------------------------------------------------------


def test_what_verification_is_worth_is_that_of_known_branches() -> None:
    score_wins = [branch(p_yes=0.9, tokens=30), branch("8", False, p_yes=0.3), branch("8", False, p_yes=0.4)]
    none_right = [branch(None, False, p_yes=None), branch("8", False, p_yes=0.1), branch("9", False, p_yes=0.2)]
    votes_win = [branch(p_yes=0.3), branch(p_yes=0.4), branch("8", False, p_yes=0.5)]
    rows = [
        solved("a", score_wins, 0),
        solved("b", none_right, 2),
        solved("c", votes_win, 2),
        solved("d", votes_win, 2),
    ]
    found = summary(rows)["verification"]
    assert {name: one["mean"] for name, one in found["accuracy"].items()} == {
        "sample": 0.4167,  # a third, none, and twice two thirds
        "majority": 0.5,
        "weighted_majority": 0.75,  # 0.9 against 0.7 in the first, 0.7 against 0.5 in the last two
        "best_score": 0.25,
        "any": 0.75,
    }
    assert all(one["n"] == 4 for one in found["accuracy"].values())
    # P(YES) of the right: 0.9, and twice 0.3 and 0.4; of the wrong: 0.3, 0.4, 0.1, 0.2 and twice 0.5
    assert (found["auc"], found["verified"], found["branches"]) == ((6 + 2 * (2.5 + 3.5)) / 30, 11, 12)
    within = {name: (one["mean"], one["n"]) for name, one in found["auc_within"].items()}
    assert within == {"p_yes": (0.3333, 3), "votes": (0.6667, 3), "short": (0.3333, 3)}
    assert found["label_mass"] == 0.5


def test_equal_answers_in_other_spellings_are_votes_for_one() -> None:
    exact = [branch("8", False), branch("7.0"), branch("7 apples")]
    assert summary([solved("p", exact)])["verification"]["accuracy"]["majority"]["mean"] == 1.0


# --- recordings and the command ---------------------------------------------------------------------------------------


def write(path: Path, rows: list[Solved]) -> Path:
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in [SETTINGS, *rows]))
    return path


ROWS = [solved(f"{index}", [branch(), branch("8", False)], source="ab"[index % 2]) for index in range(4)]


def test_a_recording_comes_back_as_it_was_and_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    file = recordings(write(tmp_path / "r.jsonl", ROWS))
    assert file.load() == (SETTINGS, ROWS)
    whole = file.path.read_text()
    file.path.write_text(whole[:-20])
    assert file.resume(SETTINGS) == ROWS[:3]
    with file.appending() as append:
        append(ROWS[3])
    assert file.path.read_text() == whole


def test_figures_are_made_of_the_arms_that_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [Solved("s", "p", {EXACT: row.arms[EXACT], BLEND: row.arms[BLEND]}) for row in ROWS[:1]]
    settings = replace(SETTINGS, arms=[EXACT, BLEND])
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in [settings, *some]))
    assert answers.main(["--recordings", str(path)]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)["all"]
    assert BLEND in figures and MERGE not in figures and AGAIN not in figures
    with pytest.raises(OptionError, match="other settings \\(arms\\)"):
        recordings(path).resume(SETTINGS)
    with pytest.raises(SystemExit):
        answers.main(["--model-path", "m", "--arms", BLEND])
    assert "name it too" in capsys.readouterr().err


def test_other_settings_and_other_files_are_refused(tmp_path: Path) -> None:
    file = recordings(write(tmp_path / "r.jsonl", ROWS))
    with pytest.raises(OptionError, match="other settings \\(worked, max_tokens\\)"):
        file.resume(Settings("m", 0, 3, 4, 128))
    other = recordings(tmp_path / "other.jsonl")
    other.path.write_text('{"model": "m"}\n')
    with pytest.raises(OptionError, match="cannot be read as recorded answers"):
        other.load()
    assert recordings(tmp_path / "new" / "r.jsonl").resume(SETTINGS) == []


def test_recordings_are_replayed_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    assert answers.main(["--recordings", str(path), "--replay"]) == 0
    written = capsys.readouterr()
    result = json.loads(written.out.splitlines()[-1])
    assert result["settings"] == asdict(SETTINGS)
    assert (result["all"]["problems"], list(result["sources"])) == (4, ["a", "b"])
    assert result["all"][AGAIN]["neither"] == 4 and result["sources"]["a"]["verification"]["accuracy"]["any"]["n"] == 2
    assert "no reason given" in written.err and "right: majority" in written.err
    assert answers.main(["--recordings", str(path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_without_anything_to_show_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answers.main(["--recordings", str(tmp_path / "none.jsonl")]) == 1
    assert "answers: recordings:" in capsys.readouterr().err
    assert answers.main(["--recordings", str(write(tmp_path / "r.jsonl", []))]) == 1
    assert "has no answers" in capsys.readouterr().err
    assert answers.main(["--model-path", "m", "--branches", "9"]) == 1
    assert "answers: branches: must be 2 to 8" in capsys.readouterr().err, "before a server is started"
    with pytest.raises(SystemExit):
        answers.main([])
    assert "--model-path: name a model" in capsys.readouterr().err


@pytest.mark.server
@pytest.mark.slow
def test_a_run_records_each_problem_in_every_arm_and_goes_on_where_it_ended(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    family = "reasoning-gym:family_relationships"
    command = ["--url", served.process.url, "--recordings", str(path), "--sources", "gsm8k", family]
    command += ["--problems", "1", "--branches", "3", "--worked", "1", "--max-tokens", "4"]
    assert answers.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["all"]["problems"], list(result["sources"])) == (2, ["gsm8k", family])
    blend, merge, again = (result["all"][arm] for arm in (BLEND, MERGE, AGAIN))
    assert [one["branches"] for one in (blend, merge, again)] == [4, 4, 4]
    assert (blend["pairs"], blend["declined"]) == (4, {}) and 0.3 < blend["computed_fraction"] < 0.9
    assert blend["judge"]["verdicts"] == 4 and blend["judge"]["judged_on_exact_kv"] == 0
    assert merge["declined"]["content guard: words"] == 2, "the family's question speaks of a word"
    assert merge["pairs"] + sum(merge["declined"].values()) == 4
    assert (again["pairs"], again["computed_fraction"]) == (4, 1.0)
    worth = result["all"]["verification"]
    assert worth["verified"] == worth["branches"] == 6 and 0.0 < worth["label_mass"] < 1.0

    for row in recordings(path).load()[1]:
        assert {fork.branches[0].text for fork in row.arms.values()} == {row.arms[EXACT].branches[0].text}
        first, *others = row.arms[MERGE].branches
        assert all(one.text == first.text for one in others if one.shared == MERGE), "it reads the first one's prompt"

    recorded = path.read_text()
    path.write_text(recorded[:-30])
    assert answers.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["all"]["problems"] == 2
    lines = path.read_text().splitlines()
    assert lines[:2] == recorded.splitlines()[:2] and len(lines) == 3, "only the problem that was cut ran again"
    assert answers.main([*command, "--worked", "2"]) == 1
    assert "other settings (worked)" in capsys.readouterr().err
