"""How drafts are accepted, who is decoded together, and the command on recordings that were made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sibling_speculation
from benchmarks.fork_recordings import RecordedFork, Settings, recordings
from benchmarks.sibling_speculation import ALONE, FORK, UNRELATED, Branch, Trie, accepted, arms, decode
from programs.problems import load_problems


def test_a_draft_is_accepted_along_one_path_of_its_tree() -> None:
    """The last token 7 is followed by 1 or 2; 1 by 3; 2 by 4, and that by 5. What is not drafted is 0."""
    tokens = [7, 1, 2, 3, 4, 5, 0]
    mask = np.eye(7, dtype=np.int64)
    for row, path in {1: [0], 2: [0], 3: [0, 1], 4: [0, 2], 5: [0, 2, 4], 6: []}.items():
        mask[row, path] = 1
    assert accepted(tokens, mask, [1, 3, 9]) == 2
    assert accepted(tokens, mask, [2, 4, 5, 9]) == 3
    assert accepted(tokens, mask, [3]) == 0, "3 follows 1 only"
    assert accepted(tokens, mask, [2, 3]) == 1
    assert accepted(tokens, mask, [0]) == accepted(tokens, mask, []) == 0


def test_what_one_says_first_is_drafted_for_its_siblings() -> None:
    said = list(range(100, 160))
    first, second = Branch([1, 2, 3], said), Branch([1, 2, 3], [50, *said])
    alone = decode([first], Trie(12))
    assert (alone.tokens, alone.steps, alone.longest, alone.longest_plain) == (60, 60, 60, 60), "nothing repeats"
    trie = Trie(12)
    decode([first], trie)
    later = decode([second], trie)
    assert later.tokens == 61 and later.steps < 61 / 5
    assert later.longest == later.steps and later.longest_plain == 61


def test_every_arm_decodes_the_same_branches() -> None:
    forks = [[Branch([problem], [10 * problem + index]) for index in range(2)] for problem in range(4)]
    found = arms(forks)
    everything = sorted(one.said[0] for fork in forks for one in fork)
    for groups in found.values():
        assert sorted(one.said[0] for group in groups for one in group) == everything
    assert all(len({one.prompt[0] for one in group}) == 1 for group in found[FORK])
    assert all(len({one.prompt[0] for one in group}) == len(group) == 2 for group in found[UNRELATED])
    assert all(len(group) == 1 for group in found[ALONE])


def test_the_command_on_made_up_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Siblings repeat each other but for a delay, which lets the first of them stay ahead; problems do not."""
    problems = load_problems("reading", 2)
    settings = Settings("made up", "reading", 0, 2, 64, 0.7, False)
    file, stories = tmp_path / "forks.jsonl", []
    for _ in problems:
        seed = len(stories) + 2
        story = " ".join(str(seed * place**3 % 9973) for place in range(40))
        delay = " ".join(chr(97 + seed * place**2 % 23) for place in range(60))
        stories.append([story, f"{delay} {story}"])
    recordings(file).resume(settings)
    with recordings(file).appending() as append:
        for problem, texts in zip(problems, stories, strict=True):
            flags = [False, False]
            append(RecordedFork(problem.id, texts, [9, 9], flags, flags, [None, None], [[], []]))
    argv = ["--recordings", str(file), "--model-path", "smollm2-135m-instruct", "--branches", "2"]
    assert sibling_speculation.main(argv) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["problems"] == 2 and set(found["arms"]) == {FORK, UNRELATED, ALONE}
    assert found["accepted_fork"] > found["accepted_unrelated"] >= 1.0
    assert found["arms"][FORK]["empty"]["steps_ratio"] <= 1.0
    argv[-1] = "3"
    assert sibling_speculation.main(argv) == 1
    assert "--branches" in capsys.readouterr().err
