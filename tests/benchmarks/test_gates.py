from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks import gates
from benchmarks.gate_pairs import NEGATIVE_KINDS, POSITIVE_KINDS, UNRELATED, Pair, negatives, positives, unrelated
from benchmarks.gate_paraphrases import PARAPHRASES
from benchmarks.gates import Judged, Scorer, Scores
from programs.problems import load_problems
from rksc_sgl.errors import OptionError
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.similarity.content_guard import ContentComparison
from rksc_sgl.similarity.generic_prompts import GENERIC_PROMPTS


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    return gates.judge(positives(), negatives())


def test_there_are_as_many_pairs_as_promised_and_all_of_them_differ(judged: list[Judged]) -> None:
    kinds = Counter(one.pair.kind for one in judged)
    assert sum(kinds[kind] for kind in POSITIVE_KINDS) >= 200
    assert sum(kinds[kind] for kind in NEGATIVE_KINDS) >= 2000
    assert min(kinds[kind] for kind in NEGATIVE_KINDS) >= 100
    assert min(kinds[kind] for kind in POSITIVE_KINDS) >= 20
    assert len({(one.pair.donor, one.pair.branch) for one in judged}) == len(judged)
    assert all(one.pair.donor != one.pair.branch for one in judged)


def test_the_same_seed_gives_the_same_data() -> None:
    assert positives(40, seed=3) == positives(40, seed=3) != positives(40, seed=4)
    assert negatives(60, seed=3) == negatives(60, seed=3) != negatives(60, seed=4)
    with pytest.raises(OptionError, match="can be made"):
        negatives(1_000_000)


def test_unrelated_pairs_are_of_two_problems() -> None:
    questions = [problem.question for problem in load_problems("gsm8k", 100)]
    pairs = unrelated(40, seed=3)
    assert pairs == unrelated(40, seed=3) != unrelated(40, seed=4)
    for pair in pairs:
        donor, branch = ({one for one in questions if one in text} for text in (pair.donor, pair.branch))
        assert len(donor) == len(branch) == 1 and donor != branch and pair.kind == UNRELATED


def test_paraphrases_are_of_real_problems() -> None:
    questions = {problem.id: problem.question for problem in load_problems("gsm8k", 100)}
    assert len(PARAPHRASES) >= 20
    assert set(PARAPHRASES) <= set(questions)
    assert all(PARAPHRASES[name] != questions[name] for name in PARAPHRASES)


def test_the_guard_passes_no_near_duplicate(judged: list[Judged]) -> None:
    assert [one.pair for one in judged if not one.positive and one.guard.same] == []


def test_the_guard_passes_most_pairs_that_ask_the_same(judged: list[Judged]) -> None:
    right = [one for one in judged if one.positive]
    assert sum(one.guard.same for one in right) / len(right) >= 0.6


def test_other_seeds_give_no_false_merge_either() -> None:
    for seed in (1, 2):
        assert not [one.pair for one in gates.judge([], negatives(600, seed)) if one.guard.same]


def test_a_merge_needs_both_the_guard_and_the_similarity() -> None:
    alike, unlike = Scores(published=1.0, ours=0.9), Scores(published=1.0, ours=0.5)
    passed, refused = ContentComparison(True), ContentComparison(False, "numbers", "donor has '1'; branch has '2'")
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


def test_the_similarity_is_of_values_of_the_first_layers_less_what_all_prompts_have_in_common(tiny_model: Path) -> None:
    scorer = Scorer(str(tiny_model))
    text = "Anna has 3 hens and 4 geese."
    states = scorer.compute(text)
    model = scorer.model.model
    with torch.inference_mode():
        ids = scorer.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        layer = model.layers[0]
        first = layer.self_attn.v_proj(layer.input_layernorm(model.embed_tokens(ids)))[0]
    assert states.values.shape == (2, first.shape[1])
    assert torch.allclose(states.values[0], first[1:].mean(dim=0), atol=1e-6)
    assert torch.allclose(
        scorer.common, torch.stack([scorer.compute(one).values for one in GENERIC_PROMPTS]).mean(dim=0)
    )
    assert scorer.between(states, scorer.compute(text)).ours == pytest.approx(1.0, abs=1e-5)


def test_the_controls_count_what_either_score_alone_would_merge(judged: list[Judged]) -> None:
    near = next(one for one in judged if not one.positive)
    others = [Scores(published=0.95, ours=0.8), Scores(published=0.95, ours=0.2), Scores(published=0.8, ours=0.2)]
    noise, nearly, unlike = gates.controls([near], {near.pair: others[0]}, others, [Scores(1.0, 1.0)], tau=0.75)
    assert "published >= 1.000000, ours >= 1.000000" in noise
    assert "of 1 pairs that nearly ask the same, 1 would" in nearly
    assert "of 3 pairs of unrelated problems, 2 would be merged by the published score at 0.82, 1 by ours" in unlike


@pytest.mark.server
@pytest.mark.slow
def test_a_server_computes_the_similarity_that_is_measured_here(
    smollm_server: ServerProcess, embedded_model: Path, judged: list[Judged]
) -> None:
    scorer = Scorer(str(embedded_model))
    passed = [one.pair for one in judged if one.positive and one.guard.same]
    # apart within their first quarter: enough of the branch is left to compute
    quarter = {pair: -(-len(pair.branch) // 4) for pair in passed}
    apart = [pair for pair in passed if pair.donor[: quarter[pair]] != pair.branch[: quarter[pair]]]
    assert len(apart) >= 3
    for number, pair in enumerate(apart[:3]):
        scorer.read((pair.donor, pair.branch))
        _, report = [_served(smollm_server.url, text, f"gates {number}") for text in (pair.donor, pair.branch)]
        assert report["mode"] == "merge", report
        assert report["similarity"] == pytest.approx(scorer.scores(pair).ours, abs=2e-3)


def _served(url: str, text: str, group: str) -> dict[str, Any]:
    params = {"rksc": {"group": group, "branches": 2, "share": "merge"}}
    body = {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0, "custom_params": params}}
    answer = httpx.post(f"{url}/generate", json=body, timeout=120.0).raise_for_status().json()
    return answer["meta_info"]["rksc"]
