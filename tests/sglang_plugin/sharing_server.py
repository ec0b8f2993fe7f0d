"""What the tests of merges, cache scope and faults have in common: problems in two wordings, and a served model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.server_process import ServerProcess

TOP = 40
POOL = 8000
NAMES = ("Anna", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
THINGS = ("cows", "hens", "books", "lamps", "coins", "boats", "roses", "chairs")
SPELLED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def problem(seed: int, *, changed: bool = False, sentences: int = 6) -> str:
    """A word problem in digits; ``changed`` has another number in the middle."""
    source = random.Random(seed)
    told = []
    for index in range(sentences):
        name, thing, count = source.choice(NAMES), source.choice(THINGS), source.randint(2, 11)
        count += changed and index == sentences // 2
        told.append(f"{name} has {count} {thing} and sells {source.randint(2, 11)} of the {thing}.")
    return " ".join([*told, f"How many {source.choice(THINGS)} does {source.choice(NAMES)} have now?"])


def reworded(text: str, start: str = "Think step by step. ") -> str:
    """The same problem with its numbers in words, without articles, and under an instruction."""
    words = [SPELLED[int(word)] if word.isdigit() else word for word in text.split() if word != "the"]
    return start + " ".join(words)


def branch(group: str | None, index: int = 0, **options: Any) -> dict[str, Any]:
    named = {} if group is None else {"group": group, "branch": index, "branches": 64}
    return {**named, "share": "merge", "tau": -1.0, **options}


@dataclass(frozen=True)
class Served:
    """A server and its tokenizer."""

    process: ServerProcess
    tokenizer: Any

    @classmethod
    def of(cls, process: ServerProcess, model: Path) -> Served:
        return cls(process, AutoTokenizer.from_pretrained(model))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def flush(self) -> None:
        assert httpx.post(f"{self.process.url}/flush_cache", timeout=30.0).status_code == 200

    def post(self, body: dict[str, Any], read: float = 120.0) -> httpx.Response:
        return httpx.post(f"{self.process.url}/generate", json=body, timeout=httpx.Timeout(120.0, read=read))

    def ask(
        self, prompt: str | Sequence[int], options: dict[str, Any] | None = None, tokens: int = 1, **extra: Any
    ) -> Any:
        ids = self.ids(prompt) if isinstance(prompt, str) else list(prompt)
        body = {"input_ids": ids, "sampling_params": sampling(options, tokens), "return_logprob": True}
        response = self.post({**body, "top_logprobs_num": TOP, **extra})
        return response.json() if response.status_code == 200 else response

    def ask_together(
        self, prompts: Sequence[str], options: Sequence[dict[str, Any] | None], tokens: int = 1
    ) -> list[Any]:
        """In one request, so that they arrive at once."""
        body = {
            "input_ids": [self.ids(prompt) for prompt in prompts],
            "sampling_params": [sampling(one, tokens) for one in options],
            "return_logprob": [True] * len(prompts),
            "top_logprobs_num": [TOP] * len(prompts),
        }
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()

    def stats(self) -> dict[str, Any]:
        (scheduler,) = self.process.get_json("/rksc/stats")["schedulers"]
        return scheduler

    def tree(self) -> dict[str, Any]:
        (scheduler,) = self.process.get_json("/rksc/tree?max_nodes=10000")["schedulers"]
        return scheduler

    def settle(self) -> None:
        """Wait until nothing runs or waits."""
        self.until(lambda: self.stats()["requests"] == {"running": 0, "waiting": 0})
        time.sleep(0.3)  # SGLang checks its pools when it is idle, and ends the process where a slot is lost

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.1)

    def check_pool(self, total: int) -> None:
        """At idle every slot is free, or in the tree and evictable."""
        self.settle()
        stats = self.stats()
        pool, tree = stats["pool"], stats["tree"]
        assert pool["full_available_size"] + tree["evictable_tokens"] + tree["protected_tokens"] == total
        assert tree["protected_tokens"] == 0
        assert pool["full_num_used"] == 0
        assert self.process.returncode is None


def sampling(options: dict[str, Any] | None, tokens: int) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return params if options is None else {**params, "custom_params": {"rksc": options}}


def report_of(answer: Any) -> dict[str, Any]:
    return answer["meta_info"]["rksc"]


def logprobs_of(answer: Any) -> dict[int, float]:
    return {token: value for value, token, *_ in answer["meta_info"]["output_top_logprobs"][0]}


def server_of(model: Path, *flags: str, tokens: int = POOL) -> ServerProcess:
    return ServerProcess(server_arguments(["--model-path", str(model), "--max-total-tokens", str(tokens), *flags]))
