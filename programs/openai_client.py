"""The same without SGLang's frontend: any OpenAI client gets the selected answer of a fork from one request."""

from __future__ import annotations

import argparse
import sys

import openai
import sglang as sgl

from programs.asking import SYSTEM
from programs.openai_errors import server_errors
from programs.problems import Problem
from programs.report import Row, row_of_reply
from programs.running import options, run


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    url = sgl.global_config.default_backend.base_url
    client = openai.OpenAI(base_url=f"{url}/rksc/v1", api_key="none", max_retries=0)
    with server_errors(url):
        reply = client.chat.completions.create(
            model="default",
            messages=problem.messages(SYSTEM),  # type: ignore[arg-type]
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            extra_body={"rksc": {"branches": arguments.branches}},
        )
    return row_of_reply(problem, reply.choices[0].message.content or "", (reply.model_extra or {})["rksc"])


if __name__ == "__main__":
    sys.exit(run("openai_client", solve_problem, options("openai_client", __doc__ or "").parse_args()))
