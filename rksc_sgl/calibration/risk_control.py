"""Learn-then-Test: which settings keep an expected loss below a risk, with a confidence that is chosen beforehand.

Each candidate setting is a null hypothesis "its expected loss is above the risk". A p-value is computed from losses on
data that no choice was made on; settings are tested in an order fixed in advance, from the safest to the boldest, until
the first that is not rejected. The chance that any rejected one has an expected loss above the risk is then at
most alpha.

Source: Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then Test" (arXiv 2110.01052); the Hoeffding-Bentkus p-value
is theirs too, after Bates et al., "Distribution-free, risk-controlling prediction sets" (arXiv 2101.02703). Losses that
vary little are tested by betting: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting"
(arXiv 2010.09686).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scipy import special  # scipy.stats has these too, and takes a second to import in every process of a server

from rksc_sgl.errors import OptionError

BOLDEST = 0.9  # of what can be staked without being ruined by one loss
_ROUNDING = 1e-9  # a mean of losses times n is this close to the sum that it was made from


def hoeffding_bentkus_p(mean_loss: float, n: int, risk: float) -> float:
    """P-value of "the expected loss is above ``risk``" from ``n`` independent losses, each between 0 and 1.

    Args:
        mean_loss: the mean of the losses, 0 to 1.
        n: how many there are.
        risk: the bound, above 0 and below 1.

    Raises:
        OptionError: an argument is out of range; the message names it.
    """
    _check_count("n", n)
    check_share("risk", risk)
    if not 0.0 <= mean_loss <= 1.0:
        raise OptionError(f"mean_loss: must be between 0 and 1, got {mean_loss!r}")
    hoeffding = math.exp(-n * _relative_entropy(min(mean_loss, risk), risk))
    bentkus = math.e * float(special.bdtr(math.ceil(n * mean_loss - _ROUNDING), n, risk))
    return min(1.0, hoeffding, bentkus)


def betting_p(losses: Sequence[float], risk: float, alpha: float = 0.05, lowest: float = 0.0) -> float:
    """P-value of "the expected loss is above ``risk``" from independent losses, each between ``lowest`` and 1.

    A gambler stakes a part of its capital, at fair odds if the expected loss were ``risk``, that the next loss is
    lower; the stake follows from the losses before. Whatever the losses, the capital exceeds ``1 / p`` with probability
    at most ``p`` where the expected loss is ``risk`` or more (Ville). Its p-values are small where losses vary little,
    as the difference of two arms does that mostly agree.

    Args:
        losses: in an order that does not hang on them.
        risk: the bound, above ``lowest`` and below 1.
        alpha: the level at which it is to be used, for which the stakes are chosen; any is valid.
        lowest: 0, or -1 for the difference of two shares.

    Raises:
        OptionError: an argument is out of range; the message names it.
    """
    _check_count("n", len(losses))
    check_share("alpha", alpha)
    if not lowest < risk < 1.0:
        raise OptionError(f"risk: must be above {lowest:g} and below 1, got {risk!r}")
    if not all(lowest <= loss <= 1.0 for loss in losses):
        raise OptionError(f"losses: must be between {lowest:g} and 1")
    bound = (risk - lowest) / (1.0 - lowest)
    most = BOLDEST / (1.0 - bound)  # of the capital: no loss takes all of it
    capital, highest, total, squares = 1.0, 1.0, 0.5, 0.25
    for index, loss in enumerate(losses):
        share = (loss - lowest) / (1.0 - lowest)
        variance = squares / (index + 1)
        stake = min(most, math.sqrt(2.0 * math.log(1.0 / alpha) / (variance * len(losses))))
        capital *= 1.0 + stake * (bound - share)
        highest = max(highest, capital)
        total += share
        squares += (share - total / (index + 2)) ** 2
    return 1.0 / highest


def clopper_pearson_p(errors: int, n: int, risk: float) -> float:
    """P-value of "the error rate is above ``risk``" from ``n`` independent trials: P(X <= errors), X ~ Bin(n, risk).

    Raises:
        OptionError: an argument is out of range; the message names it.
    """
    _check_errors(errors, n)
    check_share("risk", risk)
    return float(special.bdtr(errors, n, risk))


def clopper_pearson_upper(errors: int, n: int, confidence: float = 0.95) -> float:
    """The error rate that is not exceeded, with this confidence (one-sided), after ``errors`` in ``n`` trials.

    Raises:
        OptionError: an argument is out of range; the message names it.
    """
    _check_errors(errors, n)
    check_share("confidence", confidence)
    return 1.0 if errors == n else float(special.betaincinv(errors + 1, n - errors, confidence))


def fixed_sequence(p_values: Iterable[float], alpha: float) -> int:
    """How many hypotheses are rejected, in the order given, before the first that is not (``p > alpha`` or NaN).

    Raises:
        OptionError: alpha is not between 0 and 1.
    """
    check_share("alpha", alpha)
    rejected = 0
    for p_value in p_values:
        if not p_value <= alpha:
            break
        rejected += 1
    return rejected


def check_share(name: str, value: float) -> None:
    """Refuse what is not strictly between 0 and 1.

    Raises:
        OptionError: naming the value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise OptionError(f"{name}: must be above 0 and below 1, got {value!r}")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{name}: must be at least 1, got {value!r}")


def _check_errors(errors: int, n: int) -> None:
    _check_count("n", n)
    if not 0 <= errors <= n:
        raise OptionError(f"errors: must be 0 to n = {n}, got {errors!r}")


def _relative_entropy(a: float, b: float) -> float:
    """KL(Bernoulli(a) || Bernoulli(b)) in nats, for 0 <= a <= b < 1."""
    first = a * math.log(a / b) if a > 0.0 else 0.0
    return first + (1.0 - a) * math.log((1.0 - a) / (1.0 - b))
