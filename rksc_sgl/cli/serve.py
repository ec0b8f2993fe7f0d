"""``rksc serve``: SGLang's own server, with our backend selected."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from rksc_sgl.calibration.profile import load
from rksc_sgl.errors import RkscError
from rksc_sgl.exit_settings import (
    AUDIT_RATE_VARIABLE,
    AUDIT_STOP_VARIABLE,
    PROFILE_VARIABLE,
    TRACE_VARIABLE,
    Settings,
)
from rksc_sgl.model_fetch import is_embedded, resolve_model
from rksc_sgl.server_process import HEALTH_VARIABLE, STOP_GRACE_S, ServerProcess, argument, port_is_free

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000
DRAIN_S = 30.0  # after SIGTERM, SGLang finishes what it has begun
_MODEL_FLAGS = ("--model-path", "--model")

HELP = """Usage: rksc serve --model-path MODEL [any SGLang server flag]

SGLang's own server with the radix backend `rksc` selected. MODEL is an embedded model's name
(`rksc model list`), a Hugging Face id, or a path. On a machine without an accelerator the CPU platform
`rksc_cpu` is selected by itself; SGLANG_PLATFORM=rksc_cpu forces it.

  --model-path MODEL     the model to serve
  --host HOST            address to listen on (default 127.0.0.1)
  --port PORT            port to listen on (default 30000)
  --rksc-profile FILE    exits verification early as this profile certifies (default: those of the model in the
                         cache directory, as `rksc calibrate` wrote them)
  --rksc-audit-rate R    compare this share of the early exits with full depth, 0 to 1 (default 0)
  --rksc-audit-stop      switch exits off when the audit refutes the certificate
  --rksc-trace           let requests ask for hidden states, as calibration does
  --sglang-help          every flag of SGLang's server
  --help                 this text

Ctrl-C ends the server and all of its processes at once; SIGTERM lets it finish what it has begun, for 30 s."""


def serve(context: typer.Context) -> None:
    """Start SGLang's server with our backend selected; every SGLang flag passes through."""
    args = list(context.args)
    if "--help" in args or "-h" in args:
        typer.echo(HELP)
        return
    if "--sglang-help" in args:
        from sglang.srt.server_args import prepare_server_args

        prepare_server_args(["--help"])
        return
    sys.exit(run(args))


def run(args: list[str]) -> int:
    """Serve until the server ends or a signal comes; the exit code.

    Raises:
        RkscError: the arguments are of no use, or the server did not start.
    """
    args, variables = take_switches(args)
    host = argument(args, "--host") or DEFAULT_HOST
    port = _port(argument(args, "--port"))
    if not port_is_free(port, host):
        raise RkscError(f"port {port} on {host} is taken; end what listens there or choose another with --port")
    # Whoever watches a server of ours asks /health and wants to know whether it still generates.
    variables.setdefault(HEALTH_VARIABLE, os.environ.get(HEALTH_VARIABLE, "1"))
    server = ServerProcess(server_arguments(args), host=host, port=port, variables=variables, log=sys.stderr)

    grace = STOP_GRACE_S

    def end(signum: int, frame: FrameType | None) -> None:
        nonlocal grace
        grace = DRAIN_S
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        server.start()
        info = server.get_json("/rksc/info")
        problems = problems_in(info)
        if problems:
            raise RkscError("SGLang runs, but not all of rksc does, so it was ended again:\n  " + "\n  ".join(problems))
        print(summary(server.url, info), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        print("rksc: ending the server", file=sys.stderr)
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.stop(grace)


def take_switches(args: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without our own switches, and these as environment variables of the server's processes.

    Raises:
        RkscError: a switch has a value of no use.
    """
    variables: dict[str, str] = {}
    profile, rate = argument(args, "--rksc-profile"), argument(args, "--rksc-audit-rate")
    if profile is not None:
        load(profile)
        variables[PROFILE_VARIABLE] = str(Path(profile).absolute())
    if rate is not None:
        variables[AUDIT_RATE_VARIABLE] = rate
        Settings.from_environment(variables)
    left = _without(args, "--rksc-profile", "--rksc-audit-rate")
    for switch, variable in (("--rksc-audit-stop", AUDIT_STOP_VARIABLE), ("--rksc-trace", TRACE_VARIABLE)):
        if switch in left:
            variables[variable] = "1"
            left.remove(switch)
    return left, variables


def server_arguments(args: list[str]) -> list[str]:
    """SGLang's arguments for ours: the model resolved, our backend selected, host and port taken out.

    Raises:
        RkscError: no model is named.
    """
    model = argument(args, *_MODEL_FLAGS)
    if model is None:
        raise RkscError("--model-path: name a model, for example --model-path smollm2-135m-instruct")
    result = ["--model-path", resolve_model(model), *_without(args, *_MODEL_FLAGS, "--host", "--port")]
    if is_embedded(model) and argument(args, "--served-model-name") is None:
        result += ["--served-model-name", model]
    if argument(args, "--radix-cache-backend") is None and "--disable-radix-cache" not in args:
        result += ["--radix-cache-backend", "rksc"]
    return result


def problems_in(info: dict[str, Any]) -> list[str]:
    """What is not in place in a live server, from its ``/rksc/info``."""
    schedulers = info["schedulers"]
    problems = [] if schedulers and all(schedulers) else ["the scheduler does not report the rksc plugin"]
    for where in (info, *filter(None, schedulers)):
        problems += [state["problem"] for state in where["hooks"].values() if state["problem"]]
    applied = {
        target
        for where in (info, *filter(None, schedulers))
        for target, state in where["hooks"].items()
        if state["applied"]
    }
    problems += [f"{target} is hooked in no process" for target in info["hooks"] if target not in applied]
    return list(dict.fromkeys(problems))


def summary(url: str, info: dict[str, Any]) -> str:
    """What is active, in one short block."""
    scheduler = info["schedulers"][0]
    return (
        f"rksc {info['version']} on {url}\n"
        f"  platform {info['platform']}, attention {scheduler['attention_backend']}, "
        f"tree {scheduler['tree_cache']} (radix backend {info['radix_cache_backend'] or 'default'})\n"
        f"  sharing {', '.join(info['share_modes'])}; {len(info['hooks'])} hooks in place; GET {url}/rksc/info"
    )


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise RkscError(f"--port: must be 1 to 65535, got {text!r}")
    return int(text)


def _without(args: list[str], *names: str) -> list[str]:
    """The arguments without these flags and their values."""
    result: list[str] = []
    skip_value = False
    for word in args:
        if skip_value:
            skip_value = False
            continue
        flag, separator, _ = word.partition("=")
        if flag.replace("_", "-") in names:
            skip_value = not separator
            continue
        result.append(word)
    return result
