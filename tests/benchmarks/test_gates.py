from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import gates
from benchmarks.gate_pairs import NEGATIVE_KINDS, POSITIVE_KINDS, Pair, negatives, positives
from benchmarks.gate_paraphrases import PARAPHRASES
from benchmarks.gates import Judged, Scores
from programs.problems import load_problems
from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.content_guard import GuardVerdict


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    return gates.judge(positives(), negatives())


def test_the_data_are_as_many_as_promised_and_all_different(judged: list[Judged]) -> None:
    kinds = Counter(one.pair.kind for one in judged)
    assert sum(kinds[kind] for kind in POSITIVE_KINDS) >= 200
    assert sum(kinds[kind] for kind in NEGATIVE_KINDS) >= 2000
    assert min(kinds[kind] for kind in NEGATIVE_KINDS) >= 100
    assert min(kinds[kind] for kind in POSITIVE_KINDS) >= 20
    assert len({(one.pair.donor, one.pair.branch) for one in judged}) == len(judged)
    assert all(one.pair.donor != one.pair.branch for one in judged)


def test_a_seed_says_which_data() -> None:
    assert positives(40, seed=3) == positives(40, seed=3) != positives(40, seed=4)
    assert negatives(60, seed=3) == negatives(60, seed=3) != negatives(60, seed=4)
    with pytest.raises(OptionError, match="can be made"):
        negatives(1_000_000)


def test_paraphrases_are_of_real_problems() -> None:
    questions = {problem.id: problem.question for problem in load_problems("gsm8k", 100)}
    assert len(PARAPHRASES) >= 20
    assert set(PARAPHRASES) <= set(questions)
    assert all(PARAPHRASES[name] != questions[name] for name in PARAPHRASES)


def test_the_guard_passes_no_near_duplicate(judged: list[Judged]) -> None:
    assert [one.pair for one in judged if not one.positive and one.verdict.same] == []


def test_the_guard_passes_most_pairs_that_ask_the_same(judged: list[Judged]) -> None:
    right = [one for one in judged if one.positive]
    assert sum(one.verdict.same for one in right) / len(right) >= 0.6


def test_other_seeds_give_no_false_merge_either() -> None:
    for seed in (1, 2):
        assert not [one.pair for one in gates.judge([], negatives(600, seed)) if one.verdict.same]


def test_a_merge_needs_both_the_guard_and_the_similarity() -> None:
    alike, unlike = Scores(published=1.0, ours=0.9), Scores(published=1.0, ours=0.5)
    passed, refused = GuardVerdict(True), GuardVerdict(False, "numbers", "donor has '1'; branch has '2'")
    ones = [
        Judged(Pair("a", "b", "template"), passed, True),
        Judged(Pair("a", "c", "template"), passed, True),
        Judged(Pair("a", "d", "number"), refused, False),
    ]
    scores = {ones[0].pair: alike, ones[1].pair: unlike, ones[2].pair: alike}
    assert [gates.merges(one, scores, 0.82) for one in ones] == [True, False, False]
    assert gates.gate_score(ones[2], alike) < gates.gate_score(ones[1], unlike)
    assert gates.summary(ones, ones, scores, 0.82) == {
        "merge_false": 0,
        "merge_trials": 1,
        "merge_recall": 0.5,
        "auc_published": 0.5,
        "auc_ours": 1.0,
    }


def test_a_sample_takes_both_sides_and_no_more_than_there_are(judged: list[Judged]) -> None:
    chosen = gates.sample(judged, 30, seed=0)
    assert Counter(one.positive for one in chosen) == {True: 30, False: 30}
    assert chosen == gates.sample(judged, 30, seed=0)
    assert len(gates.sample(judged[:5], 30, seed=0)) == 5
