"""The model that most tests on a server share: a random six-layer Llama, behind a server and in transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.calibration.profile import Profile
from rksc_sgl.calibration.thresholds import CertifiedPoint
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.server_arguments import argument, server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model
from rksc_sgl.testing.eager_blend import EagerLlama

LAYERS, HIDDEN, VOCABULARY = 6, 64, 512
POOL = 20000
TOP = 40  # log-probabilities of an answer
YES, NO = (40, 41), (50,)
SURE = (300, 301, 302, 303)  # the question whose profile lets every verification leave after two layers
SOME = (310, 311, 312)  # the one whose profile lets some leave after three layers, some later, some never
AUDIT_RATE = 0.5

# Each is one server for all tests that use the fixture ``variant``.
VARIANTS = (("--tp", "2"), ("--page-size", "16"), ("--chunked-prefill-size", "64"), ("--disable-overlap-schedule",))


@dataclass(frozen=True)
class SixLayers:
    """The model's files, two profiles for its servers, and the same model in transformers."""

    home: Path

    @classmethod
    def make(cls, home: Path) -> SixLayers:
        write_tiny_model(home / "six-layers", num_hidden_layers=LAYERS)
        model = cls(home)
        for tp_size in (1, 2):
            for profile in (model.sure, model.some):
                served = replace(profile, fingerprint=replace(profile.fingerprint, tp_size=tp_size))
                served.save(model.cache(tp_size) / "rksc" / "profiles" / served.file_name)
        return model

    @property
    def path(self) -> Path:
        return self.home / "six-layers"

    def cache(self, tp_size: int = 1) -> Path:
        """``XDG_CACHE_HOME`` of a server, with the two profiles of that many ranks in it."""
        return self.home / f"cache of {tp_size}"

    @cached_property
    def sure(self) -> Profile:
        always = LinearReadout(_direction() * 0, 3.0, 1.0)
        return self._profile(SURE, {1: always, 2: always, 4: LinearReadout(_direction(), 0.0, 1.0)})

    @cached_property
    def some(self) -> Profile:
        one, other = _direction(), np.roll(_direction(), 1)
        return self._profile(
            SOME, {at: LinearReadout(weight, 0.0, 4.0) for at, weight in {1: one, 3: one, 4: other, 5: other}.items()}
        )

    def _profile(self, question: Sequence[int], readouts: dict[int, LinearReadout]) -> Profile:
        point = CertifiedPoint(0.01, "verdict", 1.0, 0.0, 0.0, 0.5, 100, 100)
        fingerprint = Fingerprint(fingerprint_of_model(self.path), "float32", "none", "auto", "rksc_cpu", 1)
        return Profile(fingerprint, tuple(question), YES, NO, LAYERS, readouts, (point,), 0.05)

    @cached_property
    def oracle(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, attn_implementation="eager").float().eval()

    @cached_property
    def eager(self) -> EagerLlama:
        return EagerLlama(self.oracle)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    def logprobs(self, prompt: Sequence[int]) -> torch.Tensor:
        """``[prompt, vocabulary]`` after each token, at full depth."""
        with torch.no_grad():
            return self.oracle(torch.tensor([list(prompt)])).logits[0].log_softmax(-1)

    def states(self, prompt: Sequence[int]) -> dict[int, np.ndarray]:
        """By layer: the last position with the final norm applied."""
        with torch.no_grad():
            found = self.oracle(torch.tensor([list(prompt)]), output_hidden_states=True).hidden_states
            return {layer: self.oracle.model.norm(found[layer])[0, -1].numpy() for layer in range(1, LAYERS)}

    def margin(self, prompt: Sequence[int]) -> float:
        """Of YES over NO, at full depth."""
        last = self.logprobs(prompt)[-1]
        return float(last[list(YES)].logsumexp(0) - last[list(NO)].logsumexp(0))


def _direction() -> np.ndarray:
    return np.random.default_rng(5).normal(size=HIDDEN).astype(np.float32)


def server_of(
    model: Path, *flags: str, tokens: int = POOL, variables: Mapping[str, str] | None = None
) -> ServerProcess:
    arguments = ["--model-path", str(model), "--max-total-tokens", str(tokens), *flags]
    return ServerProcess(server_arguments(arguments), variables=variables)


@dataclass(frozen=True)
class Served:
    """A server and its tokenizer."""

    process: ServerProcess
    tokenizer: Any

    @classmethod
    def of(cls, process: ServerProcess, model: Path) -> Served:
        from transformers import AutoTokenizer

        return cls(process, AutoTokenizer.from_pretrained(model))

    @property
    def pool(self) -> int:
        """Its KV slots."""
        return int(argument(self.process.args, "--max-total-tokens") or 0)

    @property
    def page(self) -> int:
        return int(argument(self.process.args, "--page-size") or 1)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def flush(self) -> None:
        """Empty the cache, once nothing runs any more."""
        answer = httpx.post(f"{self.process.url}/flush_cache", params={"timeout": 30}, timeout=60.0)
        assert answer.status_code == 200, answer.text

    def post(self, body: dict[str, Any], read: float = 120.0) -> httpx.Response:
        return httpx.post(f"{self.process.url}/generate", json=body, timeout=httpx.Timeout(120.0, read=read))

    def ask(
        self, prompt: str | Sequence[int], options: dict[str, Any] | None = None, tokens: int = 1, **extra: Any
    ) -> Any:
        """The answer with its log-probabilities; the HTTP response where it was refused."""
        ids = self.ids(prompt) if isinstance(prompt, str) else list(prompt)
        body = {"input_ids": ids, "sampling_params": sampling(options, tokens), "return_logprob": True}
        response = self.post({**body, "top_logprobs_num": TOP, **extra})
        return response.json() if response.status_code == 200 else response

    def ask_together(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: Sequence[dict[str, Any] | None],
        tokens: int = 1,
        **extra: Any,
    ) -> list[Any]:
        """In one request, so that they arrive at once."""
        body = {
            "input_ids": [self.ids(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts],
            "sampling_params": [sampling(one, tokens) for one in options],
            "return_logprob": [True] * len(prompts),
            "top_logprobs_num": [TOP] * len(prompts),
            **extra,
        }
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()

    def abort(self, rid: str) -> None:
        """End a request by its id. A client that only goes away is noticed after seconds."""
        httpx.post(f"{self.process.url}/abort_request", json={"rid": rid}, timeout=30.0).raise_for_status()

    def stats(self) -> dict[str, Any]:
        (scheduler,) = self.process.get_json("/rksc/stats?nodes=false")["schedulers"]
        return scheduler

    def total(self, counter: str, **labels: str) -> float:
        """The sum of the series of one of our counters that have these labels."""
        series = self.stats()["counters"][counter]
        return sum(one["value"] for one in series if labels.items() <= one["labels"].items())

    def tree(self) -> dict[str, Any]:
        (scheduler,) = self.process.get_json("/rksc/tree?max_nodes=10000")["schedulers"]
        return scheduler

    def settle(self) -> None:
        """Wait until nothing runs or waits."""
        self.until(lambda: self.stats()["requests"] == {"running": 0, "waiting": 0})
        time.sleep(0.3)  # SGLang checks its pools when it is idle, and ends the process where a slot is lost

    def until(self, condition: Callable[[], bool], seconds: float = 60.0, pause: float = 0.1) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(pause)

    def check_pool(self) -> None:
        """At idle every slot is free, or in the tree, and what is held there is leased to a fork."""
        self.settle()
        stats = self.stats()
        pool, tree = stats["pool"], stats["tree"]
        assert pool["full_available_size"] + tree["evictable_tokens"] + tree["protected_tokens"] == self.pool
        assert tree["protected_tokens"] == pool["full_num_used"] == stats["memory"]["leased_tokens"]
        assert self.process.returncode is None


def sampling(options: dict[str, Any] | None, tokens: int) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return params if options is None else {**params, "custom_params": {"rksc": options}}


def report_of(answer: Any) -> dict[str, Any]:
    return answer["meta_info"]["rksc"]


def logprobs_of(answer: Any) -> dict[int, float]:
    """Of the first generated token."""
    return {token: value for value, token, *_ in answer["meta_info"]["output_top_logprobs"][0]}
