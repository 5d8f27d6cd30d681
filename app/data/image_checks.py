"""Find damaged image files, and copies of the same image in several stages."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from app.data.images import DECODE_ERRORS, IMAGE_FORMATS
from app.data.split import printable
from app.runtime.errors import UserError

END_MARKS = {"JPEG": (-2, b"\xff\xd9"), "PNG": (-8, b"IEND")}  # position from the end, and bytes
MAX_DECODED_BYTES = 64 * 2**20  # of all files together; a second or two
MAX_LISTED = 20
NUM_THREADS = 8


def check_images(files: Sequence[Path]) -> None:
    """Check that all files are images and complete.

    If they are many bytes, only headers and ends are read, except of files without the usual end.

    Raises:
        UserError: Lists the files that cannot be read.
    """
    should_decode = _total_bytes(files) <= MAX_DECODED_BYTES
    problem_of = partial(image_problem, should_decode=should_decode)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        problems = pool.map(problem_of, files)
    bad = [f"{printable(path)}: {text}" for path, text in zip(files, problems, strict=True) if text]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(files)} images cannot be read; repair or remove them:"
            f"{join_lines(bad)}"
        )


def _total_bytes(files: Sequence[Path]) -> int:
    total = 0
    for file in files:
        with suppress(OSError):  # reported by `image_problem`
            total += file.stat().st_size
    return total


def image_problem(path: Path, should_decode: bool = False) -> str | None:
    """Return what is wrong with an image file, or None.

    Args:
        path: The file.
        should_decode: Whether to decode it even if it has the usual end.
    """
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if should_decode or not _is_complete(path, image.format):
                image.load()
    except UnidentifiedImageError:
        return f"not an image; allowed: {', '.join(IMAGE_FORMATS)}"
    except DECODE_ERRORS as error:
        return str(error)
    return None


def _is_complete(path: Path, format: str | None) -> bool:
    if format not in END_MARKS:
        return False
    position, mark = END_MARKS[format]
    with path.open("rb") as file:
        file.seek(-16, 2)
        return file.read()[position:].startswith(mark)


def find_duplicates(files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Return a warning if stages share images, byte by byte; else nothing.

    Args:
        files: The files of each stage.
    """
    by_size: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for stage, paths in files.items():
        for path in paths:
            by_size[path.stat().st_size].append((stage, path))
    pairs = [pair for same in by_size.values() if _stages(same) > 1 for pair in _copies(same)]
    if not pairs:
        return []
    lines = [
        f"{printable(first)} ({a}) = {printable(second)} ({b})" for (a, first), (b, second) in pairs
    ]
    return [
        f"{len(pairs)} images are also in another stage, so that its results look better than "
        f"they are:{join_lines(lines)}"
    ]


def _stages(members: Sequence[tuple[str, Path]]) -> int:
    return len({stage for stage, _ in members})


def _copies(
    members: Sequence[tuple[str, Path]],
) -> list[tuple[tuple[str, Path], tuple[str, Path]]]:
    """Return the members of another stage than the first one with the same content, and that."""
    by_digest: dict[bytes, list[tuple[str, Path]]] = defaultdict(list)
    for stage, path in members:
        by_digest[hashlib.sha256(path.read_bytes()).digest()].append((stage, path))
    return [
        (same[0], other) for same in by_digest.values() for other in same if other[0] != same[0][0]
    ]


def join_lines(lines: Sequence[str]) -> str:
    """Return each line on one of its own, indented; the first 20 of them."""
    more = [f"and {len(lines) - MAX_LISTED} more"] * (len(lines) > MAX_LISTED)
    return "".join(f"\n    {line}" for line in [*lines[:MAX_LISTED], *more])
