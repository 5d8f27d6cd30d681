"""Metrics of generated images that compare the features of a network (FID, KID, LPIPS)."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, image
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.kid import poly_mmd
from torchmetrics.utilities import dim_zero_cat
from torchvision import models

from app.metrics.function import SampleMean
from app.runtime.extras import import_extra

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_FEATURES = (64, 192, 768, 2048)
BACKBONES: dict[str, models.WeightsEnum] = {
    "alex": models.AlexNet_Weights.DEFAULT,
    "vgg": models.VGG16_Weights.DEFAULT,
    "squeeze": models.SqueezeNet1_1_Weights.DEFAULT,
}


class FrechetInceptionDistance(image.FrechetInceptionDistance):
    """Fréchet distance between Gaussian fits of generated and real features (FID).

    NaN for fewer than two images. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule
    Converge to a Local Nash Equilibrium", 2017.

    Args:
        feature: Module that maps images to features (N, d), or the number of features of the
            standard Inception network: 64, 192, 768 or 2048.
        feature_weights: Weights file of the Inception network; None looks in the torch.hub folder.
        normalize: Whether images for the Inception network are in [0, 1] instead of [0, 255].
        image_size: Channels, height and width of the input of a custom module; only used to find d
            if the module has no attribute `num_features`.
    """

    def __init__(
        self,
        feature: nn.Module | int = 2048,
        feature_weights: str | None = None,
        normalize: bool = True,
        image_size: Sequence[int] = (3, 299, 299),
    ) -> None:
        channels, height, width = image_size
        super().__init__(
            feature=make_feature_extractor(feature, feature_weights, normalize),
            normalize=True,
            input_img_size=(channels, height, width),
        )
        self.orig_dtype = torch.float64  # dtype of the value; every update overwrites it

    def update(self, output: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add generated and real images, each of shape (N, C, H, W) and of floating-point type."""
        super().update(output, real=False)
        super().update(target, real=True)

    def compute(self) -> Tensor:
        if min(self.real_features_num_samples, self.fake_features_num_samples) < 2:
            return torch.tensor(torch.nan, device=self.device)
        return super().compute()


class KernelInceptionDistance(Metric):
    """Squared maximum mean discrepancy of features with a polynomial kernel (KID).

    The kernel is `(gamma * x·y + coef) ** degree`; the value is the mean over random subsets of the
    images of the stage. Bińkowski et al., "Demystifying MMD GANs", 2018.

    Args:
        feature: See `FrechetInceptionDistance`.
        feature_weights: See `FrechetInceptionDistance`.
        subset_size: Number of images in a subset, at least 2 and at most that of the stage.
        subsets: Number of subsets.
        degree: Degree of the kernel.
        gamma: Scale of the kernel; None means 1 / number of features.
        coef: Constant of the kernel.
        normalize: See `FrechetInceptionDistance`.
        seed: Seed of the choice of subsets; the global random state is not used.
    """

    higher_is_better = False
    full_state_update = False
    collects_in_update = True
    output_features: list[Tensor]
    target_features: list[Tensor]

    def __init__(
        self,
        feature: nn.Module | int = 2048,
        feature_weights: str | None = None,
        subset_size: int = 50,
        subsets: int = 100,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_kernel(subset_size, subsets, degree, gamma)
        self.feature = make_feature_extractor(feature, feature_weights, normalize)
        self.subset_size = subset_size
        self.subsets = subsets
        self.degree = degree
        self.gamma = gamma
        self.coef = coef
        self.seed = seed
        self.add_state("output_features", [], dist_reduce_fx="cat")
        self.add_state("target_features", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add generated and real images, each of shape (N, C, H, W) and of floating-point type."""
        self.output_features.append(self.feature(output))
        self.target_features.append(self.feature(target))

    def compute(self) -> Tensor:
        """Return the mean over the subsets.

        Raises:
            ValueError: The stage has fewer images than a subset.
        """
        features = [dim_zero_cat(s).double() for s in (self.target_features, self.output_features)]
        num_images = min(len(part) for part in features)
        if num_images < self.subset_size:
            raise ValueError(
                f"subset_size={self.subset_size} is more than the {num_images} images of the "
                "stage; set a smaller one"
            )
        generator = torch.Generator().manual_seed(self.seed)
        scores = [self._score_subset(features, generator) for _ in range(self.subsets)]
        return torch.stack(scores).mean()

    def _score_subset(self, features: list[Tensor], generator: torch.Generator) -> Tensor:
        subsets = [
            torch.randperm(len(part), generator=generator)[: self.subset_size] for part in features
        ]
        real, generated = (part[index] for part, index in zip(features, subsets, strict=True))
        return poly_mmd(real, generated, self.degree, self.gamma, self.coef)


class FeatureDistance(SampleMean):
    """Mean over samples of the squared distance between the features of output and target.

    Args:
        feature: Module that maps outputs and targets, such as images, to features (N, ...).
    """

    higher_is_better = False

    def __init__(self, feature: nn.Module) -> None:
        super().__init__()
        self.feature = freeze(feature)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add pairs of shape (N, ...), as the module accepts them."""
        self.total += (self.feature(output) - self.feature(target)).square().sum()
        self.count += len(target)


class LPIPS(SampleMean):
    """Mean learned perceptual distance of image pairs (LPIPS); 0 for identical images.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.

    Args:
        net: Backbone, `alex`, `vgg` or `squeeze`.
        normalize: Whether images are in [0, 1] instead of [-1, 1].
        feature_weights: Weights file of the backbone in the format of torchvision; None looks in
            the torch.hub folder.
    """

    higher_is_better = False

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        normalize: bool = True,
        feature_weights: str | None = None,
    ) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"net={net!r} is not valid; allowed: {', '.join(BACKBONES)}")
        path = find_weights(feature_weights, BACKBONES[net].url)
        self.net = _NoTrainLpips(net=net, pnet_rand=True)
        _load_backbone(self.net.net, path)
        self.normalize = normalize

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add pairs of floating-point images, of shape (N, 3, H, W) or (N, 1, H, W)."""
        pairs = to_rgb(output), to_rgb(target)
        self.total += self.net(*pairs, normalize=self.normalize).sum()
        self.count += len(target)


class Inception(nn.Module):
    """Inception network of FID and KID, equivalent to the TensorFlow version of 2015.

    Args:
        num_features: Number of features, 64, 192, 768 or 2048.
        weights: Weights file.
        normalize: Whether images are in [0, 1] instead of [0, 255].
    """

    def __init__(self, num_features: int, weights: Path, normalize: bool) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = 255 if normalize else 1
        self.network = NoTrainInceptionV3(
            "inception-v3-compat", [str(num_features)], feature_extractor_weights_path=str(weights)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, num_features) of images (N, 3, H, W) or (N, 1, H, W)."""
        features: Tensor = self.network((to_rgb(images) * self.scale).clamp(0, 255).byte())
        return features


def make_feature_extractor(
    feature: nn.Module | int, weights: str | None, normalize: bool
) -> nn.Module:
    """Return a custom module, frozen, or the Inception network with that many features."""
    if isinstance(feature, nn.Module):
        return freeze(feature)
    if feature not in INCEPTION_FEATURES:
        allowed = ", ".join(map(str, INCEPTION_FEATURES))
        raise ValueError(f"feature={feature!r} is not valid; allowed: {allowed}, or a module")
    import_extra("torch_fidelity", "generation")
    return Inception(feature, find_weights(weights, INCEPTION_URL), normalize)


def freeze(module: nn.Module) -> nn.Module:
    """Put a module in evaluation mode and disable its gradients."""
    return module.eval().requires_grad_(False)


def find_weights(given: str | None, url: str) -> Path:
    """Return the given weights file, or else the one that torch.hub caches for a URL.

    Nothing is downloaded.

    Raises:
        ValueError: The file does not exist, or contains anything but tensors and plain values.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    path = cached if given is None else Path(given).expanduser()
    if not path.is_file():
        raise ValueError(
            f"feature_weights={given}: there is no file {path}; "
            f"download {url} to that path, or set the path of your copy"
        )
    try:  # Check first: torch-fidelity would unpickle the file and execute any code in it.
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"feature_weights={given}: {path} does not contain plain weights: {reason}"
        ) from error
    return path


def to_rgb(images: Tensor) -> Tensor:
    """Return images with three channels; a single channel is repeated."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected: (N, 3, H, W) or (N, 1, H, W)"
        )
    return images.expand(-1, 3, -1, -1)


def _load_backbone(slices: nn.Module, path: Path) -> None:
    """Load torchvision's `features.3.weight` as `slice2.3.weight` or `slices.1.3.weight`."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = {name: re.sub(r"^slices?\.?\d+", "features", name) for name in slices.state_dict()}
    if missing := sorted(set(names.values()) - set(weights)):
        raise ValueError(f"feature_weights={path} is of another network: it has no {missing[0]}")
    slices.load_state_dict({name: weights[source] for name, source in names.items()})


def _check_kernel(subset_size: int, subsets: int, degree: int, gamma: float | None) -> None:
    integers = {"subset_size": (subset_size, 2), "subsets": (subsets, 1), "degree": (degree, 1)}
    for name, (value, minimum) in integers.items():
        if value < minimum:
            raise ValueError(f"{name}={value!r} must be at least {minimum}")
    if gamma is not None and gamma <= 0:
        raise ValueError(f"gamma={gamma!r} must be above 0, or null")
