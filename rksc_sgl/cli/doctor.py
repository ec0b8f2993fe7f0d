"""``rksc doctor``: checks the installation, and says how to fix what fails."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from rksc_sgl.errors import RkscError

PLUGIN_GROUP, PLATFORM_GROUP = "sglang.srt.plugins", "sglang.srt.platforms"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: whether it is as it must be.
        detail: what was found; where it is not ok, also how to fix it.
    """

    name: str
    ok: bool
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the list.")] = False,
    model: Annotated[str, typer.Option("--model-path", help="Model for the round trip.")] = "smollm2-135m-instruct",
    round_trip: Annotated[
        bool, typer.Option(help="Start a server, send one request, end it again (about a minute).")
    ] = True,
) -> None:
    """Check the installation: versions, entry points, platform, hooked targets, model, port, a round trip.

    Whether a server that runs already reuses what it says is shown by `rksc prove`.
    """
    found: list[Check] = []
    for check in examine(model, round_trip):
        found.append(check)
        if not as_json:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", flush=True)
    good = all(check.ok for check in found)
    if as_json:
        print(json.dumps({"ok": good, "checks": [asdict(check) for check in found]}))
    elif not good:
        failed = [check.name for check in found if not check.ok]
        print(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(0 if good else 1)


def examine(model: str, round_trip: bool) -> Iterator[Check]:
    """Every check in order; the round trip only where nothing before it failed."""
    checks: list[Callable[[], Check]] = [
        check_python,
        check_sglang_version,
        lambda: check_entry_point(PLUGIN_GROUP, "rksc", "rksc_sgl.sglang_plugin:register"),
        lambda: check_entry_point(PLATFORM_GROUP, "rksc_cpu", "rksc_sgl.cpu_platform:activate"),
        check_platform,
        *hook_checks(),
        lambda: check_model(model),
        check_port,
    ]
    good = True
    for run in checks:
        check = run()
        good = good and check.ok
        yield check
    if not round_trip:
        return
    if good:
        yield check_round_trip(model)
    else:
        yield Check("round trip", False, "not tried, because a check before it failed; fix that first")


def check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", (3, 11) <= sys.version_info[:2] < (3, 14), f"{version}; 3.11 to 3.13 are supported")


def check_sglang_version() -> Check:
    from rksc_sgl.sglang_plugin.wiring.registry import SGLANG_VERSION

    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return Check("sglang", False, f"not installed; fix: pip install sglang=={SGLANG_VERSION}")
    if version != SGLANG_VERSION:
        return Check(
            "sglang",
            False,
            f"{version} is installed and our hooks are made for {SGLANG_VERSION}; "
            f"fix: pip install sglang=={SGLANG_VERSION}",
        )
    return Check("sglang", True, version)


def check_entry_point(group: str, name: str, value: str) -> Check:
    found = [one for one in importlib.metadata.entry_points(group=group) if one.name == name]
    label = f"entry point {group}"
    if not found:
        return Check(label, False, f"{name} is not registered; fix: pip install . in a checkout of rksc-sgl")
    if found[0].value != value:
        return Check(label, False, f"{name} is {found[0].value}, expected {value}; fix: reinstall rksc-sgl")
    return Check(label, True, f"{name} = {value}")


def check_platform() -> Check:
    from rksc_sgl.cpu_platform import accelerator_present, in_use

    try:
        ours = in_use()
    except (ImportError, RuntimeError, TypeError) as error:
        return Check("platform", False, f"SGLang finds none: {error}; fix: unset SGLANG_PLATFORM")
    from sglang.srt.platforms import current_platform

    accelerator = accelerator_present()
    if accelerator is None and not ours:
        return Check(
            "platform",
            False,
            f"{current_platform!r} was chosen and there is no accelerator; fix: unset SGLANG_USE_CPU_ENGINE and "
            "SGLANG_PLATFORM, or set SGLANG_PLATFORM=rksc_cpu",
        )
    return Check("platform", True, f"{current_platform!r}, accelerator: {accelerator or 'none'}")


def hook_checks() -> list[Callable[[], Check]]:
    """One check for each hooked target."""
    from rksc_sgl.sglang_plugin.wiring.hooks import HOOKS
    from rksc_sgl.sglang_plugin.wiring.registry import SGLANG_VERSION, Hook, problem_of

    def check(hook: Hook) -> Check:
        problem = problem_of(hook)
        if problem is None:
            return Check(f"hook {hook.target}", True, f"{hook.kind}, {hook.process}")
        fix = f"fix: pip install sglang=={SGLANG_VERSION}, for which this release was made"
        return Check(f"hook {hook.target}", False, f"{problem}; {fix}")

    return [lambda hook=hook: check(hook) for hook in HOOKS]  # type: ignore[misc]


def check_model(model: str) -> Check:
    from rksc_sgl.model_fetch import is_embedded, model_path

    if not is_embedded(model):
        return Check("model", True, f"{model}: taken as it is, a Hugging Face id or a path")
    try:
        return Check("model", True, f"{model} at {model_path(model)}")
    except RkscError as error:
        return Check("model", False, str(error))


def check_port() -> Check:
    from rksc_sgl.server_process import free_port

    try:
        return Check("free port", True, f"{free_port()} on 127.0.0.1")
    except OSError as error:
        return Check("free port", False, f"none on 127.0.0.1 ({error}); fix: allow listening on the loopback")


def check_round_trip(model: str) -> Check:
    """Start a server as ``rksc serve`` does, generate as one branch of a group, and read the report back."""
    from rksc_sgl.cli.serve import problems_in
    from rksc_sgl.http_client import HttpClient
    from rksc_sgl.options import KEY
    from rksc_sgl.server_arguments import server_arguments
    from rksc_sgl.server_process import ServerProcess

    body = {
        "text": "The capital of France is",
        "sampling_params": {
            "max_new_tokens": 4,
            "temperature": 0,
            "custom_params": {KEY: {"group": "doctor", "branch": 0, "branches": 1}},
        },
    }
    try:
        with (
            ServerProcess(server_arguments(["--model-path", model])) as server,
            HttpClient(server.url, timeout=120.0) as client,
        ):
            problems = problems_in(client.get_json("/rksc/info"))
            result = client.post_json("/generate", body)
    except RkscError as error:
        return Check("round trip", False, f"{error}; fix: run `rksc serve --model-path {model}` and read its log")
    report = result["meta_info"].get(KEY)
    if report is None:
        problems.append("the response carries no meta_info['rksc']")
    if problems:
        return Check("round trip", False, "; ".join(problems) + "; fix: see the hook checks above")
    return Check("round trip", True, f"{result['text']!r}, reported {report}")
