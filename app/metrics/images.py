"""Distances of generated images to real ones, by the features that a network finds in them."""

from __future__ import annotations

import importlib.util
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
    """Fréchet distance between the normal distributions of generated and real features (FID).

    NaN below two images. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to
    a Local Nash Equilibrium", 2017.

    Args:
        feature: A module from images to features (N, d), or 64, 192, 768 or 2048: that many of
            the standard Inception.
        feature_weights: The Inception's weights file; None is its file in torch.hub's folder.
        normalize: Whether images for the Inception lie in [0, 1], and not in [0, 255].
        image_size: Channels, height and width that a module of one's own takes; only to find its
            d where it has no attribute `num_features`.
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
            feature=extractor(feature, feature_weights, normalize),
            normalize=True,
            input_img_size=(channels, height, width),
        )
        self.orig_dtype = torch.float64  # of the value, until an update says otherwise

    def update(self, output: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Generated and real images, each of shape (N, C, H, W), floats."""
        super().update(output, real=False)
        super().update(target, real=True)

    def compute(self) -> Tensor:
        """A scalar."""
        if min(self.real_features_num_samples, self.fake_features_num_samples) < 2:
            return torch.tensor(torch.nan, device=self.device)
        return super().compute()


class KernelInceptionDistance(Metric):
    """Squared maximum mean discrepancy of features under a polynomial kernel (KID).

    The kernel is (gamma x·y + coef) ** degree; the value is the mean over random subsets of the
    stage. Bińkowski et al., "Demystifying MMD GANs", 2018.

    Args:
        feature: As in `FrechetInceptionDistance`.
        feature_weights: As there.
        subset_size: Images in a subset, at least 2 and at most those of the stage.
        subsets: How many of them.
        degree: Of the kernel.
        gamma: Of the kernel; None is one by the number of features.
        coef: Of the kernel.
        normalize: As in `FrechetInceptionDistance`.
        seed: Of the choice of subsets, which no other random number depends on.
    """

    is_differentiable = False
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
        self.feature = extractor(feature, feature_weights, normalize)
        self.subset_size = subset_size
        self.subsets = subsets
        self.degree = degree
        self.gamma = gamma
        self.coef = coef
        self.seed = seed
        self.add_state("output_features", [], dist_reduce_fx="cat")
        self.add_state("target_features", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Generated and real images, each of shape (N, C, H, W), floats."""
        self.output_features.append(self.feature(output))
        self.target_features.append(self.feature(target))

    def compute(self) -> Tensor:
        """A scalar, the mean over the subsets.

        Raises:
            ValueError: The stage has fewer images than a subset.
        """
        features = [dim_zero_cat(s).double() for s in (self.target_features, self.output_features)]
        fewest = min(len(part) for part in features)
        if fewest < self.subset_size:
            raise ValueError(
                f"subset_size={self.subset_size} is more than the {fewest} images of the stage; "
                "give fewer"
            )
        random = torch.Generator().manual_seed(self.seed)
        scores = [self._score(features, random) for _ in range(self.subsets)]
        return torch.stack(scores).mean()

    def _score(self, features: list[Tensor], random: torch.Generator) -> Tensor:
        chosen = [torch.randperm(len(f), generator=random)[: self.subset_size] for f in features]
        real, generated = (part[index] for part, index in zip(features, chosen, strict=True))
        return poly_mmd(real, generated, self.degree, self.gamma, self.coef)


class FeatureDistance(Metric):
    """The mean over samples of the squared distance between output's and target's features.

    Args:
        feature: A module from images, or whatever outputs and targets are, to features (N, ...).
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, feature: nn.Module) -> None:
        super().__init__()
        self.feature = frozen(feature)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Pairs, each of shape (N, ...) as the module takes it."""
        self.total += (self.feature(output) - self.feature(target)).square().sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        """A scalar."""
        return self.total / self.count


class LPIPS(Metric):
    """Learned perceptual distance of image pairs, mean over the stage; 0 for equal images.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.

    Args:
        net: `alex`, `vgg` or `squeeze`.
        normalize: Whether images lie in [0, 1], and not in [-1, 1].
        feature_weights: The weights file of that network as torchvision gives it; None is its
            file in torch.hub's folder.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        normalize: bool = True,
        feature_weights: str | None = None,
    ) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"net={net!r} is not known; allowed: {', '.join(BACKBONES)}")
        path = weights_file(feature_weights, BACKBONES[net].url)
        self.net = _NoTrainLpips(net=net, pnet_rand=True)
        _load_backbone(self.net.net, path)
        self.normalize = normalize
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Images of shape (N, 3, H, W) or (N, 1, H, W), floats."""
        pairs = rgb(output), rgb(target)
        self.total += self.net(*pairs, normalize=self.normalize).sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        """A scalar."""
        return self.total / self.count


class Inception(nn.Module):
    """The Inception of FID and KID: the activations that TensorFlow's of 2015 had.

    Args:
        num_features: 64, 192, 768 or 2048.
        weights: Its file.
        normalize: Whether images lie in [0, 1], and not in [0, 255].
    """

    def __init__(self, num_features: int, weights: Path, normalize: bool) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = 255 if normalize else 1
        self.network = NoTrainInceptionV3(
            "inception-v3-compat", [str(num_features)], feature_extractor_weights_path=str(weights)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, d) of images (N, 3, H, W) or (N, 1, H, W)."""
        found: Tensor = self.network((rgb(images) * self.scale).clamp(0, 255).byte())
        return found


def extractor(feature: nn.Module | int, weights: str | None, normalize: bool) -> nn.Module:
    """The user's own module, or the Inception with that many features."""
    if isinstance(feature, nn.Module):
        return frozen(feature)
    if feature not in INCEPTION_FEATURES:
        allowed = ", ".join(map(str, INCEPTION_FEATURES))
        raise ValueError(f"feature={feature!r} is not known; allowed: {allowed}, or a module")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(f'feature={feature} needs torch-fidelity; pip install -e ".[generation]"')
    return Inception(feature, weights_file(weights, INCEPTION_URL), normalize)


def frozen(module: nn.Module) -> nn.Module:
    """The module itself, which does not learn and whose layers act as in evaluation."""
    return module.eval().requires_grad_(False)


def weights_file(given: str | None, url: str) -> Path:
    """The file given, or else the one that torch.hub keeps of that address.

    Raises:
        ValueError: It is not there; nothing is downloaded.
    """
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    path = kept if given is None else Path(given).expanduser()
    if not path.is_file():
        raise ValueError(
            f"feature_weights={given}: there is no file {path}; "
            f"download {url} to there, or give the path of your copy"
        )
    try:  # torch-fidelity would execute whatever the file holds
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"feature_weights={given}: {path} holds no plain weights: {reason}"
        ) from error
    return path


def rgb(images: Tensor) -> Tensor:
    """Images of three channels; a single one is repeated."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images of shape {tuple(images.shape)} do not fit; wanted: (N, 3, H, W), (N, 1, H, W)"
        )
    return images.expand(-1, 3, -1, -1)


def _load_backbone(slices: nn.Module, path: Path) -> None:
    """Loads torchvision's `features.3.weight` where `slice2.3.weight` or `slices.1.3.weight` is."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = {name: re.sub(r"^slices?\.?\d+", "features", name) for name in slices.state_dict()}
    if missing := sorted(set(names.values()) - set(weights)):
        raise ValueError(f"feature_weights={path} are of another network: no {missing[0]} in them")
    slices.load_state_dict({name: weights[theirs] for name, theirs in names.items()})


def _check_kernel(subset_size: int, subsets: int, degree: int, gamma: float | None) -> None:
    whole = {"subset_size": (subset_size, 2), "subsets": (subsets, 1), "degree": (degree, 1)}
    for name, (value, low) in whole.items():
        if value < low:
            raise ValueError(f"{name}={value!r} is too few; give at least {low}")
    if gamma is not None and gamma <= 0:
        raise ValueError(f"gamma={gamma!r} must be above 0, or null")
