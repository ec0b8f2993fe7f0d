"""The command line of a server: what is ours becomes environment variables, what is SGLang's passes through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rksc_sgl.calibration.profile import load
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.exit_settings import (
    AUDIT_RATE_VARIABLE,
    AUDIT_STOP_VARIABLE,
    PROFILE_VARIABLE,
    TRACE_VARIABLE,
    Settings,
)
from rksc_sgl.memory.settings import LEASE_FLAG, LEASE_VARIABLE, PRIVATE_SLOTS_VARIABLE, lease_seconds
from rksc_sgl.model_fetch import is_embedded, resolve_model
from rksc_sgl.one_request.options import FORK_VARIABLE, ForkSettings
from rksc_sgl.packed_attention.switch import PACKED_ATTENTION_VARIABLE
from rksc_sgl.placement.worth import PASS_TOKENS_VARIABLE, pass_tokens
from rksc_sgl.support.offers import ALLOW_UNTESTED, ALLOW_VARIABLE

SWITCHES = {
    "--rksc-audit-stop": AUDIT_STOP_VARIABLE,
    "--rksc-trace": TRACE_VARIABLE,
    ALLOW_UNTESTED: ALLOW_VARIABLE,
    "--rksc-packed-attention": PACKED_ATTENTION_VARIABLE,
    "--rksc-private-slots": PRIVATE_SLOTS_VARIABLE,
}
_MODEL_FLAGS = ("--model-path", "--model")


def server_arguments(args: Sequence[str]) -> list[str]:
    """SGLang's arguments for ours: the model resolved, host and port taken out.

    Raises:
        RkscError: no model is named.
    """
    model = argument(args, *_MODEL_FLAGS)
    if model is None:
        raise RkscError("--model-path: name a model, for example --model-path smollm2-135m-instruct")
    result = ["--model-path", resolve_model(model), *without(args, *_MODEL_FLAGS, "--host", "--port")]
    if is_embedded(model) and argument(args, "--served-model-name") is None:
        result += ["--served-model-name", model]
    return result


def take_switches(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without our own switches, and these as environment variables of the server's processes.

    Raises:
        RkscError: a switch has an invalid value.
    """
    variables: dict[str, str] = {}
    profile, rate = argument(args, "--rksc-profile"), argument(args, "--rksc-audit-rate")
    if profile is not None:
        load(profile)
        variables[PROFILE_VARIABLE] = str(Path(profile).absolute())
    if rate is not None:
        variables[AUDIT_RATE_VARIABLE] = rate
        Settings.from_environment(variables)
    tokens = argument(args, "--rksc-pass-tokens")
    if tokens is not None:
        variables[PASS_TOKENS_VARIABLE] = tokens
        pass_tokens("cpu", variables)
    lease = argument(args, LEASE_FLAG)
    if lease is not None:
        variables[LEASE_VARIABLE] = lease
        lease_seconds(variables)
    fork = argument(args, "--rksc-fork")
    if fork is not None:
        try:
            ForkSettings.from_json(fork)
        except OptionError as error:
            raise OptionError(f"--rksc-fork: {error}") from error
        variables[FORK_VARIABLE] = fork
    left = without(args, "--rksc-profile", "--rksc-audit-rate", "--rksc-pass-tokens", "--rksc-fork", LEASE_FLAG)
    for switch, variable in SWITCHES.items():
        if switch in left:
            variables[variable] = "1"
            left.remove(switch)
    return left, variables


def argument(args: Sequence[str], *names: str) -> str | None:
    """Value of the last of these flags on a command line (``--flag value`` or ``--flag=value``), or None."""
    found = None
    for position, word in enumerate(args):
        flag, separator, value = word.partition("=")
        if flag.replace("_", "-") not in names:
            continue
        if separator:
            found = value
        elif position + 1 < len(args):
            found = args[position + 1]
    return found


def without(args: Sequence[str], *names: str) -> list[str]:
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
