"""Self-consistency: several samples of one prompt, and the answer that most of them give.

Samples whose vote no longer matters are not started, or are aborted.
"""

from __future__ import annotations

import argparse
import sys

import sglang as sgl

import rksc_sgl  # noqa: F401  (adds fork_similar and verify_gated to sgl)
from programs.asking import SYSTEM, ask
from programs.problems import Problem
from programs.report import Row, row_of
from programs.running import add_early_stop, early_stop_of, options, run


@sgl.function
def solve(s, problem, arguments):
    ask(s, problem.messages(SYSTEM))
    branches = sgl.fork_similar(s, arguments.branches, early_stop=early_stop_of(arguments))
    branches += sgl.assistant(sgl.gen("answer", max_tokens=arguments.max_tokens, temperature=arguments.temperature))
    verdict = sgl.verify_gated(branches, "answer", select=arguments.select)
    s["row"] = row_of(problem, branches, verdict, "answer")


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    return solve.run(problem=problem, arguments=arguments)["row"]


def main() -> int:
    parser = options("self_consistency", __doc__ or "")
    parser.add_argument(
        "--select",
        default="vote",
        choices=["vote", "majority", "weighted_majority", "score"],
        help="how the answer is chosen; vote verifies only where votes tie or cannot be compared, majority never",
    )
    add_early_stop(parser, None, "certain with --select vote and majority, else off")
    arguments = parser.parse_args()
    if arguments.early_stop is None:  # scores and weights are of all branches
        arguments.early_stop = "certain" if arguments.select in ("vote", "majority") else "off"
    return run("self_consistency", solve_problem, arguments)


if __name__ == "__main__":
    sys.exit(main())
