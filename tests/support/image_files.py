"""Folders of small image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image_folder(
    root: Path, counts: dict[str, int], seed: int = 0, suffix: str = "png"
) -> None:
    """Write noise images, all different, into one folder per class.

    Args:
        root: Folder of the class folders.
        counts: Number of images per class.
        seed: Seed of the images.
        suffix: File type.
    """
    rng = np.random.default_rng([seed, len(str(root))])
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 128, (24 + 2 * (index % 3), 32, 3)) + 100 * (label % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.{suffix}")
