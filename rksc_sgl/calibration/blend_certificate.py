"""What a blend may cost, certified on forks that were run on exact and on blended KV.

Two risks, each at most the one that is asked for: that a blended branch loses a right answer which it has on exact KV,
less what blending wins (a difference of shares, so that two runs which part by chance cost nothing); and that a verdict
on a branch's text changes. Both are means over forks like the recorded ones; forks are independent of each other,
branches of one fork are not. A setting is certified where both hypotheses of too much loss are rejected at every
temperature, each at level alpha (an intersection of tests needs no correction). Settings are tried from the one that
computes most on, until the first that is not certified (fixed sequence, :mod:`rksc_sgl.calibration.risk_control`).

Where a fork has no known right answer, its loss is the share of its blended branches whose answer is not the one that
they give on exact KV. That counts chance against the blend, and so needs greedy answers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean

from rksc_sgl.calibration.atomic_write import write_atomically
from rksc_sgl.calibration.fingerprint import Fingerprint, checksum
from rksc_sgl.calibration.risk_control import betting_p, check_share, fixed_sequence
from rksc_sgl.errors import OptionError, ProfileError

FORMAT = "rksc-blends"
RULE = 3  # that says what a blend computes: what another rule did is certified of that rule only
VERSION = RULE
LEAST_RIGHT = 0.1  # of the branches on exact KV: where fewer are right, a right answer that is lost does not show
LEAST_ANSWERED = 0.5  # of them, without known answers


@dataclass(frozen=True)
class BlendSetting:
    """How branches are blended.

    Attributes:
        recompute: as a request's option of that name.
        minimum_span: likewise.
    """

    recompute: float
    minimum_span: int


@dataclass(frozen=True)
class ForkLoss:
    """One fork on exact KV and on blended KV; means over its branches that were blended.

    Attributes:
        lost: share of the branches that are right on exact KV only, less those that are right on blended KV only;
            without a known answer, the share whose answers differ.
        changed: share of the verdicts that change, on the texts of the exact run; None where nothing was verified.
        right: share that are right on exact KV; without a known answer, that have an answer.
        graded: whether the right answer is known.
        computed: share of the prompts' tokens that the blends computed.
        tokens: of the shortest prompt that was blended.
        control: as ``lost``, of a second exact run in batches of another shape.
        same_selection: whether verification by score takes a branch with the same answer; None where nothing was
            verified.
    """

    lost: float
    changed: float | None
    right: float
    graded: bool
    computed: float
    tokens: int
    control: float = 0.0
    same_selection: bool | None = None


@dataclass(frozen=True)
class Tested:
    """What was found of one setting at one temperature.

    Attributes:
        p: the larger of the two p-values.
        forks: how many had a blended branch.
    """

    recompute: float
    minimum_span: int
    temperature: float
    forks: int
    lost: float
    control: float
    changed: float
    same_selection: float
    right: float
    computed: float
    p: float


@dataclass(frozen=True)
class BlendCertificate:
    """A setting with which branches may be blended on a server without being asked.

    Attributes:
        fingerprint: the model as it was served.
        setting: how they are blended.
        risk: of a right answer that is lost, less those that are won, and of a verdict that changes.
        alpha: 1 - confidence.
        least_tokens: of the shortest prompt that was recorded; nothing is known of shorter ones.
        shared_slots: whether blended branches used slots of their donors, and so their KV of the first layers too.
        tested: all that was tested.
        workload: what was recorded, for people.
        created: ISO date.
    """

    fingerprint: Fingerprint
    setting: BlendSetting
    risk: float
    alpha: float
    least_tokens: int
    shared_slots: bool = False
    tested: tuple[Tested, ...] = ()
    workload: str = ""
    created: str = field(default_factory=lambda: date.today().isoformat())

    def __post_init__(self) -> None:
        for name, value in (("risk", self.risk), ("alpha", self.alpha)):
            if not 0.0 < value < 1.0:
                raise ProfileError(f"{name}: must be above 0 and below 1, got {value!r}")
        if not 0.0 <= self.setting.recompute <= 1.0:
            raise ProfileError(f"setting.recompute: must be from 0 to 1, got {self.setting.recompute!r}")
        for name, count in (("setting.minimum_span", self.setting.minimum_span), ("least_tokens", self.least_tokens)):
            if count < 1:
                raise ProfileError(f"{name}: must be at least 1, got {count!r}")

    @property
    def file_name(self) -> str:
        """Its name in a directory of profiles: one for each way to serve a model."""
        served = {**asdict(self.fingerprint), "shared_slots": self.shared_slots}
        return f"blends-{checksum(served)[:32]}.json"

    def save(self, path: Path) -> None:
        """Write the file; it appears complete or not at all, and replaces an older one in one step.

        Raises:
            ProfileError: it could not be written.
        """
        body = asdict(self)
        document = {"format": FORMAT, "version": VERSION, "sha256": checksum(body), "body": body}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
        except OSError as error:
            raise ProfileError(f"{path}: could not be written: {error}") from error


def load(path: Path) -> BlendCertificate:
    """Read a certificate.

    Raises:
        ProfileError: it is not there, damaged, of another version, or a field is wrong; the message names the file.
    """
    again = "make a new one with `rksc calibrate --blends`"
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ProfileError(f"{path}: must be {FORMAT}, version {VERSION}; {again}")
        body = document["body"]
        if document["sha256"] != checksum(body):
            raise ProfileError(f"{path}: sha256: does not fit the body: damaged or edited; {again}")
        return BlendCertificate(
            **{
                **body,
                "fingerprint": Fingerprint.from_mapping(body["fingerprint"]),
                "setting": BlendSetting(**body["setting"]),
                "tested": tuple(Tested(**one) for one in body["tested"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{path}: cannot be read as a certificate of blends ({error}); {again}") from error


Losses = Mapping[float, Sequence[ForkLoss]]  # by temperature


def certified(
    recorded: Sequence[tuple[BlendSetting, Losses]], risk: float, alpha: float
) -> tuple[BlendSetting | None, tuple[Tested, ...]]:
    """The setting that computes least of those that are certified, and what was found of each.

    Args:
        recorded: settings, from the one that computes most on, with the losses of all forks that were blended.
        risk: of both losses.
        alpha: 1 - confidence.

    Raises:
        OptionError: nothing was recorded, or too few answers are right for a lost one to show.
    """
    check_share("risk", risk)
    check_share("alpha", alpha)
    order = [setting.recompute for setting, _ in recorded]
    if order != sorted(order, reverse=True):
        raise OptionError("recompute: settings must be tried from the one that computes most on")
    tested = [
        _tested(setting, temperature, losses, risk, alpha)
        for setting, by_temperature in recorded
        for temperature, losses in by_temperature.items()
    ]
    worst = [max(one.p for one in tested if one.recompute == setting.recompute) for setting, _ in recorded]
    count = fixed_sequence(worst, alpha)
    return (recorded[count - 1][0] if count else None), tuple(tested)


def _tested(setting: BlendSetting, temperature: float, losses: Sequence[ForkLoss], risk: float, alpha: float) -> Tested:
    if not losses:
        raise OptionError(f"no branch was blended with recompute {setting.recompute:g}: no certificate can be made")
    graded = [one for one in losses if one.graded]
    right = fmean(one.right for one in losses)
    least = LEAST_RIGHT if graded else LEAST_ANSWERED
    if graded and len(graded) < len(losses):
        raise OptionError("some forks have a known answer and others none: give one of both kinds")
    if right < least:
        what = "right" if graded else "an answer at all"
        raise OptionError(
            f"on exact KV {right:.0%} of the answers are {what} (temperature {temperature:g}), so that a loss would "
            f"not show: at least {least:.0%} are needed; give other prompts, or a model that can answer them"
        )
    order = list(losses)
    random.Random(0).shuffle(order)
    lowest = -1.0 if graded else 0.0
    p_lost = betting_p([one.lost for one in order], risk, alpha, lowest)
    changed = [one.changed for one in order if one.changed is not None]
    p_changed = betting_p(changed, risk, alpha) if changed else 1.0
    selected = [one.same_selection for one in order if one.same_selection is not None]
    return Tested(
        recompute=setting.recompute,
        minimum_span=setting.minimum_span,
        temperature=temperature,
        forks=len(order),
        lost=round(fmean(one.lost for one in order), 4),
        control=round(fmean(one.control for one in order), 4),
        changed=round(fmean(changed), 4) if changed else 1.0,
        same_selection=round(fmean(selected), 4) if selected else 0.0,
        right=round(right, 4),
        computed=round(fmean(one.computed for one in order), 4),
        p=max(p_lost, p_changed),
    )


def forks_needed(risk: float, alpha: float, *, graded: bool) -> int:
    """How many forks without any loss are needed for a certificate."""
    lowest = -1.0 if graded else 0.0
    count = max(1, math.ceil(math.log(1.0 / alpha) / risk / 2))
    while betting_p([0.0] * count, risk, alpha, lowest) > alpha or betting_p([0.0] * count, risk, alpha) > alpha:
        count = math.ceil(1.05 * count)
    return count
