"""A failure of one rank ends all ranks and is named; faults are injected into real processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from app.distributed.launch.failures import RankFailedError
from app.runtime.errors import StorageError, UserError
from app.runtime.signals import StopReason, TrainingInterrupted
from app.training.checkpoint.store import read_store
from tests.support.processes import child_processes, status_of, write_numbered_data


@pytest.mark.parametrize(
    ("fault", "rank", "error"),
    [
        ("raise:1:3", 1, "RuntimeError: injected failure"),
        ("raise:0:3", 0, "RuntimeError: injected failure"),
        ("raise:1:4:valid", 1, "RuntimeError: injected failure"),
        ("memory:1:3", 1, "out of memory in train, epoch 1, step 2 of rank 1"),
        ("kill:1:3", 1, "killed by SIGKILL"),
        ("kill:0:3", 0, "killed by SIGKILL"),
        ("exit:1:3", 1, "exited with code 7"),
    ],
)
def test_rank_failure_is_named_in_error_and_status(
    run_ranks: Callable[..., Path], tmp_path: Path, fault: str, rank: int, error: str
) -> None:
    with pytest.raises((RankFailedError, UserError)) as failed:
        run_ranks(fault)
    assert error in str(failed.value)
    status = status_of(tmp_path)
    assert (status["status"], status["rank"]) == ("failed", rank)
    assert error in status["error"]
    assert ("can't allocate memory" in status["error"]) == fault.startswith("memory")
    assert not child_processes()


@pytest.mark.parametrize(("fault", "rank"), [("stop:1:3", 1), ("hang:0:3", 0), ("hang:2:3", 2)])
def test_unresponsive_rank_is_named_after_timeout(
    run_ranks: Callable[..., Path], tmp_path: Path, fault: str, rank: int
) -> None:
    with pytest.raises(RankFailedError, match=rf"rank {rank}: no response for 6 s"):
        run_ranks(fault, "trainer.timeout=6", size=3)
    assert status_of(tmp_path)["rank"] == rank
    assert not child_processes()


def test_blocked_dataset_on_one_rank_ends_all_ranks_and_names_the_sample(
    run_ranks: Callable[..., Path], tmp_path: Path
) -> None:
    write_numbered_data(tmp_path / "conf")
    overrides = ("data=numbered", "trainer.sanity_valid_batches=0", "data.loader.timeout=4")
    message = r"no data for 4 s \(data\.loader\.timeout\): worker 0 is reading sample 7"
    with pytest.raises(UserError, match=message):
        run_ranks(
            "block:1:7",
            *overrides,
            "data.loader.num_workers=1",
            flags=("--config-dir", str(tmp_path / "conf")),
        )
    log = (tmp_path / "logs" / "rank1.log").read_text()
    assert "waiting for data for 2 s: worker 0 is reading sample 7" in log
    assert status_of(tmp_path)["rank"] == 1
    assert not child_processes()


def test_dataset_failure_on_one_rank_ends_all_ranks(
    run_ranks: Callable[..., Path], tmp_path: Path
) -> None:
    write_numbered_data(tmp_path / "conf")
    overrides = ("data=numbered", "trainer.sanity_valid_batches=0")
    with pytest.raises(RankFailedError, match="rank 1: OSError: injected read failure"):
        run_ranks("data:1:9", *overrides, flags=("--config-dir", str(tmp_path / "conf")))
    assert status_of(tmp_path)["rank"] == 1


def test_callback_failure_ends_all_ranks(run_ranks: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 0: RuntimeError: injected callback failure"):
        run_ranks("none:0:0", "+callbacks.faulty._target_=faulty.FaultyCallback")
    assert status_of(tmp_path)["status"] == "failed"


def test_checkpoint_write_failure_ends_all_ranks(
    run_ranks: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("a file instead of a folder")
    with pytest.raises(StorageError, match=r"\.safetensors cannot be written: File exists"):
        run_ranks("none:0:0")
    assert status_of(tmp_path)["rank"] == 0


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("SIGTERM:1:5", "preempted", StopReason.PREEMPTED),
        ("SIGUSR1:0:5", "preempted", StopReason.PREEMPTED),
        ("SIGINT:1:5", "interrupted", StopReason.INTERRUPTED),
        ("SIGTERM:1:4:valid", "preempted", StopReason.PREEMPTED),
    ],
)
def test_signal_to_one_rank_stops_all_ranks_at_same_step(
    run_ranks: Callable[..., Path], tmp_path: Path, fault: str, status: str, reason: StopReason
) -> None:
    with pytest.raises(TrainingInterrupted) as interrupt:
        run_ranks(fault)
    assert interrupt.value.reason == reason
    assert status_of(tmp_path)["status"] == status
    checkpoint = read_store(tmp_path / "checkpoints" / "last.safetensors")[1]
    training = checkpoint["training"]
    if "valid" in fault:
        assert (checkpoint["epoch"], training["phase"]) == (1, "valid")
    else:
        rows = pd.read_csv(tmp_path / "epoch_details" / "epoch001_train.csv")
        assert 5 <= len(rows) <= 12
        assert training["batches_in_epoch"] == len(rows) == training["optimizers"][""]["steps"]


def test_launch_local_after_failure_releases_port_and_processes(
    run_ranks: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError):
        run_ranks("kill:1:3")
    open_ports = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True, check=True)
    assert f"pid={os.getpid()}," not in open_ports.stdout
    run_ranks("none:0:0")
    assert status_of(tmp_path)["status"] == "completed"


def test_preempted_run_waits_for_slow_callback(
    run_ranks: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(TrainingInterrupted):
        run_ranks("SIGTERM:1:5", "+callbacks.slow={_target_: faulty.SlowCallback, seconds: 7}")
    assert (tmp_path / "checkpoints" / "last.safetensors").exists()
    assert (tmp_path / "ended").exists()


def test_preempted_run_with_failed_save_is_failed(
    run_ranks: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("a file instead of a folder")
    with pytest.raises(StorageError, match=r"\.safetensors cannot be written: File exists"):
        run_ranks("SIGTERM:1:5")
    assert status_of(tmp_path)["status"] == "failed"
