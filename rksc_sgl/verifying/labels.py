"""Which tokens say YES and which say NO.

A verdict is read off the distribution of the first token after the verification question. A label can begin with
several tokens, depending on leading space and case, and a tokenizer may split it; what counts is each spelling's
first token, unless another label's spelling begins with the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rksc_sgl.errors import LabelError, OptionError

LEAST_MASS = 0.05
"""Of the labels together: below, more than 19 of 20 replies that the model would begin are none of the labels, and a
score compares two numbers of the tail of its distribution."""

_LEAST = 1e-300  # of a probability, so that its logarithm is finite


@dataclass(frozen=True)
class LabelTokens:
    """First tokens of each label.

    Attributes:
        labels: the labels, the affirmative one first.
        ids: for each label the ids of the tokens that begin one of its spellings; disjoint between labels.
    """

    labels: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def all_ids(self) -> list[int]:
        """Every id, as asked for in ``token_ids_logprob``."""
        return [token for ids in self.ids for token in ids]

    @property
    def other_ids(self) -> list[int]:
        """Those of every label but the first."""
        return [token for ids in self.ids[1:] for token in ids]

    def probabilities(self, logprobs: Mapping[int, float]) -> tuple[float, ...]:
        """Probability of each label among the labels.

        Args:
            logprobs: log-probability of each of ``all_ids`` at the verdict's position.

        Raises:
            LabelError: an id is missing, or all of them have probability zero.
        """
        missing = [token for token in self.all_ids if token not in logprobs]
        if missing:
            raise LabelError(f"no logprob for label tokens {missing}; the server returned {sorted(logprobs)}")
        highest = max(logprobs[token] for token in self.all_ids)
        if not math.isfinite(highest):
            raise LabelError(f"the label tokens have no finite log-probability (highest {highest})")
        masses = [sum(math.exp(logprobs[token] - highest) for token in ids) for ids in self.ids]
        total = sum(masses)
        return tuple(mass / total for mass in masses)

    def mass(self, logprobs: Mapping[int, float]) -> float:
        """Probability of all labels together: how much of what the model would reply is one of them."""
        return min(1.0, sum(math.exp(logprobs[token]) for token in self.all_ids))

    def margin(self, logprobs: Mapping[int, float]) -> float:
        """Log-odds of the first label against all others together, in logits.

        Args:
            logprobs: log-probability of each of ``all_ids`` at the verdict's position.

        Raises:
            LabelError: as :meth:`probabilities`.
        """
        first, *rest = self.probabilities(logprobs)
        return math.log(max(first, _LEAST)) - math.log(max(sum(rest), _LEAST))


def label_logprobs(meta_info: Mapping[str, Any]) -> dict[int, float]:
    """The log-probabilities that a response has of ``token_ids_logprob`` at its first new token; empty without any."""
    positions = meta_info.get("output_token_ids_logprobs") or [None]
    return {int(token): float(value) for value, token, *_ in positions[0] or () if value is not None}


def spellings(label: str) -> list[str]:
    """The ways in which a model may write a label: as given, upper, lower and capitalised, with a leading space."""
    forms = dict.fromkeys([label, label.upper(), label.lower(), label.capitalize()])
    return [space + form for form in forms for space in ("", " ")]


def check_labels(labels: Sequence[str]) -> None:
    """
    Raises:
        OptionError: fewer than two labels, an empty one, or the same one twice.
    """
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise OptionError(f"labels: must be a list of words, got {labels!r}")
    if len(labels) < 2 or any(not isinstance(label, str) or not label.strip() for label in labels):
        raise OptionError(f"labels: must be at least two non-empty words, got {list(labels)!r}")
    if len({label.strip().lower() for label in labels}) != len(labels):
        raise OptionError(f"labels: must differ from each other, got {list(labels)!r}")


def resolve_labels(labels: Sequence[str], tokenize: Callable[[str], Sequence[int]]) -> LabelTokens:
    """First tokens of each label's spellings, without those that two labels share.

    Args:
        labels: at least two different words, the affirmative one first.
        tokenize: token ids of a text, without special tokens.

    Raises:
        OptionError: fewer than two labels, an empty one, or the same one twice.
        LabelError: a label has no first token of its own.
    """
    check_labels(labels)
    firsts = [_first_tokens(label.strip(), tokenize) for label in labels]
    own = []
    for index, label in enumerate(labels):
        others = set().union(*(first for other, first in enumerate(firsts) if other != index))
        ids = tuple(token for token in firsts[index] if token not in others)
        if not ids:
            raise LabelError(
                f"label {label!r} cannot be told from the others by its first token: all of its spellings begin "
                f"with a token that another label begins with too; choose other labels than {list(labels)!r}"
            )
        own.append(ids)
    return LabelTokens(tuple(labels), tuple(own))


def _first_tokens(label: str, tokenize: Callable[[str], Sequence[int]]) -> list[int]:
    found: dict[int, None] = {}
    for spelling in spellings(label):
        ids = tokenize(spelling)
        if ids:
            found[ids[0]] = None
    return list(found)
