"""Where downloads are kept between runs: in the user's cache, never inside a clone."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where downloads are kept: DIPTYCH_CACHE, else the user's cache folder; never inside a clone."""
    if os.environ.get("DIPTYCH_CACHE"):
        return Path(os.environ["DIPTYCH_CACHE"]).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(home).expanduser() / "diptych" / "downloads"
