"""Does everything work on this machine? One server an attention backend, every capability, one line of JSON each.

For a machine with an accelerator; ``--platform cpu`` runs the same checks on the CPU platform. Without ``--model-path``
a random model of Llama's shape is served, whose weights are of a scale at which attention sees its context: enough to
say whether the machinery works, not what a blend costs in meaning. With ``--model-path`` the last check is ``rksc
prove``, on real text.

In float32 what is equal is equal to rounding. In 16 bits it is near, and every comparison stands beside a control: how
far the answer to other words is. The certificate of the exits is made by hand, of random read-outs, so that
verifications leave at several layers whatever the model; it certifies nothing.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.metadata
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from rksc_sgl import metrics
from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.calibration.profile import Profile
from rksc_sgl.calibration.thresholds import CertifiedPoint
from rksc_sgl.cli.prove import prove_server
from rksc_sgl.cli.serve import problems_in
from rksc_sgl.cpu_platform import PLATFORM_NAME, accelerator_present
from rksc_sgl.early_exit.certainty import CONFIRMATION
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import RkscError
from rksc_sgl.exit_settings import PROFILE_VARIABLE, TRACE_VARIABLE
from rksc_sgl.model_fetch import resolve_model
from rksc_sgl.options import KEY
from rksc_sgl.placement.worth import PASS_TOKENS_VARIABLE
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.support.offers import ALLOW_VARIABLE

BACKENDS = {"gpu": ("triton", "fa3", "flashinfer"), "cpu": ("rksc_cpu", "torch_native")}
DTYPES = {"gpu": "bfloat16", "cpu": "float32"}
SHAPES: dict[str, dict[str, Any]] = {
    "gpu": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 8192,
        "initializer_range": 0.05,
    },
    "cpu": {"num_hidden_layers": 6},
}
WATCHED = 200  # tokens whose log-probabilities are compared
BRANCHES = 8
PAGE = 64  # the largest page that the checks allow for
FLOOR = 2e-3  # distance of log-probabilities that is rounding in float32
OF_CONTROL = {"float32": 0.0}  # share of the control's distance that is allowed; by number type
OF_CONTROL_16 = 0.05
QUESTION = (110, 111, 112)  # the verification's, as tokens
YES, NO = (40, 41), (50,)
CHECKED = 12  # verifications in one batch
LOAD = 60  # requests of the mixed load
LEAVING = 512  # tokens that a client asks for which does not wait for them
DONOR = (
    "Anna has 7 cows and sells 5 of the cows. Boris has 11 hens and sells 4 of the hens. Clara has 9 books and sells 2 "
    "of the books. Dmitri has 8 lamps and sells 3 of the lamps. Elena has 6 coins and sells 10 of the coins. Felix has "
    "4 boats and sells 2 of the boats. How many hens does Boris have now?"
)
SAME = (
    "Think step by step. Anna has seven cows and sells five of the cows. Boris has eleven hens and sells four of the "
    "hens. Clara has nine books and sells two of the books. Dmitri has eight lamps and sells three of the lamps. Elena "
    "has six coins and sells ten of the coins. Felix has four boats and sells two of the boats. How many hens does "
    "Boris have now?"
)


class CheckFailed(Exception):
    """A check did not hold."""


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        vocabulary, hidden, layers: of its ``config.json``.
        is_trained: whether it is more than random weights, so that it makes something of a text.
    """

    path: Path
    vocabulary: int
    hidden: int
    layers: int
    is_trained: bool = False

    @classmethod
    def at(cls, path: Path, *, is_trained: bool = False) -> Model:
        config = json.loads((path / "config.json").read_text())
        config = config.get("text_config", config)
        return cls(path, config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], is_trained)


class Checks:
    """The checks of one running server, and what they found."""

    def __init__(self, server: ServerProcess, model: Model, profile: Profile, dtype: str) -> None:
        self.server, self.model, self.profile = server, model, profile
        self.of_control = OF_CONTROL.get(dtype, OF_CONTROL_16)
        self.watched = sorted(random.Random(0).sample(range(model.vocabulary), min(WATCHED, model.vocabulary)))
        self.found: dict[str, Any] = {}

    @property
    def all(self) -> list[Callable[[], None]]:
        """All checks of this server, in order."""
        return [
            *(self.hooks, self.fork, self.blend_of_nothing, self.blend, self.merge),
            *(self.published_exit, self.certified_exits, self.load, self.slots),
            *((self.prove,) if self.model.is_trained else ()),
        ]

    def run(self) -> list[str]:
        """Run all checks, in order; what did not hold. Those after the server's end are left out."""
        failed = []
        seconds = self.found["seconds"] = {}
        for check in self.all:
            began = time.monotonic()
            try:
                check()
            except (CheckFailed, httpx.HTTPError, LookupError, RkscError, TypeError, ValueError) as error:
                failed.append(f"{check.__name__}: {type(error).__name__}: {error}")
            seconds[check.__name__] = round(time.monotonic() - began, 2)
            if self.server.returncode is not None:
                failed.append(f"{check.__name__}: the server ended; its last words:\n{self.server.log_tail(12)}")
                break
        return failed

    def hooks(self) -> None:
        """Every hook is in place in the live processes."""
        info = self.server.get_json("/rksc/info")
        state = info["schedulers"][0] or {}
        self.found |= {"platform": info["platform"], "attention": state.get("attention_backend")}
        _expect(not problems_in(info), f"/rksc/info: {problems_in(info)}")

    def fork(self) -> None:
        """Branches of one prompt that arrive together compute it once."""
        self._flush()
        prompt = self._words(2, 512)
        options = [{"group": "fork", "branch": index, "branches": BRANCHES} for index in range(BRANCHES)]
        answers = self._post(input_ids=[prompt] * BRANCHES, sampling_params=[_sampling(one, 8) for one in options])
        metas = [answer["meta_info"] for answer in answers]
        computed = sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
        self.found["fork_tokens_computed"] = computed
        _expect(computed <= len(prompt) + PAGE * BRANCHES, f"{computed} tokens were computed for {len(prompt)}")
        _expect(all(meta[KEY]["mode"] == "exact" for meta in metas), "a fork of one prompt must be exact")

    def blend_of_nothing(self) -> None:
        """A blend that computes every token is the exact prefill."""
        donor, prompt = self._blended()
        exact, allowed = self._exact(prompt)
        self._flush()
        everything = {"recompute": 1.0, "deviation": 1e-9}  # all that moved at all
        answer = self._blend(donor, prompt, "nothing", **everything)
        _expect(answer["meta_info"][KEY]["taken_tokens"] == 0, "recompute 1.0 must take nothing over")
        self.found["blend_of_nothing"] = {"distance": _distance(exact, answer), "allowed": allowed}
        self._near(answer, exact, allowed, "a blend that computes everything")

    def blend(self) -> None:
        """A blend takes most over and is nearer to the exact prefill than other words are; others never meet it."""
        donor, prompt = self._blended()
        exact, allowed = self._exact(prompt)
        control = self._control(prompt, exact)
        self._flush()
        answer = self._blend(donor, prompt, "some")
        report = answer["meta_info"][KEY]
        after = self._ask(prompt)
        self.found["blend"] = {
            **{name: report[name] for name in ("taken_tokens", "computed_tokens", "similarity")},
            "distance": _distance(exact, answer),
            "control": control,
        }
        _expect(
            report["taken_tokens"] > len(prompt) / 2, f"of {len(prompt)} equal tokens {report['taken_tokens']} taken"
        )
        _expect(_distance(exact, answer) < control, "a blend is as far from the exact prefill as other words")
        _expect(KEY not in after["meta_info"], "a report for a request that did not opt in")
        self._near(after, exact, allowed, "a request that did not opt in, after a blend")

    def merge(self) -> None:
        """A prompt that asks the same goes on as its donor's; a changed number does not."""
        self._flush()
        exact = self._ask(DONOR)
        allowed = self._allowed(self._control(SAME, exact))
        self._flush()
        options = {"group": "merge", "branches": 4, "share": "merge", "tau": -1.0}
        self._ask(DONOR, {**options, "branch": 0}, 4)
        merged = self._ask(SAME, {**options, "branch": 1})
        other = self._ask(SAME.replace("eleven", "twelve"), {**options, "branch": 2})
        report = merged["meta_info"][KEY]
        self.found["merge"] = {"distance": _distance(exact, merged), "allowed": allowed, "mode": report["mode"]}
        _expect(report["mode"] == "merge", f"{report}")
        self._near(merged, exact, allowed, "a merged branch")
        _expect(other["meta_info"][KEY]["mode"] == "exact", "a prompt with another number was merged")

    def published_exit(self) -> None:
        """The published rule leaves where it is told to be certain of everything, and nowhere where of nothing."""
        prompts = [self._words(900 + seed, 40) for seed in range(4)]
        loose = {"op": "verify", "exit": "published", "theta": 100.0, "eps": 100.0, "yes_ids": YES, "no_ids": NO}
        layers = [one["layer"] for one in self._verify(prompts, loose)]
        strict = [one["layers_saved"] for one in self._verify(prompts, {**loose, "theta": 1e-6})]
        self.found["published_exit_layers"] = layers
        _expect(all(layer < self.model.layers for layer in layers), f"layers {layers} of {self.model.layers}")
        _expect(not any(strict), f"{strict} layers were saved without certainty")

    def certified_exits(self) -> None:
        """A batch leaves at several layers, each at the one that its states say, beside requests that are untouched."""
        prompts = [[*self._words(100 + seed, 24 + seed), *QUESTION] for seed in range(CHECKED)]
        plain = [self._words(200 + seed, 30) for seed in range(4)]
        self._flush()
        alone = [self._ask(prompt) for prompt in plain]
        traced = self._verify(prompts, {"op": "verify", "exit": "off", "trace": list(self.profile.readouts)})
        expected = [self._leaves_at(report) for report in traced]
        self._flush()
        verify = {"op": "verify"}
        answers = self._together([*prompts, *plain], [*[verify] * CHECKED, *[None] * len(plain)])
        reports = [answer["meta_info"][KEY]["exit"] for answer in answers[:CHECKED]]
        levels = [report["layer"] for report in reports]
        self.found["certified_exit_layers"] = levels
        _expect(len(set(levels)) > 1, f"all leave at one layer: {levels}")
        for report, right in zip(reports, expected, strict=True):
            _expect(report["layer"] in right, f"left at layer {report['layer']}, its states say {sorted(right)}")
        for answer, before, other in zip(answers[CHECKED:], alone, [*alone[1:], alone[0]], strict=True):
            allowed = self._allowed(_distance(before, other))
            self._near(answer, before, allowed, "an ordinary request beside verifications")

    def load(self) -> None:
        """Requests of all kinds at once, some of which are aborted: each is answered as what it asked for."""
        self._flush()
        material, before = self._words(7, 300), self._aborted()
        with ThreadPoolExecutor(20) as pool:
            modes = list(pool.map(lambda index: self._one_of_many(index, material), range(LOAD)))
        self.found["load"] = {mode: modes.count(mode) for mode in sorted(set(modes))}
        _expect(0 < modes.count("gone") < LOAD / 2, f"{modes.count('gone')} of {LOAD} clients went away")
        _expect(modes.count("merge") > 0, "no branch was merged beside the others")
        self._until(lambda: self._aborted() > before, "no request was aborted in the middle")

    def slots(self) -> None:
        """When all is done no slot is lost, and the server still answers."""
        busy = ("num_running_reqs", "num_waiting_reqs")
        self._until(lambda: not any(self._loads()[name] for name in busy), "requests never end")
        self._flush()
        used = self._loads()["num_used_tokens"]
        _expect(used == 0, f"{used} KV slots are lost")
        time.sleep(1.5)  # SGLang checks its pools when it is idle, and ends where a slot is lost
        self._ask(self._words(3, 20))

    def prove(self) -> None:
        """``rksc prove`` on this server: real text, of which a model with random weights makes nothing."""
        proof = prove_server(self.server.url).proof
        self.found["prove"] = proof.verdict
        _expect(proof.proven, proof.verdict)

    def _blended(self) -> tuple[list[int], list[int]]:
        """A donor and a prompt with the same material after other words, one token of it changed."""
        material = self._words(3, 900)
        changed = [*material[:400], (material[400] + 1) % self.model.vocabulary, *material[401:]]
        return [*self._words(4, 40), *material], [
            *self._words(5, 61),
            *changed[:600],
            *self._words(6, 9),
            *changed[600:],
        ]

    def _blend(self, donor: list[int], prompt: list[int], name: str, **more: Any) -> Any:
        options = {"group": f"blend {name}", "branches": 4, "share": "blend", **more}
        self._ask(donor, {**options, "branch": 0})
        answer = self._ask(prompt, {**options, "branch": 1})
        report = answer["meta_info"][KEY]
        _expect(report["mode"] == "blend", f"{report}")
        return answer

    def _exact(self, prompt: Any) -> tuple[Any, float]:
        """The answer from a flushed cache, and the distance from it that is allowed."""
        self._flush()
        exact = self._ask(prompt)
        return exact, self._allowed(self._control(prompt, exact))

    def _control(self, prompt: Any, exact: Any) -> float:
        """How far the answer to other words is that end as these do."""
        length = exact["meta_info"]["prompt_tokens"]
        last = prompt[-1] if isinstance(prompt, list) else 1
        return _distance(exact, self._ask([*self._words(8, length - 1), last]))

    def _allowed(self, control: float) -> float:
        return round(max(FLOOR, self.of_control * control), 6)

    def _near(self, answer: Any, exact: Any, allowed: float, what: str) -> None:
        distance = _distance(exact, answer)
        _expect(distance <= allowed, f"{what} is {distance} from the exact prefill, {allowed} allowed")

    def _verify(self, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[dict[str, Any]]:
        answers = self._together(prompts, [options] * len(prompts))
        return [answer["meta_info"][KEY]["exit"] for answer in answers]

    def _leaves_at(self, report: dict[str, Any]) -> set[int]:
        """Layers at which a verification may leave by its own states: one, or two where a threshold is near."""
        layers = report["trace_layers"]
        states = np.frombuffer(base64.b64decode(report["trace"]), "<f4").reshape(len(layers), -1)
        near = 1e-3 if not self.of_control else 0.1  # of the error scale: what 16 bits may move a margin
        possible, before = set(), 0.0
        for layer, state in zip(layers, states, strict=True):
            readout = self.profile.readouts[layer]
            margin = float(readout.predict(state[None])[0])
            lack = max(readout.scale - abs(margin), CONFIRMATION * readout.scale - np.sign(margin) * before)
            if lack < near * readout.scale:
                possible.add(layer)
            if lack < -near * readout.scale:
                return possible
            before = margin
        return {*possible, self.model.layers}

    def _one_of_many(self, index: int, material: list[int]) -> str:
        """One request of the load; its mode, "plain" where it did not opt in, "gone" where it was aborted."""
        fork = {"branch": index % 16, "branches": 16}
        kinds: list[dict[str, Any] | None] = [
            None,
            {"group": "load", **fork},
            {"group": "load blend", "share": "blend", **fork},
            {"group": "load merge", "share": "merge", "tau": -1.0, **fork},
            {"group": "load exact", "share": "exact", **fork},
            {"op": "verify"},
            {"op": "verify", "exit": "published", "theta": 100.0, "eps": 100.0, "yes_ids": YES, "no_ids": NO},
        ]
        options = kinds[index % len(kinds)]
        verification = options is not None and options.get("op") == "verify"
        leaves = index % 5 == 3  # before it has its answer, unless that is one token
        tokens = 1 if verification else LEAVING if leaves else 1 + index * 3 % 24
        words = [*self._words(300 + index % 8, 20 + index % 7), *material, *(QUESTION if verification else ())]
        merging = options is not None and options.get("share") == "merge"
        prompt = {"text": (DONOR, SAME)[index % 2]} if merging else {"input_ids": words}
        patience, rid = (0.01 * (1 + index % 4) if leaves else 180.0), f"load {index:03d}"
        try:
            answer = self._post(
                **prompt,
                rid=rid,
                sampling_params={**_sampling(options, tokens), "temperature": 0.7 if index % 3 == 0 else 0.0},
                timeout=httpx.Timeout(180.0, read=patience),
            )
        except httpx.ReadTimeout:
            _expect(leaves, f"request {index} was not answered")
            httpx.post(f"{self.server.url}/abort_request", json={"rid": rid}, timeout=60.0).raise_for_status()
            return "gone"
        meta = answer["meta_info"]
        _expect(meta["completion_tokens"] == tokens, f"request {index}: {meta['completion_tokens']} of {tokens} tokens")
        _expect((KEY in meta) == (options is not None), f"request {index}: a report exactly where one was asked for")
        return meta[KEY]["mode"] if KEY in meta else "plain"

    def _words(self, seed: int, count: int) -> list[int]:
        low = min(100, self.model.vocabulary // 4)
        return random.Random(seed).choices(range(low, self.model.vocabulary), k=count)

    def _ask(self, prompt: list[int] | str, options: dict[str, Any] | None = None, tokens: int = 1) -> Any:
        given = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        return self._post(
            **given, sampling_params=_sampling(options, tokens), return_logprob=True, token_ids_logprob=self.watched
        )

    def _together(self, prompts: Sequence[list[int]], options: Sequence[dict[str, Any] | None]) -> Any:
        return self._post(
            input_ids=list(prompts),
            sampling_params=[_sampling(one, 1) for one in options],
            return_logprob=[True] * len(prompts),
            token_ids_logprob=[self.watched] * len(prompts),
        )

    def _post(self, *, timeout: httpx.Timeout | float = 180.0, **body: Any) -> Any:
        response = httpx.post(f"{self.server.url}/generate", json=body, timeout=timeout)
        if response.status_code != 200:
            raise CheckFailed(f"/generate answered {response.status_code}: {response.text[:300]}")
        return response.json()

    def _flush(self) -> None:
        response = httpx.post(f"{self.server.url}/flush_cache", params={"timeout": 30}, timeout=60.0)
        _expect(response.status_code == 200, f"/flush_cache answered {response.status_code}: {response.text[:200]}")

    def _aborted(self) -> float:
        """Requests that opted in and were aborted, so far."""
        (scheduler, *_) = self.server.get_json("/rksc/stats?nodes=false")["schedulers"]
        series = scheduler["counters"][metrics.REQUESTS]
        return sum(one["value"] for one in series if one["labels"]["reason"] == "aborted")

    def _until(self, condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + 60.0
        while not condition():
            _expect(time.monotonic() < deadline, otherwise)
            time.sleep(0.2)

    def _loads(self) -> dict[str, int]:
        return self.server.get_json("/v1/loads?include=core")["loads"][0]


def profile_for(model: Model, fingerprint: Fingerprint) -> Profile:
    """Read-outs of a random direction with which some verifications leave early, some later and some never."""
    depths = sorted({max(1, model.layers * part // 4) for part in (1, 2, 3)} - {model.layers})
    direction = (np.random.default_rng(5).normal(size=model.hidden) / model.hidden**0.5).astype(np.float32)
    readouts = {depth: LinearReadout(direction, 0.0, 0.5) for depth in depths}
    point = CertifiedPoint(0.01, "verdict", 1.0, 0.0, 0.0, 0.5, 100, 100)
    return Profile(fingerprint, QUESTION, YES, NO, model.layers, readouts, (point,), 0.05, workload="made by hand")


def check_backend(
    backend: str, model: Model, platform: str, dtype: str, flags: Sequence[str] = (), start_limit: float = 300.0
) -> dict[str, Any]:
    """Start a server, run every check, end it; what was found as plain values, with ``ok`` and ``failed``."""
    result: dict[str, Any] = {"backend": backend, "ok": False, "failed": [], **machine(), "dtype": dtype}
    result |= {"model": model.path.name, "flags": list(flags)}
    began = time.monotonic()
    profile = profile_for(model, Fingerprint(fingerprint_of_model(model.path), dtype, "none", "auto", backend, 1))
    arguments = [
        *("--model-path", str(model.path), "--attention-backend", backend, "--dtype", dtype),
        *("--max-total-tokens", "20000", "--grammar-backend", "none", *flags),
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "profile.json"
        profile.save(path)
        variables = {PROFILE_VARIABLE: str(path), TRACE_VARIABLE: "1", ALLOW_VARIABLE: "1", PASS_TOKENS_VARIABLE: "0"}
        if platform == "cpu":
            variables["SGLANG_PLATFORM"] = PLATFORM_NAME
        server = ServerProcess(server_arguments(arguments), variables=variables)
        try:
            server.start(start_limit)
            result["start_s"] = round(time.monotonic() - began, 1)
            checks = Checks(server, model, profile, dtype)
            result["failed"] = checks.run()
            result |= checks.found
        except RkscError as error:
            result["failed"].append(f"start: {type(error).__name__}: {error}")
        finally:
            server.stop()
    result["ok"] = not result["failed"]
    result["total_s"] = round(time.monotonic() - began, 1)
    return result


def machine() -> dict[str, str]:
    """The device and the versions that matter."""
    import torch

    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else accelerator_present() or "cpu"}
    for name in ("sglang", "torch", "triton", "sglang-kernel", "flashinfer-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--backends", nargs="+", help="attention backends (default: triton fa3 flashinfer; on the CPU "
                        "rksc_cpu torch_native)")  # fmt: skip
    parser.add_argument("--model-path", help="an embedded model's name, a Hugging Face id or a path (default: random)")
    parser.add_argument("--architecture", default="llama", help="of the random model (default: llama)")
    parser.add_argument("--dtype", help="default: bfloat16, on the CPU float32")
    parser.add_argument("--start-limit", type=float, default=300.0, help="seconds until a server must be ready")
    parser.add_argument("flags", nargs="*", help="flags of SGLang's server, after --")
    given = parser.parse_args(arguments)
    if given.platform == "gpu" and accelerator_present() is None:
        print(
            "gpu_check: PyTorch sees no accelerator here; run it on a machine with one, or with --platform cpu on the "
            "CPU platform",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as directory:
        if given.model_path is None:
            from rksc_sgl.testing import write_tiny_model

            path = Path(directory) / f"random-{given.architecture}"
            write_tiny_model(path, given.architecture, **SHAPES[given.platform])
        else:
            path = Path(resolve_model(given.model_path))
        model = Model.at(path, is_trained=given.model_path is not None)
        dtype, good = given.dtype or DTYPES[given.platform], True
        for backend in given.backends or BACKENDS[given.platform]:
            result = check_backend(backend, model, given.platform, dtype, given.flags, given.start_limit)
            good &= result["ok"]
            print(json.dumps(result), flush=True)
    return 0 if good else 1


def _sampling(options: dict[str, Any] | None, tokens: int) -> dict[str, Any]:
    plain: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return plain if options is None else {**plain, "custom_params": {KEY: options}}


def _logprobs(answer: Any) -> dict[int, float]:
    return {token: value for value, token, *_ in answer["meta_info"]["output_token_ids_logprobs"][0]}


def _distance(one: Any, other: Any) -> float:
    """The largest difference of the watched tokens' log-probabilities after the prompt."""
    first, second = _logprobs(one), _logprobs(other)
    return round(max(abs(first[token] - second[token]) for token in first), 6)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(otherwise)


if __name__ == "__main__":
    sys.exit(main())
