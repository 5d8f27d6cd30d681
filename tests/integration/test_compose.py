"""Composition of command lines."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.types import RunMode

from app.config import resolvers
from app.config.compose import open_composer
from app.runtime.errors import ConfigError
from tests.support.data_files import write_data
from tests.support.image_files import write_image_folder
from tests.support.runs import config_issues, job_for

CONF = Path(__file__).parents[2] / "conf"
EXTRAS = {"timm": "timm", "finetune": "timm", "smp": "segmentation_models_pytorch"}


def test_compose_argument_without_equals_sign_is_named() -> None:
    with pytest.raises(ConfigError, match="foo is not key=value"):
        config_issues("foo")


def test_compose_data_sizes_reach_model_and_metrics() -> None:
    config = job_for("data=cifar100", "data.resize=64").config
    model = config.model
    assert (model["num_classes"], model["in_channels"], model["image_size"]) == (100, 3, 64)
    accuracy = config.metric.valid["accuracy"]
    assert accuracy is not None
    assert accuracy["num_classes"] == 100
    assert config.data.input_shape == [3, 64, 64]


def test_compose_single_metrics_apply_to_one_stage() -> None:
    metric = job_for("metric/single@metric.test=[accuracy,auroc]").config.metric
    assert list(metric.test) == ["accuracy", "auroc"]
    assert list(metric.valid) == ["accuracy", "total_correct"]


def test_compose_metric_from_config_dir_is_found(tmp_cwd: Path) -> None:
    own = tmp_cwd / "mine" / "metric" / "single"
    own.mkdir(parents=True)
    (own / "kappa.yaml").write_text(
        "kappa:\n  _target_: torchmetrics.classification.MulticlassCohenKappa\n"
        "  num_classes: ${data.num_classes}\n"
    )
    job = job_for("--config-dir", "mine", "metric/single@metric.valid=[kappa]", "goal.metric=kappa")
    assert list(job.config.metric.valid) == ["kappa"]


def test_compose_experiment_and_debug_presets_set_their_keys() -> None:
    assert job_for("experiment=mnist_alexnet_sgd").config.goal.patience == 6
    assert job_for("debug=overfit").config.trainer.overfit_batches == 3
    assert job_for("debug=limit").config.trainer.limit_train_batches == 0.01


@pytest.mark.parametrize(
    "groups",
    [
        *(("data",), ("model",), ("metric",), ("loss",), ("experiment",)),
        ("optimizer", "scheduler", "debug", "trainer"),  # independent of each other
    ],
)
def test_compose_every_option_of_every_group_has_no_issues(
    groups: tuple[str, ...], tmp_cwd: Path
) -> None:
    own_factor = [
        "scheduler.lr_scheduler.lr_lambda={_target_: my_model.factor, _partial_: true}",
        "trusted_targets=[my_model]",
    ]
    required = {
        "lambda": own_factor,
        "multiplicative": own_factor,
        "segmentation": ["goal.metric=mean_iou"],
        "detection": ["goal.metric=map"],
        "images": ["goal.metric=psnr"],
        "own_file": ["trusted_targets=[my_model]"],
        "loss=none": ["task=adversarial", "model=dcgan", "goal.metric=loss"],
        "none": ["goal.metric=loss", "goal.mode=min"],
        "regression": ["goal.metric=mae", "goal.mode=min"],
        "resnet50": ["data.channels=3"],
    }
    (tmp_cwd / "my_model.py").write_text(
        "from torch.nn import Module as N\nclass Net(N):\n"
        "    def __init__(self, num_classes): ...\n"
        "def factor(epoch): return 1.0\n"
    )
    missing = {option for option, library in EXTRAS.items() if find_spec(library) is None}
    skipped = {"lbfgs", *missing}  # the first of which is refused
    options = [
        sorted({path.stem for path in (CONF / group).glob("*.yaml")} - skipped) for group in groups
    ]
    assert all(options)
    for chosen in zip_longest(*options):
        overrides: list[str] = []
        for group, option in zip(groups, chosen, strict=True):
            if option is not None:
                overrides += [f"{group}={option}"]
                overrides += required.get(f"{group}={option}", required.get(option, []))
            if group == "data":
                overrides += write_data(option, tmp_cwd)
            elif option == "csv_regression":
                overrides += [*write_data("csv", tmp_cwd), "data.source.train.target=b"]
            elif option in ("finetune", "imagenet_resnet50"):
                write_image_folder(tmp_cwd / option, {"cat": 20, "dog": 20})
                overrides += [f"data.path={option}"]
            elif option == "masks_unet":
                overrides += [*write_data("masks", tmp_cwd)[:1], "data.image_size=16"]
        assert not config_issues(*overrides), overrides


def test_load_configuration_does_not_return_one_that_was_refused() -> None:
    resolvers.register()
    with open_composer(get_args_parser().parse_args(["model=mlp"])) as composer:
        loader = composer.hydra.config_loader
        loader.load_configuration("config", ["model=mlp"], RunMode.RUN)
        with pytest.raises(ConfigError):
            refused = ["model=mlp", "+hydra.callbacks.own._target_=os.system"]
            loader.load_configuration("config", refused, RunMode.RUN)
        again = loader.load_configuration("config", ["model=mlp"], RunMode.RUN)
        assert "own" not in again.hydra.callbacks
