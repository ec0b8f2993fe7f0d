"""``rksc serve``: SGLang's own server, with everything of ours in place, or none at all."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import typer

from rksc_sgl.cpu_platform.pool_choice import pool_text
from rksc_sgl.errors import RkscError
from rksc_sgl.server_arguments import argument, server_arguments, take_switches
from rksc_sgl.server_process import HEALTH_VARIABLE, STOP_GRACE_S, ServerProcess, port_is_free

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000
DRAIN_S = 30.0  # after SIGTERM, SGLang finishes what it has begun

HELP = """Usage: rksc serve --model-path MODEL [any SGLang server flag]

SGLang's own server with rksc in its processes. MODEL is an embedded model's name
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
  --rksc-pass-tokens N   what a pass costs before it computes, in tokens of a prefill: siblings wait for a common
                         beginning where that saves more, and blends and early exits are declined that save less
                         (default: 28 on a CPU; on an NVIDIA GPU "learn": timed at the start, then learned)
  --rksc-fork JSON       defaults and limits of requests that are forks (docs/one_request.md), such as
                         '{"branches": 4, "limits": {"forks": 32}}'; with "v1": true every request on /v1 is one
                         that does not say otherwise (docs/scale_out.md)
  --rksc-packed-attention
                         on Triton attention, computed tokens of a blend attend in one operation a layer, not run by run
                         (docs/support.md: not run on a GPU)
  --rksc-private-slots   a blended branch copies all that it takes over, also where it could use its donor's slots
                         (docs/sharing.md)
  --rksc-lease-seconds S keep forks whole when memory is short; what is kept of one goes after so long without a
                         request of it (default 30; 0 keeps nothing, docs/memory.md)
  --rksc-allow-untested  offer also what was never run on a server like this one (docs/support.md); every report
                         of it then carries a warning. What is known to be wrong stays refused
  --sglang-help          every flag of SGLang's server
  --help                 this text

Environment:
  RKSC_CACHE_DIR         where models, profiles, traces and the compiled library are kept (default: the user's cache)
  RKSC_NATIVE=0          decoder layers of the CPU platform as PyTorch operations, without the compiled library

Ctrl-C ends the server and all of its processes at once; SIGTERM lets it finish what it has begun, for 30 s."""


def serve(context: typer.Context) -> None:
    """Start SGLang's server with rksc in its processes; every SGLang flag passes through."""
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
        RkscError: the arguments are invalid, or the server did not start.
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
        print(summary(server.url, info), f"  {pool_text(server.get_json('/server_info'))}", sep="\n", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        print("rksc: ending the server", file=sys.stderr)
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.stop(grace)


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
    offers = scheduler["offers"]
    lines = [f"  {name}: {_told(offer)}" for name, offer in offers.items() if _told(offer)]
    told = "".join(f"\n{line}" for line in lines)
    offered = ", ".join(name for name, offer in offers.items() if offer["offered"]) or "nothing"
    return (
        f"rksc {info['version']} on {url}\n"
        f"  platform {info['platform']}, attention {scheduler['attention_backend']}, "
        f"tree {scheduler['tree_cache']} (radix backend {info['radix_cache_backend'] or 'default'})\n"
        f"  offered: {offered}{told}\n"
        f"  {len(info['hooks'])} hooks in place; GET {url}/rksc/info"
    )


def _told(offer: dict[str, Any]) -> str:
    """What there is to say of one offer; empty where it is offered and was tested."""
    if not offer["offered"]:
        return f"refused: {offer['refusal']}"
    return f"untested: {offer['warning']}" if offer["warning"] else ""


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise RkscError(f"--port: must be 1 to 65535, got {text!r}")
    return int(text)
