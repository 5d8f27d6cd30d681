"""Every metric that a configuration can name says what an independent reference says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from monai.metrics import compute_dice, compute_hausdorff_distance
from numpy.typing import NDArray
from omegaconf import OmegaConf
from scipy import linalg, ndimage
from sklearn import metrics as sklearn
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot
from torchmetrics.functional.image import lpips
from torchvision import models

from app.config.instantiate import Instantiator
from app.metrics.function import FunctionMetric
from app.metrics.images import (
    BACKBONES,
    LPIPS,
    FeatureDistance,
    FrechetInceptionDistance,
    KernelInceptionDistance,
)
from app.metrics.segmentation import (
    DiceScore,
    HausdorffDistance95,
    InstanceIoU,
    MeanIoU,
    PartialDice,
)
from app.metrics.stage_metrics import StageMetrics
from app.runtime.errors import UserError
from app.training.accumulator import StageAccumulator, average

Array = NDArray[Any]
Reference = Callable[[Array, Array], Any]
SINGLE = Path(__file__).parents[3] / "conf" / "metric" / "single"
SIZES = [23, 7, 29, 1]
CLASSES = 7
FLOAT32 = 2e-5  # torchmetrics computes in float32


def build(name: str, num_classes: int = CLASSES, **changes: Any) -> torchmetrics.Metric:
    """The metric of that file, some of its arguments changed."""
    data = {"num_classes": num_classes}
    tree = OmegaConf.create({"data": data, "metric": OmegaConf.load(SINGLE / f"{name}.yaml")})
    (node,) = OmegaConf.to_container(tree, resolve=True)["metric"].values()
    built: torchmetrics.Metric = Instantiator()("metric", node | changes)
    return built


def value(metric: torchmetrics.Metric, outputs: Tensor, targets: Tensor, sizes: list[int]) -> Array:
    metric.reset()
    for output, target in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        metric.update(output, target)
    return metric.compute().numpy()


def agrees(
    metric: torchmetrics.Metric,
    outputs: Tensor,
    targets: Tensor,
    expected: Any,
    rtol: float = FLOAT32,
) -> None:
    """Fed at once, in two batches and in unequal ones."""
    n = len(targets)
    for sizes in ([n], [n - 3, 3], [4, 1, n - 5]):
        found = value(metric, outputs, targets, sizes)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-7, err_msg=f"{sizes}")


def classified() -> tuple[Tensor, Tensor]:
    """Logits of 7 classes, and labels that they tell in part."""
    torch.manual_seed(0)
    targets = torch.randint(0, CLASSES, (sum(SIZES),))
    return torch.randn(sum(SIZES), CLASSES) + 2 * one_hot(targets, CLASSES), targets


def predicted(reference: Reference, **options: Any) -> Reference:
    return lambda logits, labels: reference(labels, logits.argmax(1), **options)


def probabilities(logits: Array) -> Array:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def specificity(logits: Array, labels: Array) -> Any:
    table = sklearn.confusion_matrix(labels, logits.argmax(1))
    right = np.diag(table)
    negatives = table.sum() - table.sum(axis=1)
    return ((negatives - (table.sum(axis=0) - right)) / negatives).mean()


def calibration_error(logits: Array, labels: Array) -> Any:
    confidence = probabilities(logits).max(axis=1)
    right = logits.argmax(1) == labels
    bins = np.ceil(confidence * 15)
    return sum(
        abs((confidence - right)[bins == number].sum()) / len(labels) for number in range(1, 16)
    )


CLASSIFICATION: dict[str, Reference] = {
    "accuracy": predicted(sklearn.accuracy_score),
    "accuracy_per_class": predicted(sklearn.recall_score, average=None),
    "accuracy_top5": lambda x, y: sklearn.top_k_accuracy_score(y, x, k=5),
    "auroc": lambda x, y: sklearn.roc_auc_score(y, probabilities(x), multi_class="ovr"),
    "average_precision": lambda x, y: sklearn.average_precision_score(
        np.eye(CLASSES)[y], probabilities(x)
    ),
    "calibration_error": calibration_error,
    "cohen_kappa": predicted(sklearn.cohen_kappa_score),
    "confusion_matrix": predicted(sklearn.confusion_matrix),
    "f1": predicted(sklearn.f1_score, average="macro"),
    "matthews": predicted(sklearn.matthews_corrcoef),
    "precision": predicted(sklearn.precision_score, average="macro"),
    "recall": predicted(sklearn.recall_score, average="macro"),
    "specificity": specificity,
    "total_correct": predicted(sklearn.accuracy_score, normalize=False),
}


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification(name: str) -> None:
    outputs, targets = classified()
    expected = CLASSIFICATION[name](outputs.double().numpy(), targets.numpy())
    agrees(build(name), outputs, targets, expected)


def cosine(outputs: Array, targets: Array) -> Any:
    lengths = np.linalg.norm(outputs, axis=1) * np.linalg.norm(targets, axis=1)
    return ((outputs * targets).sum(axis=1) / lengths).mean()


REGRESSION: dict[str, Reference] = {
    "cosine_similarity": cosine,
    "mae": lambda x, y: sklearn.mean_absolute_error(y, x),
    "mse": lambda x, y: sklearn.mean_squared_error(y, x),
    "r2": lambda x, y: sklearn.r2_score(y, x),
    "rmse": lambda x, y: np.sqrt(sklearn.mean_squared_error(y, x)),
}


def regressed(width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    targets = 3 * torch.randn(sum(SIZES), width) + 1
    return targets + torch.randn_like(targets), targets


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", REGRESSION)
def test_regression(name: str, width: int) -> None:
    outputs, targets = regressed(width)
    expected = REGRESSION[name](outputs.double().numpy(), targets.double().numpy())
    agrees(build(name), outputs, targets, expected)


def segmented(dims: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Logits and labels of 9 maps of blobs; of 5 classes the last never occurs, others not always.

    The last map is of background alone.
    """
    random = np.random.default_rng(seed)
    size = (26, 22) if dims == 2 else (11, 9, 10)
    fields = ndimage.gaussian_filter(random.normal(size=(9, 5, *size)), (0, 0) + (2,) * dims)
    fields += 0.15 * random.normal(size=(9, 5) + (1,) * dims)
    noise = ndimage.gaussian_filter(random.normal(size=fields.shape), (0, 0) + (1,) * dims)
    logits = fields + 0.3 * noise
    for each in (fields, logits):
        each[:, 4] = -10
        each[8, 0] = 10
    return torch.from_numpy(logits).float(), torch.from_numpy(fields.argmax(axis=1))


def hot(labels: Tensor) -> Tensor:
    return one_hot(labels, 5).movedim(-1, 1)


@pytest.fixture(params=[2, 3])
def maps(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return segmented(request.param)


def dice_of_stage(outputs: Tensor, targets: Tensor) -> Array:
    """MONAI's, of all pixels as those of one image; NaN where a class never occurs."""
    pixels = [hot(labels).movedim(1, 0).reshape(1, 5, -1) for labels in (outputs, targets)]
    found: Array = compute_dice(*pixels, include_background=True).numpy()[0]
    return found


def test_dice(maps: tuple[Tensor, Tensor]) -> None:
    expected = dice_of_stage(maps[0].argmax(1), maps[1])
    assert np.isnan(expected).tolist() == [False, False, False, False, True]
    agrees(build("dice", 5), *maps, expected[1:4].mean())
    agrees(build("dice", 5, include_background=True), *maps, expected[:4].mean())
    agrees(build("dice_per_class", 5), *maps, expected[1:])
    agrees(build("dice_per_class", 5, include_background=True), *maps, expected)
    agrees(PartialDice(5, [1, 3]), *maps, expected[[1, 3]].mean())
    agrees(PartialDice(5, [2, 4]), *maps, expected[2])


def jaccard(output: Tensor, target: Tensor, background: bool) -> Any:
    x, y = output.flatten().numpy(), target.flatten().numpy()
    labels = sorted((set(x) | set(y)) - (set() if background else {0}))
    return sklearn.jaccard_score(y, x, labels=labels, average="macro") if labels else np.nan


@pytest.mark.parametrize("background", [True, False])
def test_intersection_over_union(maps: tuple[Tensor, Tensor], background: bool) -> None:
    outputs, targets = maps[0].argmax(1), maps[1]
    metric = build("mean_iou", 5, include_background=background)
    agrees(metric, *maps, jaccard(outputs, targets, background))
    pairs = zip(outputs, targets, strict=True)
    of_images = [jaccard(output, target, background) for output, target in pairs]
    assert np.isnan(of_images[8]) == (not background)
    metric = build("instance_iou", 5, include_background=background)
    agrees(metric, *maps, np.nanmean(of_images))


@pytest.mark.filterwarnings("ignore:the (ground truth|prediction) of class")
@pytest.mark.filterwarnings("ignore:monai:FutureWarning")
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("percentile", [95.0, 100.0])
def test_hausdorff_distance(
    maps: tuple[Tensor, Tensor], percentile: float, background: bool
) -> None:
    outputs, targets = hot(maps[0].argmax(1)), hot(maps[1])
    distances = compute_hausdorff_distance(
        outputs, targets, include_background=True, percentile=percentile
    )
    in_both = outputs.flatten(2).any(dim=2) & targets.flatten(2).any(dim=2)
    in_both[:, 0] &= background
    assert 0 < in_both[:, 1:4].sum() < 27
    metric = build("hd95", 5, percentile=percentile, include_background=background)
    agrees(metric, *maps, distances[in_both].mean().item())


def test_where_no_class_occurs_the_value_is_not_a_number() -> None:
    outputs, targets = (tensor[8:] for tensor in segmented(2))
    for name in ("dice", "hd95"):
        assert np.isnan(value(build(name, 5), outputs, targets, [1])), name
    for name in ("mean_iou", "instance_iou"):
        metric = build(name, 5, include_background=False)
        assert np.isnan(value(metric, outputs, targets, [1])), name
        assert value(build(name, 5), outputs, targets, [1]) == 1, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiceScore(1), "num_classes=1 is too few; give at least 2"),
        (lambda: MeanIoU(0), "num_classes=0 is too few; give at least 1"),
        (lambda: DiceScore(3, average="mean"), "average='mean' is not known; allowed: macro, none"),
        (lambda: PartialDice(3, [1, 3]), r"classes=\[1, 3\] must be .* from 0 to 2"),
        (lambda: PartialDice(3, []), r"classes=\[\] must be at least one"),
        (lambda: HausdorffDistance95(3, percentile=0), "percentile=0 must be above 0"),
        (lambda: InstanceIoU(3).update(*segmented(2)), r"num_classes=3 .* \(9, 5, 26, 22\)"),
        (lambda: HausdorffDistance95(3).update(*segmented(2)), r"wanted: \(N, 3, ...\)"),
    ],
)
def test_segmentation_refuses_what_it_cannot_measure(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_scipy_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[segmentation\]"'):
        HausdorffDistance95(3)


def pictures(size: int, channels: int = 3, n: int = 12) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], and what they were before noise."""
    torch.manual_seed(3)
    targets = torch.rand(n, channels, size, size)
    return (0.8 * targets + 0.2 * torch.rand_like(targets)).clamp(0, 1), targets


def blurred(images: Array) -> Array:
    """By the window of SSIM: a gaussian of 1.5 pixels, 11 pixels wide, mirrored at borders."""
    found: Array = ndimage.gaussian_filter(images, (0, 0, 1.5, 1.5), mode="mirror", truncate=3.5)
    return found


def similarity(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """SSIM at each pixel, and its contrast and structure alone: Wang et al., 2004, eq. 13."""
    x, y = blurred(outputs), blurred(targets)
    spread_x, spread_y = blurred(outputs**2) - x**2, blurred(targets**2) - y**2
    both = blurred(outputs * targets) - x * y
    contrast = (2 * both + 0.03**2) / (spread_x + spread_y + 0.03**2)
    return (2 * x * y + 0.01**2) / (x**2 + y**2 + 0.01**2) * contrast, contrast


def multiscale(outputs: Array, targets: Array) -> Any:
    """Wang et al., 2003, eq. 7; the contrast of pixels whose window lies in the image."""
    total = np.ones(len(outputs))
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for level, weight in enumerate(weights):
        whole, contrast = similarity(outputs, targets)
        inner = whole if level == 4 else contrast[..., 5:-5, 5:-5]
        total *= inner.mean(axis=(1, 2, 3)) ** weight
        outputs, targets = halved(outputs), halved(targets)
    return total.mean()


def halved(images: Array) -> Array:
    even = images[..., : images.shape[-2] // 2 * 2, : images.shape[-1] // 2 * 2]
    quarters = [even[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return np.mean(quarters, axis=0)


IMAGES: dict[str, tuple[int, Reference]] = {
    "mse": (16, lambda x, y: ((x - y) ** 2).mean()),
    "ms_ssim": (176, multiscale),
    "psnr": (16, lambda x, y: 10 * np.log10(1 / ((x - y) ** 2).mean())),
    "ssim": (24, lambda x, y: similarity(x, y)[0].mean()),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, channels: int) -> None:
    size, reference = IMAGES[name]
    outputs, targets = pictures(size, channels, n=7)
    expected = reference(outputs.double().numpy(), targets.double().numpy())
    agrees(build(name), outputs, targets, expected, rtol=1e-4)  # variances in float32


class Projection(nn.Module):
    """8 features: the pixels times a fixed matrix. Trains unless told not to."""

    def __init__(self, channels: int = 3, size: int = 6) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size**2, 8), nn.Tanh(), nn.Dropout(0.5)
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


def features(images: Tensor) -> Array:
    linear = Projection().layers[1]
    weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
    return np.tanh(images.flatten(1).double().numpy() @ weight.T + bias)


def test_frechet_distance() -> None:
    outputs, targets = pictures(6, n=40)
    x, y = features(outputs), features(targets)
    spread_x, spread_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(spread_x @ spread_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(spread_x + spread_y - 2 * root)
    metric = build(
        "fid", feature=Projection(), feature_weights=None, image_size=[3, 6, 6]
    )  # its size is found
    agrees(metric, outputs, targets, expected, rtol=1e-4)  # features in float32


def test_frechet_distance_of_one_image_is_not_a_number() -> None:
    metric = FrechetInceptionDistance(Projection(), image_size=(3, 6, 6))
    assert np.isnan(value(metric, *pictures(6, n=1), [1]))


def test_kernel_distance_of_the_whole_set() -> None:
    outputs, targets = pictures(6, n=30)
    x, y = features(outputs), features(targets)
    xx, yy, xy = (a @ b.T / 8 + 1 for a, b in ((x, x), (y, y), (x, y)))
    same = sum((k**3).sum() - (np.diag(k) ** 3).sum() for k in (xx, yy)) / (30 * 29)
    metric = build("kid", feature=Projection(), feature_weights=None, subset_size=30, subsets=3)
    agrees(metric, outputs, targets, same - 2 * (xy**3).mean(), rtol=1e-4)  # features in float32


def test_subsets_of_the_kernel_distance_follow_its_own_seed() -> None:
    outputs, targets = pictures(6, n=30)
    state = torch.get_rng_state()
    first, again, other = (
        value(KernelInceptionDistance(frozen, subset_size=10, seed=s), outputs, targets, [30])
        for frozen in [Projection()]
        for s in (0, 0, 1)
    )
    assert first == again != other
    torch.set_rng_state(state)
    drawn = torch.rand(1)
    torch.set_rng_state(state)
    value(KernelInceptionDistance(nn.Flatten(), subset_size=10), outputs, targets, [30])
    assert torch.rand(1) == drawn


def test_feature_distance() -> None:
    outputs, targets = pictures(6)
    expected = ((features(outputs) - features(targets)) ** 2).sum(axis=1).mean()
    agrees(FeatureDistance(Projection()), outputs, targets, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Inception's weights as they come at random."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["64"], str(path))
    torch.save(network.state_dict(), path)
    return path


def test_the_standard_inception_is_that_of_torchmetrics(inception_weights: Path) -> None:
    outputs, targets = pictures(20, channels=1, n=4)
    path = str(inception_weights)
    metric = build("fid", feature=64, feature_weights=path)
    theirs = torchmetrics.image.FrechetInceptionDistance(
        64, normalize=True, feature_extractor_weights_path=path
    )
    theirs.update(outputs.expand(-1, 3, -1, -1), real=False)
    theirs.update(targets.expand(-1, 3, -1, -1), real=True)
    expected = theirs.compute().item()
    # The root of a matrix of rank 3 in 64 dimensions magnifies the features' float32.
    assert value(metric, outputs, targets, [3, 1]) == pytest.approx(expected, rel=1e-3)
    metric = build("fid", feature=64, feature_weights=path, normalize=False)
    assert value(metric, 255 * outputs, 255 * targets, [4]) == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch.hub keeps weights; none in it, and nowhere to get them from."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_learned_perceptual_distance(
    net: str, name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    backbone = getattr(models, name)(weights=None).features
    weights = {f"features.{key}": tensor for key, tensor in backbone.state_dict().items()}
    kept = checkpoints / Path(BACKBONES[net].url).name
    torch.save(weights, kept)
    by_hub, by_path = build("lpips", net=net), build("lpips", net=net, feature_weights=str(kept))
    outputs, targets = pictures(64, channels=1, n=6)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: backbone)
    expected = lpips.learned_perceptual_image_patch_similarity(
        outputs.expand(-1, 3, -1, -1), targets.expand(-1, 3, -1, -1), net, normalize=True
    ).item()
    assert expected > 0
    agrees(by_hub, outputs, targets, expected)
    agrees(by_path, outputs, targets, expected)
    assert value(by_hub, targets, targets, [6]) == 0


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("lpips"), r"checkpoints/alexnet-owt-7be5be79.pth; download https://"),
        (lambda: build("lpips", feature_weights="no.pth"), "there is no file no.pth"),
        (lambda: build("lpips", net="vgg"), "checkpoints/vgg16-397923af.pth"),
        (lambda: build("fid", feature_weights="no.pth"), "there is no file no.pth"),
        (lambda: build("kid", feature_weights="no.pth"), "there is no file no.pth"),
        (lambda: FrechetInceptionDistance(), "checkpoints/weights-inception-2015-12-05-6726825d"),
        (lambda: FrechetInceptionDistance(100), "feature=100 is not known; allowed: 64, 192, 768"),
        (lambda: LPIPS("resnet"), "net='resnet' is not known; allowed: alex, vgg, squeeze"),
        (lambda: KernelInceptionDistance(nn.Flatten(), subset_size=1), "subset_size=1 is too few"),
        (lambda: KernelInceptionDistance(nn.Flatten(), gamma=0), "gamma=0 must be above 0"),
    ],
)
def test_images_refuse_what_they_cannot_measure(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_of_another_network_are_refused(checkpoints: Path) -> None:
    torch.save({"layer.weight": torch.zeros(1)}, checkpoints / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth are of another network: no features.0.bias"):
        LPIPS("alex", feature_weights=str(checkpoints / "other.pth"))


def test_fewer_images_than_a_subset_are_refused() -> None:
    metric = KernelInceptionDistance(nn.Flatten())
    with pytest.raises(ValueError, match="subset_size=50 is more than the 12 images"):
        value(metric, *pictures(6), [12])


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(dim=1)


@pytest.mark.parametrize("function", [mse_loss, per_sample])
def test_a_function_is_a_metric(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    outputs, targets = regressed(4)
    expected = sklearn.mean_squared_error(targets.numpy(), outputs.numpy())
    agrees(FunctionMetric(function), outputs, targets, expected)


def test_a_function_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tensor of shape \(60, 4\); allowed: a scalar"):
        FunctionMetric(torch.sub).update(*regressed(4))


Case = tuple[dict[str, torchmetrics.Metric], tuple[Tensor, Tensor]]
CASES: dict[str, Callable[[], Case]] = {
    "classification": lambda: ({name: build(name) for name in CLASSIFICATION}, classified()),
    "regression": lambda: ({name: build(name) for name in REGRESSION}, regressed(4)),
    "segmentation": lambda: (
        {
            "partial": PartialDice(5, [1, 2]),
            **{
                name: build(name, 5)
                for name in ("dice", "dice_per_class", "mean_iou", "instance_iou", "hd95")
            },
        },
        segmented(2),
    ),
    "images": lambda: (
        {
            "psnr": build("psnr"),
            "ssim": build("ssim"),
            "fid": FrechetInceptionDistance(Projection(size=12), image_size=(3, 12, 12)),
            "kid": KernelInceptionDistance(Projection(size=12), subset_size=12),
            "distance": FeatureDistance(Projection(size=12)),
        },
        pictures(12),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stage_whose_last_batch_is_one_sample_is_measured(case: str) -> None:
    metrics, (outputs, targets) = CASES[case]()
    n = len(targets)
    expected = {name: value(metric, outputs, targets, [n]) for name, metric in metrics.items()}
    stage = StageMetrics(CASES[case]()[0])
    rows = StageAccumulator(stage, torch.device("cpu"))
    sizes = [n - 3, 2, 1]
    for output, target in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        row = {"loss": average(output.mean(), len(target)), **stage.sums(output, target)}
        rows.add(row)
    result = rows.result("test", 1)
    for name in metrics:
        found = result.arrays[name] if name in result.arrays else result.row[name]
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_saw_parts_agree_with_one_that_saw_all(case: str) -> None:
    metrics, (outputs, targets) = CASES[case]()
    for name, metric in metrics.items():
        if name == "r2":  # a wrapper; what it holds is merged on its own
            continue
        expected = value(metric, outputs, targets, [len(targets)])
        first, second = (CASES[case]()[0][name] for _ in range(2))
        first.update(outputs[:4], targets[:4])
        second.update(outputs[4:], targets[4:])
        first.merge_state(second)
        found = first.compute().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["segmentation", "images"])
def test_an_update_does_not_read_the_device(case: str) -> None:
    metrics, batch = CASES[case]()
    outputs, targets = (tensor.to("meta") for tensor in batch)  # tensors that hold no values
    for metric in metrics.values():
        metric.to("meta").update(outputs, targets)


class Evil:
    """Runs code where a file of it is loaded without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (Path("evil"),)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_weights_that_hold_code_are_refused_and_none_of_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises((ValueError, UserError), match=r"weights\.pth holds no plain weights"):
        build(name, feature_weights=str(tmp_path / "weights.pth"))
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with pytest.raises((ValueError, UserError), match=r"damaged\.pth holds no plain weights"):
        build(name, feature_weights=str(tmp_path / "damaged.pth"))
    assert not (tmp_path / "evil").exists()
