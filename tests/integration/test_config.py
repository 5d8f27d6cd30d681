"""The configuration is validated before anything starts, and all errors are reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.experiment.run import execute
from app.training.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tests.support.runs import RunResult, job_for


def test_validate_many_invalid_overrides_reports_all_at_once(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
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
    assert "8 errors" in ran.err
    for text in (
        "model='alexnt' does not exist; allowed: alexnet, autoencoder,",
        "did you mean 'alexnet'?",
        "trainer.max_epoch=3 is not a known key",
        "did you mean 'max_epochs'?",
        "trainer.max_epochs=-1 is not valid; allowed: an integer of at least 1, or null",
        "use optimizer.lr=",
        "data.batch_size='many' is not valid; allowed: an integer of at least 1",
        "trainer.foo=1 is not a known key",
        "goal.metric='acuracy' is not measured in valid; it has: accuracy, loss, total_correct",
        "optimizer.lr='fast' is not valid; allowed: a number",
    ):
        assert text in ran.err
    assert not list(tmp_path.iterdir()), "a file was written"


def test_mode_check_validates_and_writes_nothing(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    assert app("mode=check", "model=lenet").code == 0
    assert app("mode=check", "model=lenet", "seed=-1").code == 2
    assert not list(tmp_path.iterdir())


def test_sweep_invalid_values_are_reported_before_the_first_job(
    app: Callable[..., RunResult],
) -> None:
    ran = app("-m", "model=mlp,lenett", "optimizer.lr=0.1,x,-3")
    assert ran.code == 2
    assert "model='lenett'" in ran.err
    assert "optimizer.lr='x'" in ran.err
    assert "Invalid learning rate: -3" in ran.err
    assert not (ran.cwd / "outputs").exists()


def test_trusted_targets_in_config_file_is_refused(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))\n"
    )
    fast = ("model=own_file", "debug=fast", "~callbacks.plots")
    assert "add trusted_targets=[my_model]" in app(*fast).err
    assert app(*fast, "trusted_targets=[my_model]").code == 0
    assert app(*fast, APP_TRUSTED_TARGETS="my_model").code == 0
    experiment = tmp_path / "conf" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "untrusted.yaml").write_text("# @package _global_\ntrusted_targets: [my_model]\n")
    ran = app("--config-dir", "conf", *fast, "experiment=untrusted")
    assert ran.code == 2
    assert "can only be set on the command line" in ran.err


def test_mode_test_run_saved_before_a_key_existed_uses_its_default(
    tmp_cwd: Path, tmp_path: Path
) -> None:
    folder = tmp_cwd / "run"
    execute(job_for("model=mlp", "debug=fast", "~callbacks.plots"), folder)
    file = folder / "checkpoints" / "best.safetensors"
    checkpoint = load_checkpoint(file)
    assert checkpoint.config is not None
    del checkpoint.config["data"]["drop_last"], checkpoint.config["export"]
    save_checkpoint(file, checkpoint)
    job = job_for("mode=test", f"ckpt={folder}")
    assert job.config.data.drop_last is False
    difference = "data.drop_last: did not exist when the run was saved -> False"
    assert difference in map(str, job.differences)
    execute(job, tmp_path / "test")
