"""Inputs, and comparisons with references, for tests of metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from omegaconf import OmegaConf
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import one_hot

from app.config.instantiate import Instantiator

Array = NDArray[Any]
Reference = Callable[[Array, Array], Any]  # from outputs and targets to the value

CONFIG_DIR = Path(__file__).parents[2] / "conf" / "metric" / "single"
NUM_SAMPLES = 60
NUM_CLASSES = 7
FLOAT32_RTOL = 2e-5  # torchmetrics computes in float32


def make_metric(name: str, num_classes: int = NUM_CLASSES, **changes: Any) -> torchmetrics.Metric:
    """Return the metric of a configuration file, with some arguments changed."""
    data = {"num_classes": num_classes, "ignore_index": None}
    tree = OmegaConf.create({"data": data, "metric": OmegaConf.load(CONFIG_DIR / f"{name}.yaml")})
    (node,) = OmegaConf.to_container(tree, resolve=True)["metric"].values()
    metric: torchmetrics.Metric = Instantiator()("metric", node | changes)
    return metric


def evaluate(
    metric: torchmetrics.Metric, outputs: Tensor, targets: Tensor, sizes: list[int]
) -> Array:
    """Return the value of a metric that is updated with batches of the given sizes."""
    metric.reset()
    for output, target in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        metric.update(output, target)
    return metric.compute().numpy()


def assert_metric_equals(
    metric: torchmetrics.Metric,
    outputs: Tensor,
    targets: Tensor,
    expected: Any,
    rtol: float = FLOAT32_RTOL,
) -> None:
    """Assert the value of a metric, whether updated with one, two or three batches."""
    n = len(targets)
    for sizes in ([n], [n - 3, 3], [4, 1, n - 5]):
        actual = evaluate(metric, outputs, targets, sizes)
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-7, err_msg=f"{sizes}")


def make_classification() -> tuple[Tensor, Tensor]:
    """Return logits of `NUM_CLASSES` classes, and labels that they predict in part."""
    torch.manual_seed(0)
    targets = torch.randint(0, NUM_CLASSES, (NUM_SAMPLES,))
    return torch.randn(NUM_SAMPLES, NUM_CLASSES) + 2 * one_hot(targets, NUM_CLASSES), targets


def make_regression(width: int) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of shape (NUM_SAMPLES, width)."""
    torch.manual_seed(1)
    targets = 3 * torch.randn(NUM_SAMPLES, width) + 1
    return targets + torch.randn_like(targets), targets


def make_segmentation(dims: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return logits and labels of 9 maps with blobs of 5 classes.

    The last class never occurs, others not in every map. The last map is background only.
    """
    random = np.random.default_rng(seed)
    size = (26, 22) if dims == 2 else (11, 9, 10)
    fields = ndimage.gaussian_filter(random.normal(size=(9, 5, *size)), (0, 0) + (2,) * dims)
    fields += 0.15 * random.normal(size=(9, 5) + (1,) * dims)
    noise = ndimage.gaussian_filter(random.normal(size=fields.shape), (0, 0) + (1,) * dims)
    logits = fields + 0.3 * noise
    for maps in (fields, logits):
        maps[:, 4] = -10
        maps[8, 0] = 10
    return torch.from_numpy(logits).float(), torch.from_numpy(fields.argmax(axis=1))


def make_images(size: int, channels: int = 3, n: int = 12) -> tuple[Tensor, Tensor]:
    """Return noisy images in [0, 1], and the same images without noise."""
    torch.manual_seed(3)
    targets = torch.rand(n, channels, size, size)
    return (0.8 * targets + 0.2 * torch.rand_like(targets)).clamp(0, 1), targets


class Projection(nn.Module):
    """Feature extractor of 8 features with fixed weights; its dropout is on in training mode."""

    def __init__(self, channels: int = 3, size: int = 6) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size**2, 8), nn.Tanh(), nn.Dropout(0.5)
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features
