"""Two prompts side by side: what they have in common, found once however often it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.blending.plan import always_computed
from rksc_sgl.donors.forks import Donor
from rksc_sgl.similarity.alignment import Alignment, align
from rksc_sgl.similarity.content_guard import ContentComparison, same_content
from rksc_sgl.similarity.number_tokens import number_tokens


@dataclass(eq=False)
class Vocabulary:
    """What token ids say.

    Attributes:
        tokenizer: of Hugging Face's interface.
        size: ids of the model.
    """

    tokenizer: Any
    size: int

    @cached_property
    def _numbers(self) -> NDArray[np.bool_]:
        return number_tokens(self.tokenizer, self.size)

    def numbers(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[n]`` which tokens are parts of numbers; ids that the model does not have count as the last one."""
        return self._numbers[ids.clip(0, self.size - 1)]

    def text(self, ids: NDArray[np.int64]) -> str:
        """What they spell, special tokens included."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


class Comparison:
    """A branch's prompt beside a donor's.

    Attributes:
        donor, ids: the two prompts, int64 ``[m]`` and ``[n]``.
    """

    def __init__(self, donor: Donor, ids: NDArray[np.int64], minimum_span: int, vocabulary: Vocabulary) -> None:
        self.donor, self.ids = donor, ids
        self._minimum_span, self._vocabulary = minimum_span, vocabulary

    @cached_property
    def common(self) -> int:
        """Equal tokens at the beginning."""
        size = min(self.donor.tokens.size, self.ids.size)
        differ = np.flatnonzero(self.donor.tokens[:size] != self.ids[:size])
        return int(differ[0]) if differ.size else size

    @property
    def begins_with_donor(self) -> bool:
        """Whether the branch has all of the donor from the start: that is exact reuse."""
        return self.common == self.donor.tokens.size

    @cached_property
    def alignment(self) -> Alignment:
        """Equal spans, wherever they stand."""
        return align(self.donor.tokens, self.ids, self._minimum_span)

    @cached_property
    def always(self) -> NDArray[np.bool_]:
        """``[n]`` tokens that a blend computes though the donor has them."""
        numbers = torch.from_numpy(self._vocabulary.numbers(self.ids))
        return always_computed(torch.from_numpy(self.alignment.source), numbers).numpy()

    @property
    def taken(self) -> int:
        """Tokens that a blend could take over."""
        return self.alignment.aligned - int(self.always.sum())

    @cached_property
    def guard(self) -> ContentComparison:
        """What the content guard says."""
        return same_content(self._vocabulary.text(self.donor.tokens), self._vocabulary.text(self.ids))


class Comparisons:
    """A waiting branch beside each donor that it was compared with.

    Args:
        ids: int64 ``[n]`` the branch's prompt.
        minimum_span: the shortest run of equal tokens that counts.
        vocabulary: of the model.
    """

    def __init__(self, ids: NDArray[np.int64], minimum_span: int, vocabulary: Vocabulary) -> None:
        self._ids, self._minimum_span, self._vocabulary = ids, minimum_span, vocabulary
        self._known: dict[int, Comparison] = {}

    def with_donor(self, donor: Donor) -> Comparison:
        """The comparison with a donor."""
        known = self._known.get(id(donor))
        if known is None or known.donor is not donor:
            known = self._known[id(donor)] = Comparison(donor, self._ids, self._minimum_span, self._vocabulary)
        return known
