"""What the verification of a fork costs: by separate judge prompts, in place, with exit, with skip and exit.

Problems are GSM8K test items after some worked ones, about a thousand tokens; a fork of eight branches answers each.
Its branches are then verified in every arm, each by :func:`rksc_sgl.verify_gated` as a program calls it:

* judge: problem and answer in a prompt of their own, all at once, on a server with SGLang's default radix tree (the
  same platform and attention as ours);
* in place: the question after the branch's own text, at full depth;
* exit: in place, with the certified exit of scope "selection";
* skip and exit: the certified skip rule too.

All select by score, which is what exits and skips are certified for; the default, a vote, verifies only where that does
not decide.

Before each arm caches are flushed and, for those in place, the branches are prefilled again, as generating them left
them; the order is alternated. The judge runs twice, for the noise. Selections are compared with those of full depth in
place; the judge is another prompt and may select otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sglang as sgl
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from programs.asking import opened
from programs.problems import GSM8K, Problem, load_problems
from rksc_sgl import Endpoint, SkipGate, Verdict, verify_gated
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.verifying.labels import label_logprobs, resolve_labels
from rksc_sgl.verifying.select import by_score, candidates_of

JUDGE, AGAIN, IN_PLACE, EXIT, SKIP = "judge", "judge again", "in place", "exit", "skip and exit"
WORKED = 8  # examples before the problem
LABELS = ("YES", "NO")
JUDGE_PROMPT = "{problem}\n\nProposed answer:\n{answer}\n\nIs the proposed answer correct? Reply with YES or NO."


@dataclass(frozen=True)
class Cost:
    """One fork in one arm.

    Attributes:
        seconds: of its verification.
        new_tokens: prompt tokens that were computed.
        answer: what was selected.
        branch: the selected branch.
        skipped: whether nothing was verified.
    """

    seconds: float
    new_tokens: int
    answer: str | None
    branch: int
    skipped: bool = False


def context(problems: Sequence[Problem]) -> str:
    """Worked examples, the same before every problem."""
    worked = "\n\n".join(f"Problem: {one.question}\nThe answer is {one.reference}." for one in problems)
    return f"Here are some problems with their answers.\n\n{worked}\n\nNow solve this one."


@sgl.function
def answer(s, before: str, problem: Problem, branches: int, tokens: int):
    s += sgl.user(f"{before}\n\nProblem: {problem.question}")
    forks = sgl.fork_similar(s, branches)
    forks += sgl.assistant(sgl.gen("answer", max_tokens=tokens, temperature=0.8))
    forks.join()
    s["forks"] = forks


class Arms:
    """The arms on one fork."""

    def __init__(self, ours: Endpoint, stock: Endpoint, prompt: str, forks: Any) -> None:
        self.ours, self.stock, self.prompt, self.forks = ours, stock, prompt, forks

    def run(self, arm: str) -> Cost:
        if arm in (JUDGE, AGAIN):
            self.stock.flush_cache(wait_s=60.0)
            return self._judge()
        self.ours.flush_cache(wait_s=60.0)
        self._prime()
        calls: dict[str, Callable[[], Verdict]] = {
            IN_PLACE: lambda: verify_gated(self.forks, "answer", skip=SkipGate.never(), select="score", exit="off"),
            EXIT: lambda: verify_gated(self.forks, "answer", skip=SkipGate.never(), select="score"),
            SKIP: lambda: verify_gated(self.forks, "answer", select="score"),
        }
        began = time.perf_counter()
        verdict = calls[arm]()
        seconds = time.perf_counter() - began
        return Cost(seconds, verdict.tokens_spent, verdict.answers[verdict.index], verdict.index, verdict.skipped)

    def _prime(self) -> None:
        """The KV of every branch, as generating it left it: the common prefix once, each branch's own after it."""
        texts = [state.text() for state in self.forks.states]
        for part in (texts[:1], texts[1:]):
            self.ours.post_json("/generate", {"text": part, "sampling_params": {"max_new_tokens": 0}})

    def _judge(self) -> Cost:
        tokens = resolve_labels(LABELS, self.stock.tokenize)
        texts = [state["answer"] for state in self.forks.states]
        template = self.stock.chat_template
        question = [JUDGE_PROMPT.format(problem=self.prompt, answer=text) for text in texts]
        bodies = {
            "text": [opened(template, [{"role": "user", "content": one}]) for one in question],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": [True] * len(texts),
            "token_ids_logprob": [tokens.all_ids] * len(texts),
        }
        began = time.perf_counter()
        responses = self.stock.post_json("/generate", bodies)
        seconds = time.perf_counter() - began
        metas = [response["meta_info"] for response in responses]
        confidences = [state.get_meta_info("answer")["confidence"] for state in self.forks.states]
        best = by_score(candidates_of([tokens.margin(label_logprobs(meta)) for meta in metas], confidences))
        new_tokens = sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
        return Cost(seconds, new_tokens, None, best)


def measure(ours: Endpoint, stock: Endpoint, options: argparse.Namespace) -> list[dict[str, Cost]]:
    """Every problem in its arms; the judge only on the first ones, for it takes most of the time."""
    problems = load_problems(GSM8K, WORKED + options.problems)
    before = context(problems[:WORKED])
    rows = []
    for index, problem in enumerate(tqdm(problems[WORKED:], desc="problems", file=sys.stderr)):
        state = answer.run(
            before=before, problem=problem, branches=options.branches, tokens=options.max_tokens, backend=ours
        )
        arms = Arms(ours, stock, f"{before}\n\nProblem: {problem.question}", state["forks"])
        names = [IN_PLACE, EXIT, SKIP, *([JUDGE, AGAIN] if index < options.judged else [])]
        random.Random(index).shuffle(names)
        rows.append({name: arms.run(name) for name in names})
    return rows


def same(rows: Sequence[dict[str, Cost]], arm: str) -> float:
    """Share of the problems in which an arm selects the answer that full depth in place selects."""
    pairs = [(row[arm], row[IN_PLACE]) for row in rows if arm in row]
    return statistics.fmean(one.branch == full.branch or _equal(one.answer, full.answer) for one, full in pairs)


def _equal(first: str | None, second: str | None) -> bool:
    return first is not None and first == second


def seconds(rows: Sequence[dict[str, Cost]], arm: str) -> float:
    """Seconds of verification over the problems that the judge judged too."""
    return sum(row[arm].seconds for row in rows if JUDGE in row)


def summary(rows: Sequence[dict[str, Cost]]) -> dict[str, Any]:
    """The last line."""
    arms = [JUDGE, IN_PLACE, EXIT, SKIP]
    judge, again = seconds(rows, JUDGE), seconds(rows, AGAIN)
    return {
        "time_fraction": round(seconds(rows, SKIP) / judge, 4),
        "same_selected": round(same(rows, SKIP), 4),
        "new_tokens_per_problem": {
            arm: round(statistics.fmean(row[arm].new_tokens for row in rows if arm in row), 1) for arm in arms
        },
        "time_fraction_in_place": round(seconds(rows, IN_PLACE) / judge, 4),
        "time_fraction_exit": round(seconds(rows, EXIT) / judge, 4),
        "same_selected_exit": round(same(rows, EXIT), 4),
        "skipped": round(statistics.fmean(row[SKIP].skipped for row in rows), 4),
        "noise": round(max(judge, again) / min(judge, again), 3),
        "problems": len(rows),
        "judged": sum(JUDGE in row for row in rows),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"verification of a fork, {result['problems']} problems, {result['judged']} of them judged")
    for column in ("arm", "new tokens", "time of the judge's"):
        table.add_column(column, justify="right")
    fractions = {
        JUDGE: 1.0,
        IN_PLACE: result["time_fraction_in_place"],
        EXIT: result["time_fraction_exit"],
        SKIP: result["time_fraction"],
    }
    for arm, fraction in fractions.items():
        table.add_row(arm, str(result["new_tokens_per_problem"][arm]), f"{fraction:.1%}")
    Console(stderr=True).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.verify_cost", description=__doc__)
    parser.add_argument("--model-path", dest="model", default=DEFAULT_MODEL)
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--judged", type=int, default=8, help="problems on which the judge runs too")
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    if not 1 <= options.judged <= options.problems:
        raise RkscError(f"--judged: must be 1 to --problems = {options.problems}, got {options.judged}")
    stock_arguments = ["--model-path", resolve_model(options.model)]
    with (
        ServerProcess(server_arguments(["--model-path", options.model])) as ours,
        ServerProcess(stock_arguments) as stock,
    ):
        if not ours.get_json("/rksc/info")["schedulers"][0]["exit"]["profiles"]:
            raise RkscError(f"no profile fits {options.model}; make one: rksc calibrate --model-path {options.model}")
        result = summary(measure(Endpoint(ours.url), Endpoint(stock.url), options))
    show(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
