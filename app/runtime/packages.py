"""The installed packages."""

from __future__ import annotations

import os
import re
import sys
from functools import cache

METADATA_FOLDER = re.compile(r"(.+?)-([^-]+)(?:-py[\d.]+)?\.(?:dist|egg)-info")


@cache
def installed_packages() -> dict[str, str]:
    """Return the version of each installed package, sorted by name.

    The names of the folders with their metadata contain both. To read the metadata themselves, as
    `importlib.metadata` does, takes a hundred times as long.
    """
    versions: dict[str, str] = {}
    for folder in sys.path:
        if os.path.isdir(folder):  # noqa: PTH112 - not the entry "", and no archive
            for name in os.listdir(folder):  # noqa: PTH208
                if match := METADATA_FOLDER.fullmatch(name):
                    # Packages of earlier folders are imported first.
                    versions.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return dict(sorted(versions.items()))
