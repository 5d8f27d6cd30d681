"""Validation of complete configurations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.runs import config_issues, job_for


def test_validate_default_configuration_has_no_issues() -> None:
    assert job_for("model=alexnet", "data=mnist").config.model["num_classes"] == 10


SEEDS = ("seed", "data.split.seed")
INVALID: dict[tuple[str, ...], tuple[str, ...]] = {  # overrides -> what their errors contain
    (
        "model.widht=2",
        "~trainer.no_such",
        "+trainer.max_epochs=3",
        "data.augment.flip=1",
        "loss.cross_entropy.function.reduction=often",
        "~model.num_classes",
    ): (
        "did you mean 'width'?",
        "trainer.no_such is not a known key",
        "trainer.max_epochs already exists",
        "data.augment.flip=1 is not a known key; data.augment has: noth",
        "reduction=often is not a known key",
        "model.num_classes is missing",
    ),
    (
        "+model.depth=2",
        "model.width=wide",
        "scheduler=step",
        "scheduler.lr_scheduler.step_size=often",
        "metric.valid.accuracy.top_k=99",
        "goal.mode=most",
        "trainer.precision=fp8",
        "trainer.limit_train_batches=1.5",
        "ckpt=nowhere",
        "name=a/b",
        "+callbacks.tables.folder=/tmp",
    ): (
        "model.depth=2 is not an argument of app.models.alexnet.AlexNet",
        "model.width='wide' is not valid; allowed: a number",
        "step_size='often' is not valid; allowed: an integer",
        "got 99 and 10",
        "goal.mode='most' is not valid; allowed: max, min",
        "allowed: auto, fp32, bf16, fp16",
        "trainer.limit_train_batches=1.5 is not valid",
        "is not used in mode=train",
        "is part of a folder name",
        "callbacks.tables.folder='/tmp' cannot be set: the program passes this argument",
    ),
    (
        "model._target_=app.models.alexnet.AlexNt",
        "optimizer.lr=-1",
        "goal.metric=test/accuracy",
        "trainer.max_epochs=null",
        "+metric.train.loss=${metric.train.accuracy}",
        "data.image_size=${data.nothing}",
    ): (
        "did you mean 'AlexNet'?",
        "Invalid learning rate: -1",
        "'test' is not a stage of training",
        "trainer.max_steps=None: one must be set",
        "is the name of another column",
        "data.image_size does not resolve",
    ),
    (
        "model._target_=app.models.no_such.Thing",
        "goal.metric=train/f1",
        "~loss.cross_entropy",
        "data.split.test=100",
    ): (
        "cannot be imported",
        "is not measured in train",
        "loss has no term",
        "data.split.test=100 and data.source.test are both set",
    ),
    ("data.fold=1", "data.split.group_pattern=abc", "data.class_weights=often"): (
        "data.fold=1 needs data.folds",
        "must have one group in brackets",
        "data.class_weights='often' is not valid",
    ),
    ("data.folds=3", "data.fold=3", "data.split.group_pattern='(a'", "data.class_weights=[1,2]"): (
        "data.fold=3 is not a fold; allowed: 0 to 2",
        "is not a regular expression",
        "data.class_weights has 2 values; allowed: one for each of",
    ),
    ("optimizer=lbfgs",): ("optimizer: LBFGS needs a closure that evaluates the loss again",),
    ("optimizer.layer_decay=2", "+optimizer.groups.a={lr: 0.1}"): (
        "optimizer.layer_decay=2 is not valid; allowed: a number",
        "optimizer.groups.a selects nothing; it needs one of: hidden, module_type, ndim",
    ),
    (
        "+optimizer.groups.a={ndim: 1, decay: 0}",
        "+optimizer.groups.b={ndim: 1, _target_: torch.optim.Moun}",
        "+optimizer.groups.c={ndim: one}",
    ): (
        "optimizer.groups.a.decay=0 is not an argument of torch.optim.AdamW; it takes: ",
        "optimizer.groups.b._target_='torch.optim.Moun' does not exist; did you mean",
        "optimizer.groups.c.ndim='one' is not valid",
    ),
    ("+optimizer.groups={a/b: {ndim: 1}}",): ("optimizer.groups.a/b names a column; allowed:",),
    ("+optimizer.groups.a={ndim: 1, lr: -1}",): ("optimizer.groups.a: torch.optim.AdamW could",),
    ("data.folds=1",): ("data.folds=1",),
    ("data.split.valid=null",): ("goal.metric='accuracy' cannot be measured without valid data",),
    ("data.source.train=null",): ("mode='train' has no data",),
    ("mode=test",): ("ckpt has no value",),
    ("mode=test", "ckpt=nowhere"): ("does not exist",),
    ("data=npz",): ("data.path has no value; set it with data.path=... on the command line",),
}


@pytest.mark.parametrize("overrides", INVALID)
def test_validate_invalid_overrides_names_each_key(overrides: tuple[str, ...]) -> None:
    text = "\n".join(config_issues(*overrides))
    assert [message for message in INVALID[overrides] if message not in text] == [], text


@pytest.mark.parametrize("seeds", [(2**63, -(2**64)), (-(2**64), 2**63)])
def test_validate_seed_out_of_range_names_the_range(seeds: tuple[int, int]) -> None:
    overrides = [f"{key}={seed}" for key, seed in zip(SEEDS, seeds, strict=True)]
    issues = config_issues("model=mlp", *overrides)
    assert len(issues) == 2
    for issue, override in zip(issues, overrides, strict=True):
        assert issue.startswith(f"{override} is not valid; allowed: an integer")
        assert issue.endswith("and at most 9223372036854775807")


def test_validate_largest_seeds_are_accepted() -> None:
    assert not config_issues("model=mlp", *(f"{key}={2**63 - 1}" for key in SEEDS))


def test_validate_integer_of_more_than_64_bits_is_refused() -> None:
    overrides = [f"model.num_classes={2**64}", f"trainer.max_steps={2**64}"]
    expected = [f"{text} is too large for a checkpoint; allowed: 64 bits" for text in overrides]
    assert config_issues("model=mlp", *overrides) == expected


@pytest.mark.parametrize("key", ["metric.test", "loss"])
def test_validate_column_name_with_path_is_refused(key: str, tmp_cwd: Path) -> None:
    folder = tmp_cwd / "conf" / "experiment"
    folder.mkdir(parents=True)
    group, _, stage = key.partition(".")
    node = "{_target_: app.metrics.function.CorrectPredictions}"
    inner = f"'/../../evil': {node}"
    text = f"{group}: {{{stage}: {{{inner}}}}}" if stage else f"{group}: {{{inner}}}"
    (folder / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    issues = config_issues("--config-dir", "conf", "experiment=evil")
    assert any("names a column and a file" in issue for issue in issues)


def test_validate_metric_named_like_table_column_is_refused() -> None:
    node = "{_target_: app.metrics.function.CorrectPredictions}"
    (issue,) = config_issues(f"+metric.valid.total_samples={node}")
    assert issue == "metric.valid.total_samples is the name of another column; rename it"


def test_validate_looks_up_names_of_zoo_with_all_other_errors() -> None:
    overrides = ("model=torchvision", "model.name=resnet81", "trainer.max_epoch=3")
    names, key = sorted(config_issues(*overrides))
    assert names.startswith("model.name='resnet81' is not one of ")
    assert names.endswith("; did you mean 'resnet18', 'resnet152', 'resnet101'?")
    assert key.startswith("trainer.max_epoch=3 is not a known key")
    (issue,) = config_issues("model=pretrained", "model.weights=V3")
    assert issue.startswith(
        "model.weights='V3' does not exist for resnet18; allowed: IMAGENET1K_V1"
    )


def test_validate_looks_up_names_of_zoo_before_the_data_are_read(tmp_path: Path) -> None:
    data = ("data=image_folder", f"data.path={tmp_path}")  # num_classes=auto, but there are none
    (issue,) = config_issues(*data, "model=torchvision", "model.name=resnet81")
    assert issue.startswith("model.name='resnet81' is not one of ")


def test_validate_zoo_of_missing_extra_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (issue,) = config_issues("model=timm")
    assert issue == (
        'model: timm is not installed; to install it: pip install "torch-experiment-app[timm]"'
    )


def test_zoo_input_gives_what_the_weights_expect() -> None:
    size = "data.resize=${zoo_input:image_size}"
    overrides = ("model=torchvision", "model.name=efficientnet_v2_l", size)
    data = job_for(
        *overrides, "data.normalize.mean=${zoo_input:mean}", "data.channels=3"
    ).config.data
    assert (data.resize, data.input_shape) == (480, [3, 480, 480])
    assert data.normalize is not None
    assert data.normalize.mean == [0.5, 0.5, 0.5]
    (issue,) = config_issues("model=torchvision", "model.name=resnet81", size)
    assert issue.startswith("model.name='resnet81' is not one of ")
    assert "zoo_input needs model=timm or model=torchvision" in config_issues(size)[0]


@pytest.mark.parametrize("wrong", ["data=nope", "modle=lenet", "trainer.max_epochs=-1"])
def test_validate_reports_components_with_the_other_errors(wrong: str) -> None:
    found = config_issues(wrong, "+optimizer.nope=1", "metric.valid.accuracy.average=no")
    assert len(found) == 3
    assert any("optimizer.nope" in issue for issue in found)
    assert any("metric.valid.accuracy" in issue for issue in found)
    assert config_issues(wrong, "experiment=shapes_unet", "+optimizer.nope=1")[1:]
