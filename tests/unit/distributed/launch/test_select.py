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
    ("overrides", "problems"),
    [
        (
            [
                "trainer.devices=0",
                "trainer.strategy=dp",
                "launch=mpi",
                "trainer.max_time=soon",
                "trainer.requeue=true",
            ],
            [
                "trainer.devices=0",
                "trainer.strategy='dp'",
                "launch='mpi'",
                "trainer.max_time='soon' is not a duration",
                "set resume=auto as well",
            ],
        ),
        (
            ["trainer.devices=many", "trainer.max_time='1:99:00'"],
            ["trainer.devices='many'", "is not a duration"],
        ),
        (
            ["trainer.devices=[1,1]"],
            ["trainer.devices=[1, 1]; allowed: a list of device ids without repetition"],
        ),
        (["resume=auto"], ["needs a fixed run folder"]),
        (["resume=nowhere"], ["contains no run to resume"]),
        (
            ["trainer.devices=4", "data.batch_size=2"],
            ["it must be at least 4 for trainer.devices"],
        ),
        (
            [
                "trainer.strategy=fsdp",
                "trainer.precision=fp16",
                "trainer.channels_last=true",
                "experiment=shapes_patches",
            ],
            [
                "fp16' is not supported with trainer.strategy",
                "trainer.channels_last=True",
                "task.patches is not supported with",
            ],
        ),
    ],
)
def test_launch_config_invalid_values_are_reported(
    overrides: list[str], problems: list[str]
) -> None:
    text = "\n".join(config_issues(*overrides))
    assert [problem for problem in problems if problem not in text] == [], text
