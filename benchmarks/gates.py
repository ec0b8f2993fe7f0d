"""Would a merge ever answer another question? The content guard and the similarity gate on real near-duplicates.

A merge is made where the guard finds the same content *and* the similarity reaches tau. The guard runs on every pair;
states are computed for every pair that it passes, and for a random sample of both sides, from which the AUCs come: of
the published similarity alone (hidden states of the last token, all layers), and of the whole gate as it is served
(values of the first layers averaged over a prompt's tokens, less the mean of the generic prompts, with every pair that
the guard refuses below every pair that it passes). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.gate_pairs import NEGATIVE_KINDS, POSITIVE_KINDS, Pair, negatives, positives, unrelated
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.options import DEFAULT_TAU
from rksc_sgl.sglang_plugin.passes.split_pass import probed_of
from rksc_sgl.similarity.content_guard import ContentComparison, same_content
from rksc_sgl.similarity.gate import auc, pooled_similarity, published_similarity
from rksc_sgl.similarity.generic_prompts import GENERIC_PROMPTS

PUBLISHED_TAU = 0.82
NOISE_PROMPTS = 3


@dataclass(frozen=True)
class Judged:
    """A pair and what the guard says of it."""

    pair: Pair
    guard: ContentComparison
    positive: bool


@dataclass(frozen=True)
class Scores:
    """Similarities of one pair: the published one, and ours without the guard."""

    published: float
    ours: float


@dataclass(frozen=True, eq=False)
class States:
    """What the two scores read of one prompt.

    Attributes:
        last: hidden states of the last token, ``[layers, hidden]``.
        values: values of the probe's layers, averaged over the tokens but the first, ``[probe layers, heads * size]``.
    """

    last: torch.Tensor
    values: torch.Tensor


class Scorer:
    """States of prompts by the model itself, in float32, each prompt computed once.

    Attributes:
        common: what the values of all prompts have in common: their mean over the generic prompts.
    """

    def __init__(self, model_path: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = resolve_model(model_path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.states: dict[str, States] = {}
        self._values: list[torch.Tensor] = []
        for layer in self.model.model.layers[: probed_of(self.model.config.num_hidden_layers)]:
            layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: self._values.append(output[0]))
        self.common = torch.stack([self.compute(text).values for text in GENERIC_PROMPTS]).mean(dim=0)

    def compute(self, text: str) -> States:
        """The first token's values are left out of the average, as in a server."""
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        self._values.clear()
        with torch.inference_mode():
            outputs = self.model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        last = torch.stack([layer[0, -1] for layer in outputs.hidden_states[1:]])  # the first one is the embedding
        return States(last, torch.stack([values[1:].mean(dim=0) for values in self._values]))

    def read(self, texts: Iterable[str]) -> None:
        for text in tqdm(list(dict.fromkeys(texts)), unit="prompt", file=sys.stderr):
            if text not in self.states:
                self.states[text] = self.compute(text)

    def scores(self, pair: Pair) -> Scores:
        return self.between(self.states[pair.donor], self.states[pair.branch])

    def between(self, donor: States, branch: States) -> Scores:
        return Scores(
            published_similarity(donor.last, branch.last), pooled_similarity(donor.values, branch.values, self.common)
        )


def judge(same: Iterable[Pair], different: Iterable[Pair]) -> list[Judged]:
    """What the guard says of every pair."""
    return [
        Judged(pair, same_content(pair.donor, pair.branch), positive)
        for pairs, positive in ((same, True), (different, False))
        for pair in tqdm(list(pairs), unit="pair", file=sys.stderr)
    ]


def sample(judged: Sequence[Judged], count: int, seed: int) -> list[Judged]:
    """At most ``count`` of each side, at random."""
    source = random.Random(seed)
    sides = ([one for one in judged if one.positive is side] for side in (True, False))
    return [one for side in sides for one in source.sample(side, min(count, len(side)))]


def gate_score(one: Judged, scores: Scores) -> float:
    """Our whole gate as one number: the similarity, or below every similarity where the guard refuses."""
    return scores.ours if one.guard.same else -1.0 + scores.ours * 1e-6


def merges(one: Judged, scores: dict[Pair, Scores], tau: float) -> bool:
    return one.guard.same and scores[one.pair].ours >= tau


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--scored", type=int, default=150, help="pairs of each side, and unrelated ones, to compute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tau", type=float, default=DEFAULT_TAU, help="least similarity of a merge")
    parser.add_argument("--positives", type=int, default=240)
    parser.add_argument("--negatives", type=int, default=2400)
    arguments = parser.parse_args(words)
    if min(arguments.scored, arguments.positives, arguments.negatives) < 1:
        parser.error("--scored, --positives and --negatives must be at least 1")
    judged = judge(positives(arguments.positives, arguments.seed), negatives(arguments.negatives, arguments.seed))
    chosen = sample(judged, arguments.scored, arguments.seed)
    wanted = [one.pair for one in (*chosen, *(one for one in judged if one.guard.same))]
    random_pairs = unrelated(arguments.scored, arguments.seed)
    scorer = Scorer(arguments.model_path)
    scorer.read(text for pair in (*wanted, *random_pairs) for text in (pair.donor, pair.branch))
    scores = {pair: scorer.scores(pair) for pair in wanted}
    others = [scorer.scores(pair) for pair in random_pairs]
    noise = [
        scorer.between(scorer.states[one.pair.donor], scorer.compute(one.pair.donor)) for one in chosen[:NOISE_PROMPTS]
    ]
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(_table(judged, scores, arguments.tau))
    for line in controls(chosen, scores, others, noise, arguments.tau):
        console.print(line)
    result = summary(judged, chosen, scores, arguments.tau)
    print(json.dumps(result), flush=True)
    return 0 if result["merge_false"] == 0 else 1


def summary(
    judged: Sequence[Judged], chosen: Sequence[Judged], scores: dict[Pair, Scores], tau: float
) -> dict[str, float]:
    """What the last line says."""
    merged = [one for one in judged if merges(one, scores, tau)]
    right = [one for one in judged if one.positive]
    sides = [[one for one in chosen if one.positive is side] for side in (True, False)]
    published = [[scores[one.pair].published for one in side] for side in sides]
    ours = [[gate_score(one, scores[one.pair]) for one in side] for side in sides]
    return {
        "merge_false": sum(not one.positive for one in merged),
        "merge_trials": len(judged) - len(right),
        "merge_recall": round(sum(one.positive for one in merged) / len(right), 3),
        "auc_published": round(auc(*published), 3),
        "auc_ours": round(auc(*ours), 3),
    }


def _table(judged: Sequence[Judged], scores: dict[Pair, Scores], tau: float) -> Table:
    table = Table(title="pairs that would be merged: right ones (recall) and false ones")
    for heading in ("kind", "pairs", "guard passes", "merged", "share", "scored", "published", "ours"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind in (*POSITIVE_KINDS, *NEGATIVE_KINDS):
        ones = [one for one in judged if one.pair.kind == kind]
        if not ones:
            continue
        passed, merged = sum(one.guard.same for one in ones), sum(merges(one, scores, tau) for one in ones)
        scored = [scores[one.pair] for one in ones if one.pair in scores]
        table.add_row(
            f"{'same: ' if ones[0].positive else 'other: '}{kind}",
            str(len(ones)),
            str(passed),
            str(merged),
            f"{merged / len(ones):.2f}",
            str(len(scored)),
            _median([one.published for one in scored]),
            _median([one.ours for one in scored]),
            end_section=kind == POSITIVE_KINDS[-1],
        )
    return table


def controls(
    chosen: Sequence[Judged],
    scores: dict[Pair, Scores],
    others: Sequence[Scores],
    noise: Sequence[Scores],
    tau: float,
) -> Iterable[str]:
    """What shows that the measurement could have failed: the noise, and the scores without the guard."""
    near = [scores[one.pair] for one in chosen if not one.positive]
    yield (
        "noise floor, the same prompt computed twice: "
        f"published >= {min(one.published for one in noise):.6f}, ours >= {min(one.ours for one in noise):.6f}"
    )
    for name, ones in (("that nearly ask the same", near), ("of unrelated problems", others)):
        yield (
            f"negative control, without the guard: of {len(ones)} pairs {name}, "
            f"{sum(one.published >= PUBLISHED_TAU for one in ones)} would be merged by the published score at "
            f"{PUBLISHED_TAU}, {sum(one.ours >= tau for one in ones)} by ours at {tau}; "
            f"medians {_median([one.published for one in ones])} and {_median([one.ours for one in ones])}"
        )


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
