"""What this package offers on a server, and on what evidence: allow-lists as plain values.

:class:`~rksc_sgl.support.facts.Facts` says what a server is, :mod:`~rksc_sgl.support.axes` what ran where, and
:func:`~rksc_sgl.support.offers.offers_of` brings the two together. Nothing here imports SGLang.
"""

from rksc_sgl.support.facts import Facts
from rksc_sgl.support.offers import Offer, offers_of

__all__ = ["Facts", "Offer", "offers_of"]
