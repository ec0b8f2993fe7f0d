"""Best of N: every sample is verified in place, and the one with the highest score is taken."""

from __future__ import annotations

import argparse
import sys

import sglang as sgl

import rksc_sgl
from programs.problems import Problem, phrase
from programs.report import Row, row_of
from programs.running import options, run


@sgl.function
def solve(s, problem, arguments):
    s += sgl.system("You are a careful mathematician.")
    s += sgl.user(phrase(problem.question, 0))
    branches = sgl.fork_similar(s, arguments.branches)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=arguments.max_tokens, temperature=arguments.temperature))
    skip = rksc_sgl.SkipGate.published() if arguments.skip == "published" else rksc_sgl.SkipGate.never()
    verdict = sgl.verify_gated(branches, "answer", skip=skip, select="score")
    s["row"] = row_of(problem, branches, verdict, "answer")


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    return solve.run(problem=problem, arguments=arguments)["row"]


def main() -> int:
    parser = options("best_of_n_verified", __doc__ or "")
    parser.add_argument(
        "--skip",
        default="never",
        choices=["never", "published"],
        help="published: no verification where one branch is confident and leads (uncertified)",
    )
    return run("best_of_n_verified", solve_problem, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
