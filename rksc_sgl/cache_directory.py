"""Where everything is kept that is fetched or made once: models, profiles, traces, the compiled library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

CACHE_VARIABLE = "RKSC_CACHE_DIR"


def cache_directory(kind: Literal["models", "profiles", "traces", "native", "environments", "pass-times"]) -> Path:
    """The directory of one kind; it need not exist yet.

    It is in the directory that ``RKSC_CACHE_DIR`` names, else in the user's cache directory.
    """
    named = os.environ.get(CACHE_VARIABLE)
    root = Path(named).expanduser().absolute() if named else user_cache_path("rksc")
    return root / kind
