"""Where things are kept that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """TRUNKLINE_CACHE, or trunkline in the user's cache folder.

    Raises:
        RuntimeError: there is neither; the user has no home.
    """
    if named := os.environ.get("TRUNKLINE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trunkline"
