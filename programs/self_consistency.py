"""Self-consistency: several samples of one prompt, and the answer that carries most weight."""

from __future__ import annotations

import argparse
import sys

import sglang as sgl

import rksc_sgl  # noqa: F401  (adds fork_similar and verify_gated to sgl)
from programs.problems import Problem, phrase
from programs.report import Row, row_of
from programs.running import options, run


@sgl.function
def solve(s, problem, arguments):
    s += sgl.system("You are a careful mathematician.")
    s += sgl.user(phrase(problem.question, 0))
    branches = sgl.fork_similar(s, arguments.branches)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=arguments.max_tokens, temperature=arguments.temperature))
    verdict = sgl.verify_gated(branches, "answer", select=arguments.select)
    s["row"] = row_of(problem, branches, verdict, "answer")


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    return solve.run(problem=problem, arguments=arguments)["row"]


def main() -> int:
    parser = options("self_consistency", __doc__ or "")
    parser.add_argument(
        "--select",
        default="weighted_majority",
        choices=["weighted_majority", "majority", "score"],
        help="how the answer is chosen; majority does without verification",
    )
    return run("self_consistency", solve_problem, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
