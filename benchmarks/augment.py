"""Measure augmentations of whole batches against torchvision's, one image after the other.

    python -m benchmarks.augment --device cuda

Both draw for each image. They alternate in this process for several rounds; the script prints
images per second and the median ratio. Images are bytes, as in a cached dataset.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from app.data import augment
from benchmarks.overhead import Summary, summarize
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--rounds", "1", "--side", "32")
Transform = Callable[[Tensor], Tensor]
BILINEAR = v2.InterpolationMode.BILINEAR

PAIRS: dict[str, tuple[Transform, Transform]] = {
    "RandomResizedCrop(224)": (augment.RandomResizedCrop(224), v2.RandomResizedCrop(224)),
    "RandomHorizontalFlip": (augment.RandomHorizontalFlip(), v2.RandomHorizontalFlip()),
    "RandomAffine": (
        augment.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5, "bilinear"),
        v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5, BILINEAR),
    ),
    "ColorJitter": (
        augment.ColorJitter(0.4, 0.4, 0.4, 0.1),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    ),
    "RandomGrayscale": (augment.RandomGrayscale(), v2.RandomGrayscale()),
    "GaussianBlur(9)": (augment.GaussianBlur(9), v2.GaussianBlur(9)),
    "RandomErasing": (augment.RandomErasing(), v2.RandomErasing()),
    "TrivialAugmentWide": (augment.TrivialAugmentWide(), v2.TrivialAugmentWide()),
    "RandAugment": (augment.RandAugment(), v2.RandAugment()),
}


def rate(transform: Transform, images: Tensor) -> float:
    """Return images per second."""
    is_cuda = images.device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    transform(images)
    if is_cuda:
        torch.cuda.synchronize()
    return len(images) / (time.perf_counter() - start)


def compare(ours: Transform, theirs: Transform, images: Tensor, rounds: int) -> Summary:
    """Return the rates and their ratios; the order alternates between rounds."""
    pairs = []
    for number in range(rounds + 1):  # the first round is a warm-up
        sides = (ours, theirs) if number % 2 else (theirs, ours)
        first, second = (rate(side, images) for side in sides)
        pairs.append((first, second) if number % 2 else (second, first))
    return summarize([pair[0] for pair in pairs[1:]], [pair[1] for pair in pairs[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--side", type=int, default=256, help="height and width of the images")
    parser.add_argument("--device", default="cpu")
    add_output_option(parser)
    options = parser.parse_args()
    shape = (options.batch_size, 3, options.side, options.side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=options.device)
    rows = [
        {
            "augmentation": name,
            **compare(ours, augment.PerImage(theirs), images, options.rounds),
        }
        for name, (ours, theirs) in PAIRS.items()
    ]
    title = f"Augmentations, {' x '.join(map(str, shape))}, images/s"
    notes = [f"{options.device}, {torch.get_num_threads()} threads; theirs is torchvision's."]
    publish([Table("augment", title, rows, notes)], options.out)


if __name__ == "__main__":
    main()
