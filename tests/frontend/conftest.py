from __future__ import annotations

from collections.abc import Iterator

import pytest
from open_states import end_states


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Workers of a test that fails do not keep the process from ending."""
    yield
    end_states()
