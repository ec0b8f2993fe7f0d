"""The same pipeline without SGLang's frontend: any OpenAI client, options in ``extra_body``."""

from __future__ import annotations

import argparse
import math
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import sglang as sgl

from programs.problems import Problem, phrase
from programs.report import Row
from programs.running import options, run
from rksc_sgl.errors import ServerRefusedError, ServerUnreachableError
from rksc_sgl.frontend.answers import extract_answer, majority

QUESTION = "Is the answer above correct? Reply with YES or NO."


def solve_problem(problem: Problem, arguments: argparse.Namespace) -> Row:
    endpoint = sgl.global_config.default_backend
    client = openai.OpenAI(base_url=f"{endpoint.base_url}/v1", api_key="none", max_retries=0)
    group = uuid.uuid4().hex
    messages = [
        {"role": "system", "content": "You are a careful mathematician."},
        {"role": "user", "content": phrase(problem.question, 0)},
    ]

    def ask(index: int) -> tuple[Any, Any, float]:
        answer = _complete(
            client,
            messages,
            _rksc(group, index, arguments.branches, "branch"),
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
        )
        turns = [
            *messages,
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": QUESTION},
        ]
        verdict = _complete(
            client,
            turns,
            _rksc(group, index, arguments.branches, "verify"),
            max_tokens=1,
            temperature=0.0,
            logprobs=True,
            top_logprobs=20,
        )
        return answer, verdict, _yes_share(verdict)

    try:
        _complete(client, messages, {}, max_tokens=1, temperature=0.0)  # the common prefix, once
        with ThreadPoolExecutor(arguments.branches) as pool:
            replies = list(pool.map(ask, range(arguments.branches)))
    except openai.APIConnectionError as error:
        raise ServerUnreachableError(f"{endpoint.base_url} went away: {error}") from error
    except openai.APIStatusError as error:
        raise ServerRefusedError(f"{endpoint.base_url}: {error}", error.status_code) from error

    texts = [answer.choices[0].message.content or "" for answer, _, _ in replies]
    answers = [extract_answer(text) for text in texts]
    chosen = majority(answers, [yes for _, _, yes in replies]) or 0
    infos = [answer.choices[0].meta_info for answer, _, _ in replies]
    verify_infos = [verdict.choices[0].meta_info for _, verdict, _ in replies]
    verify_new = [info["prompt_tokens"] - info["cached_tokens"] for info in verify_infos]
    return Row(
        problem=problem.id,
        question=problem.question,
        answers=tuple(answers),
        chosen=answers[chosen],
        correct=problem.grade(texts[chosen]),
        prompt_tokens=sum(info["prompt_tokens"] for info in infos),
        cached_tokens=sum(info["cached_tokens"] for info in infos),
        completion_tokens=sum(info["completion_tokens"] for info in infos),
        verify_new_tokens=sum(verify_new),
        verify_new_tokens_max=max(verify_new),
    )


def _rksc(group: str, branch: int, branches: int, op: str) -> dict[str, Any]:
    return {"rksc": {"group": group, "branch": branch, "branches": branches, "op": op}}


def _complete(client: openai.OpenAI, messages: list[dict[str, Any]], custom_params: dict[str, Any], **more: Any) -> Any:
    return client.chat.completions.create(
        model="default",
        messages=messages,  # type: ignore[arg-type]
        extra_body={"custom_params": custom_params, "return_meta_info": True},
        **more,
    )


def _yes_share(verdict: Any) -> float:
    """P(YES) among the alternatives that say yes or no; a half where neither is among the top."""
    masses = {"yes": 0.0, "no": 0.0}
    for one in verdict.choices[0].logprobs.content[0].top_logprobs:
        word = one.token.strip().lower()
        if word in masses:
            masses[word] += math.exp(one.logprob)
    total = sum(masses.values())
    return masses["yes"] / total if total else 0.5


if __name__ == "__main__":
    sys.exit(run("openai_client", solve_problem, options("openai_client", __doc__ or "").parse_args()))
