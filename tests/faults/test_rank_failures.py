"""What goes wrong in one rank ends all, is named, and leaves nobody; each is provoked for real."""

from __future__ import annotations

import io
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from app.distributed.launch.failures import (
    RankFailedError,
    RankFailure,
    root_exception,
    root_failure,
)
from app.runtime.errors import StorageError, UserError
from app.runtime.signals import StopReason, TrainingInterrupted
from tests.support.processes import (
    own_processes,
    status_of,
    write_numbered,
)


@pytest.mark.parametrize(
    ("fault", "rank", "error"),
    [
        ("raise:1:3", 1, "RuntimeError: the rank broke"),
        ("raise:0:3", 0, "RuntimeError: the rank broke"),
        ("raise:1:4:valid", 1, "RuntimeError: the rank broke"),
        ("memory:1:3", 1, "out of memory in train, epoch 1, step 2 of rank 1"),
        ("kill:1:3", 1, "it was killed by SIGKILL"),
        ("kill:0:3", 0, "it was killed by SIGKILL"),
        ("exit:1:3", 1, "it ended with exit code 7"),
    ],
)
def test_the_rank_that_failed_is_named(
    ranks: Callable[..., Path], tmp_path: Path, fault: str, rank: int, error: str
) -> None:
    with pytest.raises((RankFailedError, UserError)) as failed:
        ranks(fault)
    assert error in str(failed.value)
    status = status_of(tmp_path)
    assert (status["status"], status["rank"]) == ("failed", rank)
    assert error in status["error"]
    assert ("can't allocate memory" in status["error"]) == fault.startswith("memory")
    assert not own_processes()


@pytest.mark.parametrize(("fault", "rank"), [("stop:1:3", 1), ("hang:0:3", 0), ("hang:2:3", 2)])
def test_a_silent_rank_is_named_after_the_timeout(
    ranks: Callable[..., Path], tmp_path: Path, fault: str, rank: int
) -> None:
    with pytest.raises(RankFailedError, match=rf"rank {rank}: it has not answered for 6 s"):
        ranks(fault, "trainer.timeout=6", size=3)
    assert status_of(tmp_path)["rank"] == rank
    assert not own_processes()


def test_data_that_one_rank_cannot_read_ends_all(
    ranks: Callable[..., Path], tmp_path: Path
) -> None:
    write_numbered(tmp_path / "conf")
    words = ("data=numbered", "trainer.sanity_valid_batches=0")
    with pytest.raises(RankFailedError, match="rank 1: OSError: the file broke"):
        ranks("data:1:9", *words, flags=("--config-dir", str(tmp_path / "conf")))
    assert status_of(tmp_path)["rank"] == 1


def test_a_failing_watcher_ends_all_ranks(ranks: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 0: RuntimeError: the watcher broke"):
        ranks("none:0:0", "+callbacks.faulty._target_=faulty.FaultyCallback")
    assert status_of(tmp_path)["status"] == "failed"


def test_a_failing_write_ends_all_ranks(ranks: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"\.pt cannot be written: File exists"):
        ranks("none:0:0")
    assert status_of(tmp_path)["rank"] == 0


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        ("SIGTERM:1:5", "preempted", StopReason.PREEMPTED),
        ("SIGUSR1:0:5", "preempted", StopReason.PREEMPTED),
        ("SIGINT:1:5", "interrupted", StopReason.INTERRUPTED),
        ("SIGTERM:1:4:valid", "preempted", StopReason.PREEMPTED),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    ranks: Callable[..., Path], tmp_path: Path, fault: str, state: str, reason: StopReason
) -> None:
    with pytest.raises(TrainingInterrupted) as stopped:
        ranks(fault)
    assert stopped.value.reason == reason
    assert status_of(tmp_path)["status"] == state
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    training = checkpoint["training"]
    if "valid" in fault:
        assert (checkpoint["epoch"], training["is_over"]) == (1, False)
    else:
        rows = pd.read_csv(tmp_path / "epoch_details" / "epoch001_train.csv")
        assert 5 <= len(rows) <= 12
        assert training["trained"] == len(rows) == training["learning"][""]["steps"]


def test_what_the_launch_takes_is_free_again(ranks: Callable[..., Path], tmp_path: Path) -> None:
    """The port of the store, and processes; the next run in the same process finds all it needs."""
    with pytest.raises(RankFailedError):
        ranks("kill:1:3")
    listening = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True, check=True)
    assert f"pid={os.getpid()}," not in listening.stdout
    ranks("none:0:0")
    assert status_of(tmp_path)["status"] == "completed"


def test_a_slow_save_is_waited_for(ranks: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        ranks("SIGTERM:1:5", "+callbacks.slow={_target_: faulty.SlowEnd, seconds: 7}")
    assert (tmp_path / "checkpoints" / "last.pt").exists()
    assert (tmp_path / "ended").exists()


def test_a_save_that_fails_is_no_clean_end(ranks: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"\.pt cannot be written: File exists"):
        ranks("SIGTERM:1:5")
    assert status_of(tmp_path)["status"] == "failed"


def test_who_is_the_cause() -> None:
    lost = RankFailure(0, "lost", "gone", when=1.0)
    late = RankFailure(0, "timeout", "waited", "where", when=2.0)
    died = RankFailure(1, "died", "killed", when=3.0)
    broke = RankFailure(2, "error", "broke", when=2.5)
    assert root_failure([lost, died, broke], 3, 9) is broke
    assert root_failure([lost, died], 3, 9) is died
    silent = root_failure([lost, late], 3, 9)
    assert (silent.rank, silent.trace) == (1, "where")
    assert root_failure([lost], 1, 9) is lost
    assert root_failure([lost], 2, 9).rank == 1


def test_a_signal_in_the_midst_of_a_failure_does_not_hide_it() -> None:
    broke = OSError("the disk broke")
    try:
        try:
            raise broke
        finally:
            raise TrainingInterrupted(StopReason.PREEMPTED)
    except TrainingInterrupted as stopped:
        assert root_exception(stopped) is broke
    alone = TrainingInterrupted(StopReason.PREEMPTED)
    assert root_exception(alone) is alone


def test_what_a_library_deals_with_is_no_failure() -> None:
    """A signal may come while it does."""

    class Asked(logging.StreamHandler[Any]):
        def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
            raise TrainingInterrupted(StopReason.PREEMPTED)

    closed = io.StringIO()
    closed.close()
    try:
        Asked(closed).emit(logging.makeLogRecord({}))
    except TrainingInterrupted as stopped:
        assert isinstance(stopped.__context__, ValueError)
        assert root_exception(stopped) is stopped
