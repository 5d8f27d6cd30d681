"""The whole configuration is looked over before anything starts, and all mistakes are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Ran, job_for, mistakes_in

from app.config.allowlist import TargetError, locate
from app.config.instantiate import Instantiator
from app.config.types import describe, matches_type
from app.experiment.run import execute
from app.runtime.errors import ConfigError, UserError
from app.training.checkpoint.checkpoint import load_checkpoint, save_checkpoint


def test_the_main_job_is_without_mistakes() -> None:
    assert job_for("model=alexnet", "data=mnist").config.model["num_classes"] == 10


def test_all_mistakes_are_named_at_once(app: Callable[..., Ran], tmp_path: Path) -> None:
    ran = app(
        "model=alexnt",
        "trainer.max_epoch=3",
        "trainer.max_epochs=-1",
        "lr=0.1",
        "data.batch_size=many",
        "+trainer.foo=1",
        "goal.metric=acuracy",
        "optimizer.lr=fast",
    )
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert "8 mistakes" in ran.err
    for part in (
        "model='alexnt' does not exist; allowed: alexnet, autoencoder,",
        "did you mean 'alexnet'?",
        "trainer.max_epoch=3 is not a known key",
        "did you mean 'max_epochs'?",
        "trainer.max_epochs=-1 does not fit; allowed: a whole number of at least 1, or null",
        "did you mean 'optimizer.lr'?",
        "data.batch_size='many' does not fit; allowed: a whole number of at least 1",
        "trainer.foo=1 is not a known key",
        "goal.metric='acuracy' is not measured in valid; it has: accuracy, loss, total_correct",
        "optimizer.lr='fast' does not fit; allowed: a number",
    ):
        assert part in ran.err
    assert not list(tmp_path.iterdir()), "a file was written"


def test_mode_check_only_looks(app: Callable[..., Ran], tmp_path: Path) -> None:
    assert app("mode=check", "model=lenet").code == 0
    assert app("mode=check", "model=lenet", "seed=-1").code == 2
    assert not list(tmp_path.iterdir())


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


def test_every_swept_value_is_checked_before_the_first_job(app: Callable[..., Ran]) -> None:
    ran = app("-m", "model=mlp,lenett", "optimizer.lr=0.1,x,-3")
    assert ran.code == 2
    assert "model='lenett'" in ran.err
    assert "optimizer.lr='x'" in ran.err
    assert "Invalid learning rate: -3" in ran.err
    assert not (ran.cwd / "outputs").exists()


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


def test_trust_is_given_on_the_command_line_or_in_the_environment_only(
    app: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))\n"
    )
    fast = ("model=own_file", "debug=fast")
    assert "add trusted_targets=[my_model]" in app(*fast).err
    assert app(*fast, "trusted_targets=[my_model]").code == 0
    assert app(*fast, APP_TRUSTED_TARGETS="my_model").code == 0
    experiment = tmp_path / "conf" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "sly.yaml").write_text("# @package _global_\ntrusted_targets: [my_model]\n")
    sly = app("--config-dir", "conf", *fast, "experiment=sly")
    assert sly.code == 2
    assert "may be given on the command line only" in sly.err


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
        path.stem for path in (Path(__file__).parents[1] / "conf" / group).glob("*.yaml")
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


def test_a_run_saved_before_a_key_existed_can_still_be_tested(
    elsewhere: Path, tmp_path: Path
) -> None:
    old = elsewhere / "run"
    execute(job_for("model=mlp", "debug=fast", "~callbacks.plots"), old)
    file = old / "checkpoints" / "best.pt"
    checkpoint = load_checkpoint(file)
    assert checkpoint.config is not None
    assert checkpoint.template is not None
    del checkpoint.config["data"]["drop_last"], checkpoint.config["export"]
    template = yaml.safe_load(checkpoint.template)
    del template["data"]["drop_last"], template["export"]
    changed = dataclasses.replace(checkpoint, template=yaml.safe_dump(template))
    save_checkpoint(file, changed)
    job = job_for("mode=test", f"ckpt={old}")
    assert job.config.data.drop_last is False
    assert "data.drop_last: not yet known when it was saved -> False" in job.differences
    execute(job, tmp_path / "test")
