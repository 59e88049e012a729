"""Folders that tests share."""

from __future__ import annotations

import os
from pathlib import Path


def unwritable(tmp_path: Path) -> Path:
    """A folder in which nobody may make a file, not even root."""
    if os.geteuid() == 0:
        return Path("/sys")
    folder = tmp_path / "unwritable"
    folder.mkdir(mode=0o500)
    return folder
