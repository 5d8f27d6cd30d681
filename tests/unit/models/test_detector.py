"""Detectors of torchvision with batches of fixed shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from app.models import torchvision_models
from app.models.detector import Detector
from app.models.fcos import FCOS
from app.models.torchvision_models import published_input, torchvision_model
from app.runtime.errors import UserError

Boxes = dict[str, Tensor]
SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"


def make_batch(num_boxes: int = 2) -> tuple[Tensor, Boxes]:
    """Return two images; the first has `num_boxes` boxes and padding, the second has none."""
    targets = {
        "boxes": torch.zeros(2, 3, 4),
        "labels": torch.full((2, 3), -1),
        "crowd": torch.zeros(2, 3, dtype=torch.bool),
    }
    targets["boxes"][0, :num_boxes] = torch.tensor([8.0, 8.0, 40.0, 40.0])
    targets["labels"][0, :num_boxes] = 1
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), targets


def losses_of(model: nn.Module, images: Tensor, targets: Boxes) -> list[float]:
    torch.manual_seed(0)
    return [loss.item() for loss in model(images, targets).values()]


def test_padding_and_crowds_do_not_change_losses() -> None:
    model = FCOS(2).train()
    model.load_state_dict(model.state_dict())
    images, targets = make_batch(1)
    expected = losses_of(model, images, targets)
    padded = {name: part.clone() for name, part in targets.items()}
    padded["boxes"][0, 1] = padded["boxes"][1, 2] = torch.tensor([0.0, 0.0, 20.0, 30.0])
    assert losses_of(model, images, padded) == expected
    padded["labels"][0, 1] = 0
    assert losses_of(model, images, padded) != expected
    padded["crowd"][0, 1] = True
    assert losses_of(model, images, padded) == expected


def test_detections_have_fixed_shape_and_descending_scores() -> None:
    model = FCOS(2).eval()
    model.model.score_thresh = 0.0  # type: ignore[assignment]
    model.model.detections_per_img = 300  # type: ignore[assignment]
    with torch.no_grad():
        found = model(make_batch()[0])
        model.model.score_thresh = 1.0  # type: ignore[assignment]
        none = model(make_batch()[0])
    assert {name: [*part.shape] for name, part in found.items()} == {
        "boxes": [2, 100, 4],
        "labels": [2, 100],
        "scores": [2, 100],
    }
    assert {*found["labels"].unique().tolist()} <= {-1, 0, 1}
    assert (found["scores"].diff() <= 0).all()
    assert (none["labels"] == -1).all()
    assert none["boxes"].shape == (2, 100, 4)


def test_detector_equals_torchvision_which_resizes_and_normalizes() -> None:
    torch.manual_seed(0)
    mean, std = published_input({"name": SMALL})["mean"], published_input({"name": SMALL})["std"]
    options: dict[str, Any] = {"box_score_thresh": 0.0, "box_detections_per_img": 20}
    reference = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights_backbone=None, num_classes=3, min_size=64, max_size=64, **options
    ).eval()
    ours = torchvision_model(SMALL, 2, image_size=64)
    assert isinstance(ours, Detector)
    ours.model.load_state_dict(reference.state_dict())
    ours.eval().model.roi_heads.score_thresh = 0.0  # type: ignore[union-attr]
    ours.model.roi_heads.detections_per_img = 20  # type: ignore[union-attr]
    images = make_batch()[0]
    normalized = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected, found = reference([*images]), ours(normalized)
    for index, boxes in enumerate(expected):
        count = len(boxes["labels"])
        assert count > 0
        assert found["labels"][index, :count].tolist() == (boxes["labels"] - 1).tolist()
        torch.testing.assert_close(found["boxes"][index, :count], boxes["boxes"])
        torch.testing.assert_close(found["scores"][index, :count], boxes["scores"])


@pytest.mark.parametrize(
    ("name", "head", "outputs"),
    [
        (SMALL, "roi_heads.box_predictor.cls_score", 3),  # with the background
        ("fasterrcnn_resnet50_fpn_v2", "roi_heads.box_predictor.cls_score", 3),
        ("retinanet_resnet50_fpn", "head.classification_head.cls_logits", 9 * 2),
        ("fcos_resnet50_fpn", "head.classification_head.cls_logits", 2),
        ("ssd300_vgg16", "head.classification_head.module_list.0", 4 * 3),
        ("ssdlite320_mobilenet_v3_large", "head.classification_head.module_list.0.1", 6 * 3),
    ],
)
def test_published_weights_of_91_classes_fit_but_for_the_head(
    name: str, head: str, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):  # the files would be large
        published = torchvision.models.get_model(name, weights_backbone=None).state_dict()
        monkeypatch.setattr(torchvision_models.PublishedWeights, "load", lambda _: dict(published))
        model = torchvision_model(name, 2, weights="DEFAULT")
    assert isinstance(model, Detector)
    assert model.model.state_dict()[f"{head}.weight"].shape[0] == outputs
    frozen = [layer for layer in model.modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert bool(frozen) == (name in (SMALL, "retinanet_resnet50_fpn", "fcos_resnet50_fpn"))
    if frozen:
        assert frozen[0].eps == (0.0 if name.startswith("retinanet") else frozen[0].eps or 1.0)


def test_backbone_gets_weights_of_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = torchvision.models.mobilenet_v3_large().state_dict()
    loaded = torchvision_models.PublishedWeights
    monkeypatch.setattr(loaded, "load", lambda _: {n: t.clone() for n, t in published.items()})
    model = torchvision_model(SMALL, 2, weights_backbone="IMAGENET1K_V2")
    body = model.get_submodule("model.backbone.body").state_dict()
    assert body
    assert all(torch.equal(tensor, published[f"features.{name}"]) for name, tensor in body.items())
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in model.modules())
    monkeypatch.setattr(loaded, "load", lambda _: {"fc.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="belongs to another model than mobilenet_v3_large"):
        torchvision_model(SMALL, 2, weights_backbone="DEFAULT")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fasterrcnn_resnet50"}, "did you mean 'fasterrcnn_resnet50_fpn', 'fasterrcnn_re"),
        ({"name": "maskrcnn_resnet50_fpn"}, "is not one of 95 names in torchvision"),
        ({"name": "keypointrcnn_resnet50_fpn"}, "is not one of 95 names in torchvision"),
        ({"weights": "IMAGENET1K_V1"}, "weights='IMAGENET1K_V1' does not exist for faster"),
        ({"weights_backbone": "COCO_V1"}, "does not exist for the backbone of fasterrcnn"),
        ({"weights": "COCO_V1", "weights_backbone": "DEFAULT"}, "are both set; allowed: one of"),
        (
            {"name": "ssd300_vgg16", "weights_backbone": "DEFAULT"},
            "weights_backbone='DEFAULT' is not for ssd300_vgg16; allowed: null",
        ),
        ({"name": "resnet18", "weights_backbone": "DEFAULT"}, "is not for resnet18; allowed: null"),
        (
            {"name": "ssd300_vgg16", "image_size": 128},
            "anchors for images of 300 pixels, but image_size=128; allowed: data.image_size=300",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        torchvision_model(**{"name": SMALL, "num_classes": 2} | arguments)


def test_published_input_of_detectors() -> None:
    def size_and_std(name: str) -> tuple[int, float]:
        found = published_input({"name": name})
        return found["image_size"], found["std"][0]

    assert size_and_std("fasterrcnn_resnet50_fpn") == (800, 0.229)
    assert size_and_std(SMALL) == (320, 0.229)
    assert size_and_std("ssd300_vgg16") == (300, 1 / 255)
    assert size_and_std("ssdlite320_mobilenet_v3_large") == (320, 0.5)


def test_weights_of_a_classifier_need_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(url="http://127.0.0.1:1/a-00000000.pth", meta={"categories": ["a"] * 5})
    published = torchvision.models.squeezenet1_1(num_classes=10).state_dict()
    monkeypatch.setattr(torchvision_models.PublishedWeights, "load", lambda _: dict(published))
    monkeypatch.setattr(torchvision_models, "_weights_of", lambda _: {"DEFAULT": entry})
    model = torchvision_model("squeezenet1_1", 7, weights="DEFAULT")  # two rows for each class
    assert model.state_dict()["classifier.1.weight"].shape[0] == 7
