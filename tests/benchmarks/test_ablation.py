"""The ablation: what it leaves out, what it makes of that, and that what was never at work ends it."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import ablation
from benchmarks.ablation import (
    AGAIN,
    BLENDS,
    DIVERGENT,
    EVERYTHING,
    EXIT,
    IN_PLACE,
    MECHANISMS,
    MERGES,
    REWORDED,
    SIBLINGS,
    SKIP,
    STOP,
    TOGETHER,
    VOTES,
)
from benchmarks.pipeline import Cell
from benchmarks.pipeline_arms import QUESTION, Plain
from benchmarks.pipeline_items import reworded, wording
from programs.asking import opened
from rksc_sgl import Endpoint
from rksc_sgl.errors import RkscError
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.similarity.content_guard import same_content
from tests.made_up_results import ablated
from tests.six_layers import Served, SixLayers, server_of

OPTIONS = Namespace(model_path="a-model", problems=2, branches=8, material=1024, tokens=32, seed=0)


def test_the_time_without_a_mechanism_is_over_the_time_with_everything() -> None:
    cells = [ablated(TOGETHER, SIBLINGS, EXIT, noise=1.1), ablated(VOTES, STOP, noise=1.1)]
    result = ablation.summary(cells, {BLENDS: "why"}, OPTIONS)
    assert list(result["without"]) == [SIBLINGS, EXIT, STOP] and result["not_measured"] == {BLENDS: "why"}
    one = result["without"][SIBLINGS]
    assert (one["ratio"], one["interval"], one["noise"], one["equal_tokens"]) == (2.0, [2.0, 2.0], 1.1, True)
    assert result["noise"] == 1.1 and result["equal_tokens"] is True
    assert "equal_tokens" not in result["without"][STOP], "stopping is about them"
    assert result["without"][STOP]["same_answer"] == 1.0


def test_an_arm_that_generated_less_or_answered_otherwise_is_seen() -> None:
    cell = ablated(TOGETHER, SIBLINGS, IN_PLACE)
    cell.runs[SIBLINGS][1] = replace(cell.runs[SIBLINGS][1], generated=255)
    found = ablation.summary([cell], {}, OPTIONS)
    assert found["equal_tokens"] is False
    assert [found["without"][name]["equal_tokens"] for name in (SIBLINGS, IN_PLACE)] == [False, True]
    votes = ablated(VOTES, SKIP)
    votes.runs[SKIP][0] = replace(votes.runs[SKIP][0], answer=None)
    assert ablation.figures(SKIP, votes)["same_answer"] == 0.5


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_must_be_at_work_with_everything_and_not_without_it(name: str) -> None:
    cell = ablated(MECHANISMS[name].kind, name)
    ablation.check(name, cell)
    working, idle = cell.runs[EVERYTHING], cell.runs[name]
    with pytest.raises(RkscError, match=f"{name}: it was never at work"):
        ablation.check(name, Cell(cell.kind, 8, 1024, {EVERYTHING: idle, AGAIN: idle, name: idle}))
    if name != IN_PLACE:  # which reads fewer tokens, and some in any case
        with pytest.raises(RkscError, match=f"{name}: it was at work in the runs without it too"):
            ablation.check(name, Cell(cell.kind, 8, 1024, {EVERYTHING: working, AGAIN: working, name: working}))


def test_what_a_server_does_not_have_is_named() -> None:
    def offers(*refused: str) -> dict[str, Any]:
        names = ("exact", "blend", "merge", "exit")
        return {name: {"offered": name not in refused, "refusal": f"no {name}" * (name in refused)} for name in names}

    profile = {"risks": {"verdict": [0.01], "selection": []}}
    assert ablation.not_offered({"offers": offers(), "exit": {"profiles": [profile]}}, "m") == {}
    found = ablation.not_offered({"offers": offers("merge"), "exit": {"profiles": []}}, "m")
    assert found == {MERGES: "no merge", EXIT: "no profile fits m; make one: rksc calibrate --model-path m"}
    refused = ablation.not_offered({"offers": offers("exit"), "exit": {"profiles": []}}, "m")
    assert refused == {EXIT: "no exit"}


def test_reworded_prompts_ask_the_same_and_begin_differently() -> None:
    made = reworded(2, 16, 300, lambda text: len(text.split()), seed=1)
    for item in made:
        assert len(set(item.prompts)) == len({prompt.partition("\n\n")[0] for prompt in item.prompts}) == 16
        assert all(same_content(item.prompts[0], prompt).same for prompt in item.prompts)
    assert not same_content(made[0].prompts[0], made[1].prompts[1]).same
    assert len({wording(branch) for branch in range(64)}) == 64
    with pytest.raises(RkscError, match="--problems: prompts that may merge"):
        reworded(50, 8, 300, len)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--problems", "0"], "must be 1 or more"),
        (["--branches", "1"], "--branches 2 or more"),
        (["--problems", "51"], "must be at most 50"),
        (["--mechanisms", "magic"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablation.main(words)
    assert said in capsys.readouterr().err


def asked(server: ServerProcess, *more: str) -> list[str]:
    small = ["--problems", "2", "--branches", "4", "--material", "60", "--tokens", "5", "--answer-tokens", "4"]
    return ["--url", server.url, "--model-path", "a-model", *small, *more]


@pytest.mark.server
@pytest.mark.slow
def test_mechanisms_are_left_out_one_at_a_time(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    forks = [SIBLINGS, IN_PLACE, BLENDS, MERGES]
    assert ablation.main(asked(served.process, "--mechanisms", EXIT, *forks)) == 1
    assert "certified_exit: it was never at work" in capsys.readouterr().err, "its profiles are of other questions"
    assert ablation.main(asked(served.process, "--mechanisms", *forks)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["without"]) == set(forks) and result["equal_tokens"] is True
    assert all(one["ratio"] > 0 and one["noise"] > 0 for one in result["without"].values())
    assert result["not_measured"] == dict.fromkeys([SKIP, EXIT, STOP], "not asked for")
    kinds = {SIBLINGS: TOGETHER, IN_PLACE: TOGETHER, BLENDS: DIVERGENT, MERGES: REWORDED}
    assert {name: one["kind"] for name, one in result["without"].items()} == kinds


@pytest.mark.server
@pytest.mark.slow
def test_votes_that_are_never_decided_end_it(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is random: its branches give no answers, so that none is stopped."""
    assert ablation.main(asked(served.process, "--mechanisms", STOP)) == 1
    out, err = capsys.readouterr()
    assert "ablation: stop: it was never at work (votes)" in err and not out


@pytest.mark.server
def test_a_server_without_these_mechanisms_is_refused(
    bare_tiny_server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(asked(bare_tiny_server)) == 1
    assert "has none of these mechanisms" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exiting(six_layers: SixLayers, served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a profile of the pipelines' question, by which every verification leaves after two layers."""
    endpoint = Endpoint(served.process.url)
    labels = Plain(endpoint, 1, judge=False).labels
    chats = ([("user", text), ("assistant", text), ("user", QUESTION)] for text in ("one", "other"))
    texts = (opened(endpoint.chat_template, [{"role": role, "content": said} for role, said in one]) for one in chats)
    prompts = zip(*(reversed(endpoint.tokenize(text)) for text in texts), strict=False)
    tail = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], prompts)][::-1]
    profile = replace(six_layers.sure, question_ids=tuple(tail), yes_ids=labels.ids[0], no_ids=tuple(labels.other_ids))
    path = tmp_path_factory.mktemp("exiting") / "profile.json"
    profile.save(path)
    with server_of(six_layers.path, "--enable-metrics", variables={"RKSC_PROFILE": str(path)}) as server:
        yield server


@pytest.mark.server
@pytest.mark.slow
def test_the_exit_is_left_out_where_a_profile_certifies_it(
    exiting: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(asked(exiting, "--mechanisms", SIBLINGS, EXIT, IN_PLACE)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["without"]) == [SIBLINGS, IN_PLACE, EXIT] and result["equal_tokens"] is True
    assert EXIT not in result["not_measured"]


@pytest.mark.server
@pytest.mark.slow
def test_votes_run_to_their_end_and_are_verified_where_they_must(
    smollm_server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--mechanisms", SKIP, STOP, "--problems", "3", "--branches", "6", "--answer-tokens", "24"]
    assert ablation.main(["--url", smollm_server.url, "--model-path", "smollm2-135m-instruct", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["without"]) == [SKIP, STOP]
    for one in result["without"].values():
        assert one["kind"] == VOTES and 0.0 <= one["same_answer"] <= 1.0 and 0.0 <= one["same_answer_noise"] <= 1.0
