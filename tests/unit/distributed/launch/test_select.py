"""Checks of devices and launchers before a job starts."""

from __future__ import annotations

import pytest

from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.select import check_environment
from app.runtime.errors import UserError
from tests.support.runs import config_issues, job_for


def test_check_environment_other_launcher_or_too_many_ranks_is_refused() -> None:
    cluster = ClusterEnvironment("torchrun", 0, 2, 0, 2, "x", 1)
    with pytest.raises(UserError, match="launch='local', but torchrun has started this"):
        check_environment(job_for("launch=local").config, cluster)
    with pytest.raises(UserError, match=r"mode='find_lr' runs on one device"):
        check_environment(job_for("mode=find_lr").config, cluster)
    with pytest.raises(UserError, match=r"data.batch_size=1 is for all devices together"):
        check_environment(job_for("data.batch_size=1").config, cluster)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["trainer.devices=0"], "trainer.devices=0"),
        (["trainer.devices=many"], "trainer.devices='many'"),
        (
            ["trainer.devices=[1,1]"],
            "trainer.devices=[1, 1]; allowed: a list of device ids without repetition",
        ),
        (["trainer.devices=4", "data.batch_size=2"], "it must be at least 4 for trainer.devices"),
        (
            ["trainer.strategy=fsdp", "trainer.precision=fp16"],
            "is not supported with trainer.strategy",
        ),
        (["trainer.strategy=dp"], "trainer.strategy='dp'"),
        (
            ["trainer.strategy=fsdp", "trainer.channels_last=true"],
            "trainer.channels_last=True",
        ),
        (
            ["trainer.strategy=fsdp", "experiment=shapes_patches"],
            "task.patches is not supported with",
        ),
        (["launch=mpi"], "launch='mpi'"),
        (["trainer.max_time=soon"], "trainer.max_time='soon' is not a duration"),
        (["trainer.max_time='1:99:00'"], "is not a duration"),
        (["trainer.requeue=true"], "set resume=auto as well"),
        (["resume=auto"], "needs a fixed run folder"),
        (["resume=nowhere"], "contains no run to resume"),
    ],
)
def test_launch_config_invalid_value_is_reported(overrides: list[str], problem: str) -> None:
    issues = config_issues(*overrides)
    assert any(problem in issue for issue in issues), issues
