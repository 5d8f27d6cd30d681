"""The whole configuration is looked over before anything starts, and all mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.allowlist import TargetError, locate
from app.config.instantiate import Instantiator
from app.config.types import describe, matches_type
from app.runtime.errors import ConfigError, UserError
from tests.support.runs import job_for, mistakes_in


def test_the_main_job_is_without_mistakes() -> None:
    assert job_for("model=alexnet", "data=mnist").config.model["num_classes"] == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.widht=2"], "did you mean 'width'?"),
        (["+model.depth=2"], "model.depth=2 is not an argument of app.models.alexnet.AlexNet"),
        (["model.width=wide"], "model.width='wide' does not fit; allowed: a number"),
        (["model._target_=app.models.alexnet.AlexNt"], "did you mean 'AlexNet'?"),
        (["model._target_=torch.nn.no_such.Thing"], "does not import"),
        (["~model.num_classes"], "model.num_classes is missing"),
        (["optimizer.lr=-1"], "Invalid learning rate: -1"),
        (["scheduler=step", "scheduler.lr_scheduler.step_size=often"], "allowed: a whole number"),
        (["metric.valid.accuracy.top_k=99"], "got 99 and 10"),
        (["goal.mode=most"], "goal.mode='most' does not fit; allowed: max, min"),
        (["goal.metric=test/accuracy"], "'test' is no stage of training"),
        (["goal.metric=train/f1"], "is not measured in train"),
        (["data.split.valid=null"], "goal.metric='accuracy' has no data to be measured on"),
        (["data.split.test=100"], "data.split.test=100 and data.source.test are both given"),
        (["data.source.train=null"], "mode='train' has no data"),
        (["trainer.max_epochs=null"], "trainer.max_steps=None: one must be given"),
        (["trainer.precision=fp8"], "allowed: auto, fp32, bf16, fp16"),
        (["trainer.limit_train_batches=1.5"], "does not fit"),
        (["mode=test"], "ckpt has no value"),
        (["mode=test", "ckpt=nowhere"], "does not exist"),
        (["ckpt=nowhere"], "has no use in mode=train"),
        (["name=a/b"], "names a folder"),
        (["~loss.cross_entropy"], "loss has no term"),
        (["data=npz"], "data.path has no value; give one, as data.path=... on the command line"),
        (["+metric.train.loss=${metric.train.accuracy}"], "is the name of another column"),
        (["data.image_size=${data.nothing}"], "does not resolve"),
        (["loss.cross_entropy.function.reduction=often"], "often"),
        (["+trainer.max_epochs=3"], "is there already"),
        (["+callbacks.tables.folder=/tmp"], "is not yours to give: the run sets it"),
        (["~trainer.no_such"], "trainer.no_such is not a known key"),
        (["data.augment.flip=1"], "data.augment.flip=1 is not a known key; data.augment has: noth"),
    ],
)
def test_each_mistake_is_said_with_its_key(words: list[str], said: str) -> None:
    found = mistakes_in(*words)
    assert any(said in mistake for mistake in found), found


def test_a_word_that_is_no_override_is_named() -> None:
    with pytest.raises(ConfigError, match="foo cannot be read as key=value"):
        mistakes_in("foo")


def test_sizes_flow_from_the_data_to_model_and_metric() -> None:
    config = job_for("data=cifar100", "data.resize=64").config
    model = config.model
    assert (model["num_classes"], model["in_channels"], model["image_size"]) == (100, 3, 64)
    accuracy = config.metric.valid["accuracy"]
    assert accuracy is not None
    assert accuracy["num_classes"] == 100
    assert config.data.input_shape == [3, 64, 64]


def test_single_metrics_are_chosen_for_one_stage() -> None:
    metric = job_for("metric/single@metric.test=[accuracy,auroc]").config.metric
    assert list(metric.test) == ["accuracy", "auroc"]
    assert list(metric.valid) == ["accuracy", "total_correct"]


def test_a_metric_is_added_by_yaml_alone(elsewhere: Path) -> None:
    own = elsewhere / "mine" / "metric" / "single"
    own.mkdir(parents=True)
    (own / "kappa.yaml").write_text(
        "kappa:\n  _target_: torchmetrics.classification.MulticlassCohenKappa\n"
        "  num_classes: ${data.num_classes}\n"
    )
    job = job_for("--config-dir", "mine", "metric/single@metric.valid=[kappa]", "goal.metric=kappa")
    assert list(job.config.metric.valid) == ["kappa"]


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
def test_what_is_not_on_the_list_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="is not allowed"):
        locate(name)


def test_a_refused_module_is_not_even_imported(elsewhere: Path) -> None:
    (elsewhere / "stranger.py").write_text("open('was_here', 'w')\nclass Net: ...\n")
    found = mistakes_in("model._target_=stranger.Net", "model.num_classes=3")
    assert any("add trusted_targets=[stranger]" in mistake for mistake in found)
    assert not (elsewhere / "was_here").exists()


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
def test_parts_are_found(name: str) -> None:
    assert locate(name).__name__ == name.rpartition(".")[2]


def test_experiments_and_debug_presets_compose() -> None:
    assert job_for("experiment=mnist_alexnet_sgd").config.goal.patience == 6
    assert job_for("debug=overfit").config.trainer.overfit_batches == 3
    assert job_for("debug=limit").config.trainer.limit_train_batches == 0.01


@pytest.mark.parametrize(
    "group",
    ["data", "model", "metric", "loss", "optimizer", "scheduler", "experiment", "debug", "trainer"],
)
def test_every_option_of_every_group_composes(group: str, elsewhere: Path) -> None:
    given = {
        "npz": ["data.path=x", "data.num_classes=3", "data.input_shape=[1,28,28]"],
        "csv": ["data.path=x", "data.num_classes=3", "data.input_shape=[4]", "model=mlp"],
        "image_folder": ["data.path=x", "data.num_classes=3"],
        "hugging_face": ["data.path=x", "data.num_classes=3"],
        "segmentation": ["goal.metric=mean_iou"],
        "images": ["goal.metric=psnr"],
        "own_file": ["trusted_targets=[my_model]"],
        "loss=none": ["task=adversarial", "model=dcgan", "goal.metric=loss"],
        "none": ["goal.metric=loss", "goal.mode=min"],
        "regression": ["goal.metric=mae", "goal.mode=min"],
        "resnet50": ["data.channels=3"],
    }
    (elsewhere / "my_model.py").write_text(
        "from torch.nn import Module as N\nclass Net(N):\n"
        "    def __init__(self, num_classes): ...\n"
    )
    options = sorted(
        path.stem for path in (Path(__file__).parents[3] / "conf" / group).glob("*.yaml")
    )
    assert options
    for option in options:
        words = given.get(f"{group}={option}", given.get(option, []))
        assert not mistakes_in(f"{group}={option}", *words), option


def test_values_against_types() -> None:
    from app.config.schema import Limit, Positive

    assert matches_type(3, float)
    assert not matches_type(True, int)
    assert not matches_type(0, Positive)
    assert matches_type(None, Limit)
    assert matches_type(0.5, Limit)
    assert not matches_type(0.0, Limit)
    assert describe(Positive) == "a whole number of at least 1"


def test_build_names_the_node_that_refuses() -> None:
    node = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear"}]}
    with pytest.raises(UserError, match=r"model\._args_\.0: torch\.nn\.Linear refused"):
        Instantiator()("model", node)


def test_build_gives_offers_only_to_those_who_want_them(tmp_path: Path) -> None:
    build = Instantiator()
    tables = build("callbacks.t", {"_target_": "app.callbacks.tables.Tables"}, folder=tmp_path)
    console = build("callbacks.c", {"_target_": "app.callbacks.console.Console"}, folder=tmp_path)
    assert tables.folder == tmp_path
    assert console is not None


def test_a_partial_node_becomes_a_plain_function() -> None:
    node = {"_target_": "torch.nn.functional.cross_entropy", "_partial_": True, "reduction": "sum"}
    function = Instantiator()("loss", node)
    assert function.keywords == {"reduction": "sum"}
