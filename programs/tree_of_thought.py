"""Tree of thought: fork the next step, score each in place, keep the best few, go deeper."""

from __future__ import annotations

import argparse
import sys

import sglang as sgl

import rksc_sgl
from programs.problems import Problem
from programs.report import Row, row_of
from programs.running import options, run

STEP_QUESTION = "Is the reasoning so far correct and useful? Reply with {labels}."


@sgl.function
def solve(s, problem, arguments):
    s += sgl.system("You solve problems one step at a time.")
    s += sgl.user(f"{problem.question}\nWrite only the next step of the solution when asked.")
    kept = [s]
    for depth in range(arguments.depth):
        var = f"step_{depth}"
        scored = []
        for state in kept:
            branches = sgl.fork_similar(state, max(2, arguments.branches // len(kept)))
            branches += sgl.assistant(sgl.gen(var, max_tokens=arguments.step_tokens, temperature=arguments.temperature))
            # Steps are no answers that could be voted on: their scores are all there is to go by.
            verdict = sgl.verify_gated(
                branches, var, question=STEP_QUESTION, skip=rksc_sgl.SkipGate.never(), select="score"
            )
            scored += [
                (score, branch)
                for score, branch in zip(verdict.scores, branches.states, strict=True)
                if score is not None
            ]
        scored.sort(key=lambda pair: -pair[0])
        kept = [branch for _, branch in scored[: arguments.keep]]
        for branch in kept:
            branch += sgl.user("Go on." if depth + 1 < arguments.depth else "Now give the final answer as one number.")
    leaves = sgl.fork_similar(kept[0], arguments.keep)
    leaves += sgl.assistant(sgl.gen("answer", max_tokens=arguments.max_tokens, temperature=arguments.temperature))
    verdict = sgl.verify_gated(leaves, "answer")
    s["row"] = row_of(problem, leaves, verdict, "answer")


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    return solve.run(problem=problem, arguments=arguments)["row"]


def main() -> int:
    parser = options("tree_of_thought", __doc__ or "")
    parser.add_argument("--depth", type=int, default=2, help="steps before the answer")
    parser.add_argument("--keep", type=int, default=2, help="thoughts that are kept at each depth")
    parser.add_argument("--step-tokens", type=int, default=32, help="tokens of one step at most")
    return run("tree_of_thought", solve_problem, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
