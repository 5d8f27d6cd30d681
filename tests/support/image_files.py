"""Folders of small image files."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.data.boxed_shapes import boxed_shapes
from app.data.shapes import shapes


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


def write_jpegs(root: Path, names: list[str], count: int) -> None:
    """Write many small JPEG files, the same picture with a different comment in each.

    Args:
        root: Folder of the class folders.
        names: Names of the classes.
        count: Number of files per class.
    """
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    start, rest = buffer.getvalue()[:2], buffer.getvalue()[2:]
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(count):
            comment = f"{name} {index:05}".encode()
            marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
            (root / name / f"{index:05}.jpg").write_bytes(start + marker + rest)


def damage_image(path: Path) -> None:
    """Overwrite compressed data in the middle of a PNG or JPEG file; its beginning and end stay."""
    content = bytearray(path.read_bytes())
    begin = content.index(b"\xff\xc4") + 5 if path.suffix == ".jpg" else len(content) // 2
    content[begin : begin + 16] = b"\xff" * 16
    path.write_bytes(content)


def write_mask_folder(root: Path, count: int, size: int = 32, seed: int = 0) -> None:
    """Write pictures of shapes to `images/000.png`, and their masks to `masks/000.png`, mode L.

    Args:
        root: Folder of both folders.
        count: Number of pictures.
        size: Height in pixels; every other picture is wider by 8.
        seed: Seed of the pictures.
    """
    pictures, masks = shapes(count, size, seed).tensors
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for index, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        width = size + 8 * (index % 2)
        for folder, values in (("images", picture[0] * 255), ("masks", mask)):
            image = Image.fromarray(values.numpy().astype(np.uint8))
            image.resize((width, size), Image.Resampling.NEAREST).save(
                root / folder / f"{index:03d}.png"
            )


def write_coco_folder(root: Path, count: int, size: int = 32, seed: int = 0) -> dict[str, Any]:
    """Write pictures of shapes to `images/000.png`, and their boxes to `boxes.json`.

    Args:
        root: Folder of both.
        count: Number of pictures.
        size: Height in pixels; every other picture is wider by 8.
        seed: Seed of the pictures.

    Returns:
        The content of `boxes.json`; ids of images begin at 10, of categories at 3, of annotations
        at 100.
    """
    shapes = boxed_shapes(count, size, seed)
    (root / "images").mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 7, "name": "rectangle"}, {"id": 3, "name": "circle"}]
    for index, (image, boxes, labels) in enumerate(
        zip(shapes.images, shapes.boxes, shapes.labels, strict=True)
    ):
        name, width = f"{index:03d}.png", size + 8 * (index % 2)
        canvas = Image.new("L", (width, size))
        canvas.paste(Image.fromarray(image[0].numpy()))
        canvas.save(root / "images" / name)
        picture = {"id": 10 + index, "file_name": name, "height": size, "width": width}
        content["images"].append(picture)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            content["annotations"].append(
                {
                    "id": 100 + len(content["annotations"]),
                    "image_id": 10 + index,
                    "category_id": (3, 7)[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    write_boxes(root, content)
    return content


def write_boxes(root: Path, content: object) -> None:
    """Write annotations to `boxes.json`."""
    (root / "boxes.json").write_text(json.dumps(content))
