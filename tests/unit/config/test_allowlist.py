"""The allow-list of `_target_`s."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from app.config.allowlist import TargetError, locate
from app.config.instantiate import Instantiator
from app.runtime.errors import UserError
from tests.support.runs import config_issues


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "torch.load", "torch.hub.load", "subprocess.run"),
        # through what an allowed module has imported
        "app.data.torchvision_sets.torch.load",
        "app.models.cnn.Conv2dNormActivation",
        "app.callbacks.overlays.interpolate",
        "torch.nn.functional.handle_torch_function",
        "torchvision.datasets.folder.os.system",
        # generate code, walk attributes, open files, or are helpers
        "torchvision.models.feature_extraction.create_feature_extractor",
        "torchvision.models.get_model",
        "torchvision.models.quantization.resnet18",
        "torchvision.models.detection.backbone_utils.IntermediateLayerGetter",
        "torchvision.datasets.DatasetFolder",
        "torchvision.datasets.ImageFolder",
        "torchvision.datasets.LSUN",
        "torchvision.datasets.CIFAR10",
        "torchvision.datasets.utils.download_and_extract_archive",
        "torch.nn.ParameterDict",
        "torch.nn.parallel.DistributedDataParallel",
        "torch.nn.utils.parametrize.register_parametrization",
        "torch.nn.init.normal_",
        "torch.optim.swa_utils.AveragedModel",
        "torchmetrics.image.FrechetInceptionDistance",
        "torchmetrics.multimodal.CLIPScore",
        "torchmetrics.functional.accuracy",
        # parts of this program that are not components
        *("app.cli.main", "app.config.instantiate.Instantiator", "app.training.trainer.Trainer"),
        "app.callbacks.prediction_files.PredictionFileWriter",
        "app.callbacks.tables.drop_torn_line",
        "app.data.archives.unpack",
        "app.data.datamodule.make_datasets",
        "app.data.torchvision_sets.download_dataset",
        "app.metrics.images.find_weights",
    ],
)
def test_locate_name_that_is_no_allowed_component_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="is not allowed"):
        locate(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.optim.Adamw", "does not exist; did you mean 'AdamW'?"),
        ("app.losses.dice.Dice", "does not exist; did you mean 'DiceLoss'?"),
        (
            "app.models.alexnett.AlexNet",
            "No module named 'app.models.alexnett'; did you mean 'alexnet'?",
        ),
        ("torch.nn.modules.linear.Linear", "did you mean 'torch.nn.Linear'?"),
        ("torchvision.transforms.Resize", "did you mean 'torchvision.transforms.v2.Resize'?"),
        ("torchvision.datasets.LSUN", "trusted_targets=[torchvision.datasets.LSUN] allows it"),
        ("os.system", "allowed: components of this program, of torch.nn, torch.optim"),
    ],
)
def test_locate_refusal_names_the_nearest_match_or_the_way_out(name: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        locate(name)
    assert name.rpartition(".")[0] in str(caught.value)
    assert message in str(caught.value)


def test_locate_trusted_name_is_allowed_but_not_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_lab.py").write_text("import os\nclass Net:\n    def forward(self): ...\n")
    assert locate("my_lab.Net", ["my_lab"]).__name__ == "Net"
    assert locate("torch.nn.ParameterDict", ["torch.nn.ParameterDict"]) is torch.nn.ParameterDict
    assert locate("my_lab.Net.forward", ["my_lab"]).__name__ == "forward"
    for name in ("my_lab.os.system", "my_lab.os.path.join", "my_lab.Net.forward.__globals__.get"):
        with pytest.raises(TargetError, match=r"cannot be imported|is not a dotted name"):
            locate(name, ["my_lab"])


def test_refused_package_of_the_user_is_hinted_at_once() -> None:
    nodes = ("model._target_=herlab.nets.Net", "task._target_=herlab.tasks.Task")
    issues = config_issues(*nodes)
    assert sum("herlab" in issue for issue in issues) == 3
    assert (
        issues.count("if you trust that code, add trusted_targets=[herlab] to the command line")
        == 1
    )


def test_locate_refused_module_is_not_imported(tmp_cwd: Path) -> None:
    (tmp_cwd / "untrusted.py").write_text("open('was_here', 'w')\nclass Net: ...\n")
    issues = config_issues("model._target_=untrusted.Net", "model.num_classes=3")
    assert any("add trusted_targets=[untrusted]" in issue for issue in issues)
    assert not (tmp_cwd / "was_here").exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.AdamW",
        "torch.nn.CrossEntropyLoss",
        "torch.nn.functional.cross_entropy",
        "torch.optim.lr_scheduler.StepLR",
        "torch.optim.swa_utils.SWALR",
        "torchvision.datasets.FakeData",
        "torchvision.models.resnet50",
        "torchvision.models.segmentation.fcn_resnet50",
        "torchvision.transforms.v2.RandomCrop",
        "torchmetrics.classification.MulticlassAccuracy",
        "torchmetrics.wrappers.LambdaInputTransformer",
        "app.callbacks.lambda_callback.LambdaCallback",
        "app.data.images.image_folder",
        "app.data.sampling.BalancedClasses",
        "app.losses.weighted_sum.Term",
        "app.metrics.output_metric.OutputMetric",
        "app.models.lenet.LeNet",
        "app.models.pretrained.pretrained",
        "app.models.smp_models.smp_model",
        "app.models.timm_models.timm_model",
        "app.models.torchvision_models.torchvision_model",
        "app.training.dcgan_task.AdversarialTask",
        "app.training.optim.chain.sequential",
        "app.training.optim.weight_averaging.ExponentialMovingAverage",
    ],
)
def test_locate_allowed_name_returns_the_object(name: str) -> None:
    assert locate(name).__name__ == name.rpartition(".")[2]


@pytest.mark.parametrize(
    "arguments",
    [{"weights": "DEFAULT"}, {"weights_backbone": "legacy"}, {"_args_": ["DEFAULT"]}, {}],
)
@pytest.mark.parametrize("name", ["resnet18", "segmentation.lraspp_mobilenet_v3_large"])
def test_model_of_torchvision_reads_no_weights(
    name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("pretrained weights would be unpickled")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", read)
    node = {"_target_": f"torchvision.models.{name}", **arguments}
    with torch.device("meta"), pytest.raises(UserError) if arguments else nullcontext():
        Instantiator()("model", node)
