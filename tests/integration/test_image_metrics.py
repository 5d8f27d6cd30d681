"""Image metrics, compared with independent implementations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from scipy import linalg, ndimage
from torch import Tensor, nn
from torchmetrics.functional.image import lpips
from torchvision import models

from app.metrics.images import (
    BACKBONES,
    LPIPS,
    FeatureDistance,
    FrechetInceptionDistance,
    KernelInceptionDistance,
)
from app.runtime.errors import UserError
from tests.support.metrics import (
    Array,
    Projection,
    Reference,
    assert_metric_equals,
    evaluate,
    make_images,
    make_metric,
)


def gaussian_blur(images: Array) -> Array:
    """Apply the window of SSIM: sigma of 1.5 pixels, 11 pixels wide, mirrored at the borders."""
    blurred: Array = ndimage.gaussian_filter(images, (0, 0, 1.5, 1.5), mode="mirror", truncate=3.5)
    return blurred


def ssim_maps(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Return SSIM per pixel and its contrast-structure term: Wang et al., 2004, eq. 13."""
    x, y = gaussian_blur(outputs), gaussian_blur(targets)
    variance_x, variance_y = gaussian_blur(outputs**2) - x**2, gaussian_blur(targets**2) - y**2
    covariance = gaussian_blur(outputs * targets) - x * y
    contrast = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (2 * x * y + 0.01**2) / (x**2 + y**2 + 0.01**2) * contrast, contrast


def ms_ssim(outputs: Array, targets: Array) -> Any:
    """Return MS-SSIM: Wang et al., 2003, eq. 7; only pixels whose window is inside the image."""
    total = np.ones(len(outputs))
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for level, weight in enumerate(weights):
        ssim, contrast = ssim_maps(outputs, targets)
        values = ssim if level == 4 else contrast[..., 5:-5, 5:-5]
        total *= values.mean(axis=(1, 2, 3)) ** weight
        outputs, targets = downsample(outputs), downsample(targets)
    return total.mean()


def downsample(images: Array) -> Array:
    even = images[..., : images.shape[-2] // 2 * 2, : images.shape[-1] // 2 * 2]
    quarters = [even[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return np.mean(quarters, axis=0)


IMAGES: dict[str, tuple[int, Reference]] = {
    "mse": (16, lambda x, y: ((x - y) ** 2).mean()),
    "ms_ssim": (176, ms_ssim),
    "psnr": (16, lambda x, y: 10 * np.log10(1 / ((x - y) ** 2).mean())),
    "ssim": (24, lambda x, y: ssim_maps(x, y)[0].mean()),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_image_metric_matches_reference(name: str, channels: int) -> None:
    size, reference = IMAGES[name]
    outputs, targets = make_images(size, channels, n=7)
    expected = reference(outputs.double().numpy(), targets.double().numpy())
    # The metric computes variances in float32.
    assert_metric_equals(make_metric(name), outputs, targets, expected, rtol=1e-4)


def project(images: Tensor) -> Array:
    linear = Projection().layers[1]
    weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
    return np.tanh(images.flatten(1).double().numpy() @ weight.T + bias)


def test_fid_matches_reference() -> None:
    outputs, targets = make_images(6, n=40)
    x, y = project(outputs), project(targets)
    variance_x, variance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(variance_x @ variance_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(variance_x + variance_y - 2 * root)
    # The number of features is found from the image size.
    metric = make_metric("fid", feature=Projection(), feature_weights=None, image_size=[3, 6, 6])
    assert_metric_equals(metric, outputs, targets, expected, rtol=1e-4)  # features in float32


def test_fid_of_one_image_is_nan() -> None:
    metric = FrechetInceptionDistance(Projection(), image_size=(3, 6, 6))
    assert np.isnan(evaluate(metric, *make_images(6, n=1), [1]))


def test_kid_of_complete_set_matches_reference() -> None:
    outputs, targets = make_images(6, n=30)
    x, y = project(outputs), project(targets)
    xx, yy, xy = (a @ b.T / 8 + 1 for a, b in ((x, x), (y, y), (x, y)))
    same = sum((k**3).sum() - (np.diag(k) ** 3).sum() for k in (xx, yy)) / (30 * 29)
    metric = make_metric(
        "kid", feature=Projection(), feature_weights=None, subset_size=30, subsets=3
    )
    expected = same - 2 * (xy**3).mean()
    assert_metric_equals(metric, outputs, targets, expected, rtol=1e-4)  # features in float32


def test_kid_subsets_depend_on_its_seed_only() -> None:
    outputs, targets = make_images(6, n=30)
    state = torch.get_rng_state()
    first, again, other = (
        evaluate(KernelInceptionDistance(extractor, subset_size=10, seed=s), outputs, targets, [30])
        for extractor in [Projection()]
        for s in (0, 0, 1)
    )
    assert first == again != other
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    evaluate(KernelInceptionDistance(nn.Flatten(), subset_size=10), outputs, targets, [30])
    assert torch.rand(1) == expected


def test_feature_distance_matches_reference() -> None:
    outputs, targets = make_images(6)
    expected = ((project(outputs) - project(targets)) ** 2).sum(axis=1).mean()
    assert_metric_equals(FeatureDistance(Projection()), outputs, targets, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file of a randomly initialized Inception network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["64"], str(path))
    torch.save(network.state_dict(), path)
    return path


def test_fid_with_inception_matches_torchmetrics(inception_weights: Path) -> None:
    outputs, targets = make_images(20, channels=1, n=4)
    path = str(inception_weights)
    metric = make_metric("fid", feature=64, feature_weights=path)
    reference = torchmetrics.image.FrechetInceptionDistance(
        64, normalize=True, feature_extractor_weights_path=path
    )
    reference.update(outputs.expand(-1, 3, -1, -1), real=False)
    reference.update(targets.expand(-1, 3, -1, -1), real=True)
    expected = reference.compute().item()
    # The matrix square root of rank 3 in 64 dimensions magnifies float32 errors of the features.
    assert evaluate(metric, outputs, targets, [3, 1]) == pytest.approx(expected, rel=1e-3)
    metric = make_metric("fid", feature=64, feature_weights=path, normalize=False)
    assert evaluate(metric, 255 * outputs, 255 * targets, [4]) == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def hub_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty weights folder of torch.hub; downloading fails the test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_matches_torchmetrics(
    net: str, name: str, hub_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    backbone = getattr(models, name)(weights=None).features
    weights = {f"features.{key}": tensor for key, tensor in backbone.state_dict().items()}
    path = hub_checkpoints / Path(BACKBONES[net].url).name
    torch.save(weights, path)
    by_hub, by_path = (
        make_metric("lpips", net=net),
        make_metric("lpips", net=net, feature_weights=str(path)),
    )
    outputs, targets = make_images(64, channels=1, n=6)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: backbone)
    expected = lpips.learned_perceptual_image_patch_similarity(
        outputs.expand(-1, 3, -1, -1), targets.expand(-1, 3, -1, -1), net, normalize=True
    ).item()
    assert expected > 0
    assert_metric_equals(by_hub, outputs, targets, expected)
    assert_metric_equals(by_path, outputs, targets, expected)
    assert evaluate(by_hub, targets, targets, [6]) == 0


@pytest.mark.usefixtures("hub_checkpoints")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_metric("lpips"), r"checkpoints/alexnet-owt-7be5be79.pth; download https://"),
        (lambda: make_metric("lpips", feature_weights="no.pth"), "there is no file no.pth"),
        (lambda: make_metric("lpips", net="vgg"), "checkpoints/vgg16-397923af.pth"),
        (lambda: make_metric("fid", feature_weights="no.pth"), "there is no file no.pth"),
        (lambda: make_metric("kid", feature_weights="no.pth"), "there is no file no.pth"),
        (lambda: FrechetInceptionDistance(), "checkpoints/weights-inception-2015-12-05-6726825d"),
        (lambda: FrechetInceptionDistance(100), "feature=100 is not valid; allowed: 64, 192, 768"),
        (lambda: LPIPS("resnet"), "net='resnet' is not valid; allowed: alex, vgg, squeeze"),
        (
            lambda: KernelInceptionDistance(nn.Flatten(), subset_size=1),
            "subset_size=1 must be at least 2",
        ),
        (lambda: KernelInceptionDistance(nn.Flatten(), gamma=0), "gamma=0 must be above 0"),
    ],
)
def test_image_metric_with_invalid_arguments_raises(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_lpips_with_weights_of_another_network_raises(hub_checkpoints: Path) -> None:
    torch.save({"layer.weight": torch.zeros(1)}, hub_checkpoints / "other.pth")
    with pytest.raises(
        ValueError, match=r"other.pth is of another network: it has no features.0.bias"
    ):
        LPIPS("alex", feature_weights=str(hub_checkpoints / "other.pth"))


def test_kid_with_fewer_images_than_a_subset_raises() -> None:
    metric = KernelInceptionDistance(nn.Flatten())
    with pytest.raises(ValueError, match="subset_size=50 is more than the 12 images"):
        evaluate(metric, *make_images(6), [12])


class MaliciousObject:
    """Object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (Path("evil"),)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_weights_file_with_code_raises_and_does_not_run_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": MaliciousObject()}, tmp_path / "weights.pth")
    with pytest.raises(
        (ValueError, UserError), match=r"weights\.pth does not contain plain weights"
    ):
        make_metric(name, feature_weights=str(tmp_path / "weights.pth"))
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with pytest.raises(
        (ValueError, UserError), match=r"damaged\.pth does not contain plain weights"
    ):
        make_metric(name, feature_weights=str(tmp_path / "damaged.pth"))
    assert not (tmp_path / "evil").exists()
