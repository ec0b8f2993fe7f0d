"""Best of N: every sample is verified in place, and the one with the highest score is taken.

What a score is worth hangs on the model; where answers can be compared, a vote (``self_consistency``) may do better.
With ``--early-stop`` samples that cannot change the vote are not started or aborted, and so never verified: one of
them might have had the highest score.
"""

from __future__ import annotations

import argparse
import sys

import sglang as sgl

import rksc_sgl
from programs.asking import SYSTEM, ask
from programs.problems import Problem
from programs.report import Row, row_of
from programs.running import add_early_stop, early_stop_of, options, run


@sgl.function
def solve(s, problem, arguments):
    ask(s, problem.messages(SYSTEM))
    branches = sgl.fork_similar(s, arguments.branches, early_stop=early_stop_of(arguments))
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
    add_early_stop(parser, "off", "off")
    return run("best_of_n_verified", solve_problem, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
