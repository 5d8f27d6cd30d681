"""The whole configuration is looked over before anything starts, and all mistakes are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import yaml

from app.experiment.run import execute
from app.training.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tests.support.runs import Ran, job_for


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


def test_every_swept_value_is_checked_before_the_first_job(app: Callable[..., Ran]) -> None:
    ran = app("-m", "model=mlp,lenett", "optimizer.lr=0.1,x,-3")
    assert ran.code == 2
    assert "model='lenett'" in ran.err
    assert "optimizer.lr='x'" in ran.err
    assert "Invalid learning rate: -3" in ran.err
    assert not (ran.cwd / "outputs").exists()


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
