"""The allow-list of `_target_`s."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.allowlist import TargetError, locate
from tests.support.runs import config_issues


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "subprocess.run",
        "app.data.torchvision_sets.torch.load",  # through what an allowed module has imported
        "app.data.images.v2.torch.load",
        "torch.nn.modules.module.torch.load",
        "torchvision.datasets.folder.os.system",
        "torchvision.datasets.utils.download_and_extract_archive",
        "torch.nn._reduction.warnings.warn",
        "app.cli.main",
        "app.config.instantiate.Instantiator",
    ],
)
def test_locate_name_not_on_allowlist_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="is not allowed"):
        locate(name)


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
        "torchvision.models.resnet50",
        "torchvision.transforms.v2.RandomCrop",
        "torchmetrics.classification.MulticlassAccuracy",
        "app.models.lenet.LeNet",
    ],
)
def test_locate_allowed_name_returns_the_object(name: str) -> None:
    assert locate(name).__name__ == name.rpartition(".")[2]
