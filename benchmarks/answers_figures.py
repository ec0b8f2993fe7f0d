"""What recorded answers say: pairs of one branch in two arms, and what verification is worth.

Branches of one problem are not independent, so every interval is a bootstrap over problems (10,000 resamples with one
seed, 2.5th and 97.5th percentile). McNemar's test takes pairs as independent: its p is too small, if anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.answers_arms import AGAIN, BLEND, EXACT, MERGE, Branch, Solved
from rksc_sgl.answers import classes_of, majority
from rksc_sgl.calibration.risk_control import clopper_pearson_upper
from rksc_sgl.similarity.gate import auc

COMPARED = (BLEND, MERGE, AGAIN)  # arms that are compared with the exact one
RESAMPLES = 10_000
NO_REASON = "no reason given"

Value = Callable[[Branch], float | None]


@dataclass(frozen=True)
class Pair:
    """One branch in the exact arm and in another.

    Attributes:
        problem: the place of its problem.
    """

    problem: int
    exact: Branch
    other: Branch


def summary(rows: Sequence[Solved]) -> dict[str, Any]:
    """The figures of these problems; what there is too little for is null."""
    return {
        "problems": len(rows),
        **{arm: compared(rows, arm) for arm in COMPARED if any(arm in row.arms for row in rows)},
        "verification": verification(rows),
    }


# --- one arm beside the exact one -------------------------------------------------------------------------------------


def compared(rows: Sequence[Solved], arm: str) -> dict[str, Any]:
    """Pairs of the branches that the arm did something about; of the exact arm again all but the first."""
    found = pairs(rows, arm)
    others = [branch for row in rows if arm in row.arms for branch in row.arms[arm].branches[1:]]
    computed, computed_exact = sum(pair.other.computed for pair in found), sum(pair.exact.computed for pair in found)
    declined = Counter(one.declined or NO_REASON for one in others if not fired(one, arm))
    return {
        "branches": len(others),
        "pairs": len(found),
        "problems": len({pair.problem for pair in found}),
        "declined": dict(declined.most_common()),
        **right_answers(found),
        **sameness(found),
        "computed_fraction": _ratio(computed, computed_exact),
        "judge": judge(rows, found, arm),
    }


def fired(branch: Branch, arm: str) -> bool:
    """Whether an arm did to a branch what it is about, by the server's report."""
    return branch.shared == (arm if arm in (BLEND, MERGE) else EXACT)


def pairs(rows: Sequence[Solved], arm: str) -> list[Pair]:
    """The branches after the first that an arm did something about, in the exact arm and in that."""
    return [
        Pair(place, exact, other)
        for place, row in enumerate(rows)
        if arm in row.arms
        for exact, other in list(zip(row.arms[EXACT].branches, row.arms[arm].branches, strict=True))[1:]
        if fired(other, arm)
    ]


def right_answers(found: Sequence[Pair]) -> dict[str, Any]:
    """Who is right in which arm, and whether one arm is right more often.

    The interval of the difference is a point where all pairs are alike, which says nothing. Then there is still
    ``losing_problems_upper95``: the share of problems in which a right answer is lost is no more, with 95% confidence.
    """
    counts = Counter((pair.exact.right, pair.other.right) for pair in found)
    lost, won = counts[True, False], counts[False, True]
    by_problem = _by_problem(found, lambda pair: pair.other.right - pair.exact.right)
    losing = {pair.problem for pair in found if pair.exact.right and not pair.other.right}
    problems = len(by_problem)
    return {
        "both": counts[True, True],
        "lost": lost,
        "won": won,
        "neither": counts[False, False],
        "accuracy_exact": _ratio(counts[True, True] + lost, len(found)),
        "accuracy": _ratio(counts[True, True] + won, len(found)),
        "difference": _ratio(won - lost, len(found)),
        "interval": ratio_interval([sum(one) for one in by_problem], [len(one) for one in by_problem]),
        "mcnemar_p": mcnemar(lost, won) if found else None,
        "losing_problems": len(losing),
        "losing_problems_upper95": round(clopper_pearson_upper(len(losing), problems), 4) if problems else None,
    }


def sameness(found: Sequence[Pair]) -> dict[str, Any]:
    """How often the pairs' texts are equal, and their answers where at least one of them has an answer."""
    answers = [(pair.exact.answer, pair.other.answer) for pair in found]
    answered = [one for one in answers if any(one)]
    return {
        "equal_texts": _ratio(sum(pair.exact.text == pair.other.text for pair in found), len(found)),
        "equal_answers": _ratio(sum(same_answers(*one) for one in answered), len(answered)),
        "answered_pairs": len(answered),
    }


def same_answers(one: str | None, other: str | None) -> bool:
    """Whether two branches give one answer."""
    return one is not None and len(set(classes_of([one, other]))) == 1


def judge(rows: Sequence[Solved], found: Sequence[Pair], arm: str) -> dict[str, Any]:
    """How often verification says the same in both arms.

    Of blends only verifications count that read blended KV, by the server's report. A judge that says YES of everything
    says the same in both: ``yes_exact`` is how often it does. Selections are those of the problems that have a pair;
    they are among all branches, also those about which nothing was done.
    """
    read = [pair for pair in found if arm != BLEND or pair.other.judged == BLEND]
    verified = [pair for pair in read if pair.exact.p_yes is not None and pair.other.p_yes is not None]
    alike = [pair for pair in verified if pair.exact.text == pair.other.text]
    forks = [(rows[place].arms[EXACT], rows[place].arms[arm]) for place in sorted({pair.problem for pair in found})]
    forks = [pair for pair in forks if all(fork.selected is not None for fork in pair)]
    answered = [answers for answers in ((one.best_answer, other.best_answer) for one, other in forks) if any(answers)]
    return {
        "judged_on_exact_kv": sum(pair.other.judged == EXACT for pair in found) if arm == BLEND else 0,
        "verdicts": len(verified),
        "equal_verdicts": _ratio(sum(map(_same_verdict, verified)), len(verified)),
        "verdicts_on_equal_texts": len(alike),
        "equal_verdicts_on_equal_texts": _ratio(sum(map(_same_verdict, alike)), len(alike)),
        "yes_exact": _ratio(sum(_says_yes(pair.exact) for pair in verified), len(verified)),
        "selections": len(forks),
        "equal_selections": _ratio(sum(one.selected == other.selected for one, other in forks), len(forks)),
        "equal_selected_answers": _ratio(sum(same_answers(*one) for one in answered), len(answered)),
        "answered_selections": len(answered),
    }


def _same_verdict(pair: Pair) -> bool:
    return _says_yes(pair.exact) == _says_yes(pair.other)


def _says_yes(branch: Branch) -> bool:
    return branch.p_yes is not None and branch.p_yes > 0.5


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test, two-sided: that a pair that differs is lost as likely as won."""
    return 1.0 if lost + won == 0 else round(float(binomtest(lost, lost + won, 0.5).pvalue), 5)


# --- what verification is worth ---------------------------------------------------------------------------------------


def verification(rows: Sequence[Solved]) -> dict[str, Any]:
    """On the exact arm: how right each way to take one answer is, and what tells right branches from wrong ones."""
    forks = [row.arms[EXACT] for row in rows]
    branches = [branch for fork in forks for branch in fork.branches]
    masses = [branch.mass for branch in branches if branch.mass is not None]
    return {
        "accuracy": {
            "sample": of_problems([_mean([branch.right for branch in fork.branches]) for fork in forks]),
            "majority": of_problems([_voted(fork.branches, weighted=False) for fork in forks]),
            "weighted_majority": of_problems([_voted(fork.branches, weighted=True) for fork in forks]),
            "best_score": of_problems([fork.best is not None and fork.best.right for fork in forks]),
            "any": of_problems([any(branch.right for branch in fork.branches) for fork in forks]),
        },
        "branches": len(branches),
        "verified": sum(branch.p_yes is not None for branch in branches),
        "auc": _auc(branches, _p_yes),
        "auc_within": {
            "p_yes": of_problems(within(rows, lambda fork: _p_yes)),
            "votes": of_problems(within(rows, _votes_among)),
            "short": of_problems(within(rows, lambda fork: lambda branch: -float(branch.tokens))),
        },
        "label_mass": _rounded(_mean(masses)) if masses else None,
    }


def within(rows: Sequence[Solved], value_in: Callable[[Sequence[Branch]], Value]) -> list[float]:
    """The AUC of a value within each problem that has right and wrong branches.

    Args:
        value_in: given the branches of a problem, the value of each; None leaves a branch out.
    """
    forks = [row.arms[EXACT].branches for row in rows]
    found = [_auc(branches, value_in(branches)) for branches in forks]
    return [one for one in found if one is not None]


def of_problems(values: Sequence[float]) -> dict[str, Any]:
    """The mean of one value a problem, its interval, and of how many problems it is."""
    return {
        "mean": _rounded(_mean(values)) if values else None,
        "interval": ratio_interval(values, [1] * len(values)),
        "n": len(values),
    }


def _voted(branches: Sequence[Branch], *, weighted: bool) -> bool:
    """Whether the first branch with the answer of most votes is right; no answer is a wrong one."""
    weights = [branch.p_yes or 0.0 for branch in branches] if weighted else None
    place = majority([branch.answer for branch in branches], weights)
    return place is not None and branches[place].right


def _votes_among(branches: Sequence[Branch]) -> Value:
    names = classes_of([branch.answer for branch in branches])
    votes = Counter(name for name in names if name is not None)
    of = {id(branch): votes[name] if name is not None else 0 for branch, name in zip(branches, names, strict=True)}
    return lambda branch: float(of[id(branch)])


def _p_yes(branch: Branch) -> float | None:
    return branch.p_yes


def _auc(branches: Sequence[Branch], value: Value) -> float | None:
    """Chance that a right branch has more of a value than a wrong one; None where one of the two is missing."""
    valued = [(branch.right, number) for branch in branches if (number := value(branch)) is not None]
    right, wrong = ([number for is_right, number in valued if is_right is side] for side in (True, False))
    return round(auc(right, wrong), 4) if right and wrong else None


# --- arithmetic -------------------------------------------------------------------------------------------------------


def ratio_interval(sums: Sequence[float], counts: Sequence[float]) -> list[float] | None:
    """95% interval of the ratio of two sums over problems, by bootstrap; None with fewer than two problems."""
    if len(sums) < 2:
        return None
    picked = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    ratios = np.asarray(sums, dtype=float)[picked].sum(axis=1) / np.asarray(counts, dtype=float)[picked].sum(axis=1)
    return [round(float(np.quantile(ratios, level)), 4) for level in (0.025, 0.975)]


def _by_problem(found: Sequence[Pair], value: Callable[[Pair], float]) -> list[list[float]]:
    values: dict[int, list[float]] = {}
    for pair in found:
        values.setdefault(pair.problem, []).append(value(pair))
    return list(values.values())


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _rounded(value: float) -> float:
    return round(value, 4)
