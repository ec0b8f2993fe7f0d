"""One problem in several wordings: the branches begin differently and talk about the same thing."""

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
    wordings = [sgl.user(phrase(problem.question, index)) for index in range(arguments.branches)]
    branches = sgl.fork_similar(s, wordings)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=arguments.max_tokens, temperature=arguments.temperature))
    verdict = sgl.verify_gated(branches, "answer")
    s["row"] = row_of(problem, branches, verdict, "answer")


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    return solve.run(problem=problem, arguments=arguments)["row"]


if __name__ == "__main__":
    sys.exit(run("many_phrasings", solve_problem, options("many_phrasings", __doc__ or "").parse_args()))
