from __future__ import annotations

import pytest

from rksc_sgl.errors import OptionError
from rksc_sgl.memory.settings import LEASE_S, lease_seconds


def test_the_time_of_a_lease_is_checked() -> None:
    assert lease_seconds({}) == LEASE_S == 30.0
    assert lease_seconds({"RKSC_LEASE_SECONDS": "0"}) == 0.0
    for wrong in ("soon", "-1", "inf", "nan"):
        with pytest.raises(OptionError, match="--rksc-lease-seconds"):
            lease_seconds({"RKSC_LEASE_SECONDS": wrong})
