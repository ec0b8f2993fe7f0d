"""Two prompts side by side: what they have in common, found once however often it is asked."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.blending.plan import after_breaks
from rksc_sgl.donors.forks import Donor
from rksc_sgl.options import RequestOptions
from rksc_sgl.similarity.alignment import Alignment, align
from rksc_sgl.similarity.content_guard import ContentComparison, same_content


class Comparison:
    """A branch's prompt beside a donor's.

    Attributes:
        donor, ids: the two prompts, int64 ``[m]`` and ``[n]``.
    """

    def __init__(self, donor: Donor, ids: NDArray[np.int64], minimum_span: int, tokenizer: Any) -> None:
        self.donor, self.ids = donor, ids
        self._minimum_span, self._tokenizer = minimum_span, tokenizer

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
    def shift(self) -> int:
        """So many positions later than in the branch most of the tokens that both have stand in the donor; else 0."""
        source = self.alignment.source
        own = np.flatnonzero(source >= 0)
        if not own.size:
            return 0
        shifts, tokens = np.unique(source[own] - own, return_counts=True)
        return max(0, int(shifts[tokens.argmax()]))

    @cached_property
    def always(self) -> NDArray[np.bool_]:
        """``[n]`` tokens that a blend computes though the donor has them."""
        return after_breaks(torch.from_numpy(self.alignment.source)).numpy()

    def taken(self, options: RequestOptions) -> int:
        """Tokens that a blend would take over with these options, as far as is known before the probe.

        How many move by more than a threshold is not known then; without one the whole share of ``recompute`` does.
        """
        aligned, always = self.alignment.aligned, int(self.always.sum())
        return aligned - max(always, int(options.recompute * aligned) if options.deviation == 0.0 else 0)

    @cached_property
    def guard(self) -> ContentComparison:
        """What the content guard says."""
        return same_content(self._text(self.donor.tokens), self._text(self.ids))

    def _text(self, ids: NDArray[np.int64]) -> str:
        """What they spell, special tokens included."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


class Comparisons:
    """A waiting branch beside each donor that it was compared with.

    Args:
        ids: int64 ``[n]`` the branch's prompt.
        minimum_span: the shortest run of equal tokens that counts.
        tokenizer: of Hugging Face's interface.
    """

    def __init__(self, ids: NDArray[np.int64], minimum_span: int, tokenizer: Any) -> None:
        self._ids, self._minimum_span, self._tokenizer = ids, minimum_span, tokenizer
        self._known: dict[int, Comparison] = {}

    def with_donor(self, donor: Donor) -> Comparison:
        """The comparison with a donor."""
        known = self._known.get(id(donor))
        if known is None or known.donor is not donor:
            known = self._known[id(donor)] = Comparison(donor, self._ids, self._minimum_span, self._tokenizer)
        return known
