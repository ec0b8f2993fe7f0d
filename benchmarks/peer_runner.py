"""Runs a user's program on many chats; in the environment that the program needs, so without anything of ours.

The first line on stdin is an object: program, url, chats, warm_up, at_once, samples, max_tokens, temperature. It
answers ``ready`` when the program is loaded and was tried, begins with the next line, and then says seconds, texts and
errors as one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    spec = importlib.util.spec_from_file_location("program", asked["program"])
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def answer(messages: list[dict[str, str]]) -> tuple[str, str]:
        try:
            given = (asked["samples"], asked["max_tokens"], asked["temperature"])
            return program.answer(asked["url"], messages, *given) or "", ""
        except Exception as error:  # of any package: a problem without an answer, and why
            return "", f"{type(error).__name__}: {error}"

    _, error = answer(asked["warm_up"])
    if error:
        sys.exit(error)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    with ThreadPoolExecutor(asked["at_once"]) as pool:
        answers = list(pool.map(answer, asked["chats"]))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "texts": [text for text, _ in answers], "errors": [e for _, e in answers]}))


if __name__ == "__main__":
    main()
