"""When sharing pays: the thresholds, and what they are compared with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from rksc_sgl.errors import OptionError

LEAST_TOKENS = 64  # a prefill shorter than this costs little more than the step that it rides on
WORTH = 0.8  # of what the exact prefill would compute, at most
FASTER = 0.95  # of the exact prefill's time, at most: less cannot be told from noise
NOT_FASTER = "a blend would not be faster"
# What a pass costs before it computes, in tokens of a prefill, by kind of device. On the CPU platform it is reading the
# weights once: with 14 saved tokens waiting was 0.89 times as fast there, with 28 it was 1.07 times
# (`python -m benchmarks.siblings_together`, the embedded model). On an H100 it is launching the layers: a pass of one
# token took 30 ms there, a prefill of 4,096 some 110 (Llama 3.1 8B shapes, bfloat16), so 30 ms are about 1,000 tokens.
PASS_TOKENS = {"cpu": 28, "cuda": 1024}
PASS_TOKENS_VARIABLE = "RKSC_PASS_TOKENS"
LEARN = "learn"  # in that variable: measured at the start, and learned from the passes that are served


def pass_tokens(device: str, environment: Mapping[str, str] = os.environ) -> int:
    """What a pass costs before it computes, in tokens of a prefill, as far as nobody has measured it.

    Args:
        device: kind of device, as torch names it; one that is not known counts as an accelerator.
        environment: may say it.

    Raises:
        OptionError: the environment says no number.
    """
    text = environment.get(PASS_TOKENS_VARIABLE, LEARN)
    if text == LEARN:
        return PASS_TOKENS.get(device, PASS_TOKENS["cuda"])
    if not text.isdigit():
        raise OptionError(
            f"{PASS_TOKENS_VARIABLE}: must be {LEARN}, or a whole number of tokens from 0 on, got {text!r}"
        )
    return int(text)


def learns(device: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether it is measured and learned: on an accelerator unless a number is given, on a CPU where it is asked for.

    Args:
        device, environment: as :func:`pass_tokens` takes them.
    """
    return environment.get(PASS_TOKENS_VARIABLE, LEARN if device == "cuda" else "") == LEARN


@dataclass(frozen=True)
class PassCost:
    """What a pass takes, in tokens of a prefill.

    Attributes:
        tokens: what it takes before it computes, as :func:`pass_tokens` has it.
        overlaps: an accelerator computes while the host launches what comes next, so that the longer of both counts; a
            CPU does one after the other.
        look: what a look takes at which verifications may leave; None where it was not measured: as much as launching
            a layer.
    """

    tokens: int = 1
    overlaps: bool = False
    look: float | None = None

    @classmethod
    def on(cls, device: str, environment: Mapping[str, str] = os.environ) -> PassCost:
        """Of a kind of device, as torch names it.

        Raises:
            OptionError: the environment says no number.
        """
        return cls(pass_tokens(device, environment), device != "cpu")

    def of(self, computed: float) -> float:
        """A pass that computes so many tokens in every layer."""
        return max(float(self.tokens), computed) if self.overlaps else self.tokens + computed

    def of_look(self, layers: int) -> float:
        """A look, in a model of so many layers."""
        return self.tokens / layers if self.look is None else self.look


def worth_waiting(gained: int, siblings: int, pass_tokens: int) -> bool:
    """Whether waiting for a common beginning is not slower than computing it in every sibling.

    The siblings' own tokens take a pass more, after the anchor's; what they do not compute has to pay for it.

    Args:
        gained: tokens that each of them does not compute.
        siblings: branches that wait.
        pass_tokens: tokens whose computation takes as long as a pass costs before it computes.
    """
    return gained > 0 and gained * siblings >= pass_tokens


def worth_blending(tokens: int, cached: int, aligned: int, probe_share: float) -> bool:
    """Whether blending computes clearly less than a prefill after the exact prefix.

    Args:
        tokens: of the branch.
        cached: its tokens that the exact tree has already.
        aligned: its tokens that the donor has too, those of ``cached`` among them.
        probe_share: layers that run for every token, as a share of the model's.
    """
    exact = tokens - cached
    return exact >= LEAST_TOKENS and computed_by_blend(tokens, tokens - aligned, probe_share) <= WORTH * exact


def faster_blending(
    tokens: int, cached: int, aligned: int, probe_share: float, cost: PassCost, siblings: int = 1
) -> bool:
    """Whether blending takes clearly less time than a prefill after the exact prefix.

    A blend is an approximation, and where it saves no time it has no excuse: not for a client either that asked for it.

    Args:
        tokens, cached, aligned, probe_share: as :func:`worth_blending` takes them.
        cost: of a pass of this server.
        siblings: branches of the fork that are computed in one pass, each taken to be as this one.
    """
    blend = computed_by_blend(tokens, tokens - aligned, probe_share)
    return cost.of(siblings * blend) <= FASTER * cost.of(siblings * (tokens - cached))


def computed_by_blend(tokens: int, computed: int, probe_share: float) -> float:
    """What a blend computes, in tokens that go through all layers.

    Args:
        tokens: that the probe runs for.
        computed: of these, that go on after it.
        probe_share: layers of the probe, as a share of the model's.
    """
    return tokens * probe_share + computed * (1.0 - probe_share)
