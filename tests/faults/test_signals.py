"""Runs that are stopped by signals or time, and resumed."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd
import pytest
from torch._C._distributed_c10d import TCPStore

from app.config.schema import Job
from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.local import LocalWorkers
from app.distributed.launch.worker import run_rank
from app.experiment.entry import run_experiment
from app.runtime.signals import StopReason, StopSignal, TrainingInterrupted
from app.training.checkpoint.store import read_store
from tests.support.processes import (
    FAULTY_TASK,
    SHORT_RUN,
    SILENT_LOGGING,
    SUPPORT_DIR,
    alive_pids,
    assert_equal_runs,
    descendants,
    free_port,
    start_command,
    start_training,
    status_of,
    wait_until_exited,
)
from tests.support.runs import job_for, run_app


@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c_saves_checkpoint_and_exits(tmp_path: Path, devices: int) -> None:
    process = start_training(tmp_path, f"trainer.devices={devices}", cold=devices == 2)
    pids = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert out.count("stopping after the current step; press Ctrl-C again to stop at once") == 1
    assert "Traceback" not in out
    assert f"interrupted; to resume: python -m app resume={tmp_path / 'run'}\n" in out
    assert status_of(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert len(pd.read_csv(tmp_path / "run" / "epoch_details" / "epoch001_train.csv")) < 12
    assert wait_until_exited(pids)


@pytest.mark.parametrize("devices", [1, 2])
def test_second_ctrl_c_exits_without_saving(tmp_path: Path, devices: int) -> None:
    process = start_training(tmp_path, f"trainer.devices={devices}", fault="slow:0:3")
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert status_of(tmp_path / "run")["status"] == "interrupted"
    assert not (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert wait_until_exited(pids)


def test_sigterm_before_ranks_are_ready_prevents_training(tmp_path: Path) -> None:
    overrides = (*SHORT_RUN, "trainer.devices=2", "hydra.run.dir=run")
    process = start_command(tmp_path, overrides, cold=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not (tmp_path / "run" / "epoch_details").exists()


def test_stop_while_ranks_connect_stops_all_of_them(tmp_path: Path) -> None:
    job = job_for(*SHORT_RUN, "trainer.devices=2")
    workers = LocalWorkers(run_experiment, job, tmp_path, 2, SILENT_LOGGING)
    try:
        workers.start()
        late_pid = workers.processes[1].pid
        assert late_pid is not None
        os.kill(late_pid, signal.SIGSTOP)
        time.sleep(3)  # rank 0 waits for rank 1
        workers.poll(wait(workers.wait_handles, timeout=0))
        workers.request_stop(StopReason.PREEMPTED)
        os.kill(late_pid, signal.SIGCONT)
        while not workers.is_finished:
            workers.poll(wait(workers.wait_handles, timeout=0.2))
    finally:
        workers.kill()
    assert {rank: failure.kind for rank, failure in workers.failures.items()} == {
        0: "stopped",
        1: "stopped",
    }
    assert not (tmp_path / "epoch_details").exists()


def connect_rank(rank: int, port: int, job: Job, folder: Path) -> None:
    """Connect to the other rank as under torchrun, and exit with the code of the signal."""
    cluster = ClusterEnvironment("torchrun", rank, 2, rank, 2, "127.0.0.1", port)
    stop = StopSignal(handles_second_interrupt=False)
    with stop.installed():
        store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False)
        try:
            run_rank(lambda *_: None, cluster, job, folder, store, stop)
        except TrainingInterrupted as interrupt:
            os._exit(interrupt.exit_code)
    os._exit(0)


def test_ranks_of_torchrun_connect_before_they_stop(tmp_path: Path) -> None:
    job, port, context = job_for(*SHORT_RUN), free_port(), mp.get_context("fork")
    log_file = tmp_path / "logs" / "rank1.log"
    log_file.parent.mkdir()
    os.mkfifo(log_file)  # rank 1 waits here until somebody reads
    ranks = [context.Process(target=connect_rank, args=(n, port, job, tmp_path)) for n in (0, 1)]
    try:
        for process in ranks:
            process.start()
        time.sleep(3)  # rank 0 waits for rank 1
        for process in ranks:
            process.terminate()
        time.sleep(0.5)
        reader = os.open(log_file, os.O_RDONLY | os.O_NONBLOCK)
        for process in ranks:
            process.join(30)
        os.close(reader)
        assert [process.exitcode for process in ranks] == [143, 143]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize(("name", "target"), [("SIGTERM", "group"), ("SIGUSR1", "parent")])
def test_preemption_saves_checkpoint_and_exits(tmp_path: Path, name: str, target: str) -> None:
    process = start_training(tmp_path, "trainer.devices=2", cold=name == "SIGTERM")
    pids = descendants(process.pid)
    send = os.killpg if target == "group" else os.kill
    send(process.pid, getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert status_of(tmp_path / "run")["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert wait_until_exited(pids)


def test_killed_parent_ends_all_child_processes(tmp_path: Path) -> None:
    process = start_training(tmp_path, "trainer.devices=2", cold=True)
    pids = descendants(process.pid)
    assert len(alive_pids(pids)) >= 2 + 4  # ranks and their data workers
    process.kill()
    process.communicate(timeout=30)
    assert wait_until_exited(pids)


def test_requeued_run_resumes_and_matches_uninterrupted_run(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol-calls\n')
    (bin_folder / "scontrol").chmod(0o755)
    overrides = (
        *SHORT_RUN,
        *FAULTY_TASK,
        "trainer.devices=2",
        "resume=auto",
        "trainer.requeue=true",
    )
    overrides = (*overrides, "trainer.limit_train_batches=40", "metric/single@metric.train=[auroc]")
    environment = {
        "PYTHONPATH": SUPPORT_DIR,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLOW": "0.02",
    }
    preempted = run_app(
        tmp_path, *overrides, "hydra.run.dir=run", FAULT="SIGUSR1:1:45", **environment
    )
    assert preempted.code == 143, preempted.out + preempted.err
    last = read_store(tmp_path / "run" / "checkpoints" / "last.safetensors")[1]
    assert (last["epoch"], last["training"]["phase"]) == (1, "train")
    assert 5 <= last["training"]["mid_epoch"]["batches"] < 40
    assert (tmp_path / "scontrol-calls").read_text() == "requeue 4711\n"
    resumed = run_app(tmp_path, *overrides, "hydra.run.dir=run", FAULT="none:0:0", **environment)
    assert resumed.code == 0, resumed.out + resumed.err
    uninterrupted = run_app(
        tmp_path, *overrides, "hydra.run.dir=uninterrupted", FAULT="none:0:0", **environment
    )
    assert uninterrupted.code == 0, uninterrupted.out + uninterrupted.err
    assert_equal_runs(tmp_path / "uninterrupted", tmp_path / "run")
    complete = run_app(tmp_path, *overrides, "hydra.run.dir=run", FAULT="none:0:0", **environment)
    assert complete.code == 0
    assert "is already complete: nothing to resume" in complete.out


def test_max_time_ends_training_and_tests_best_checkpoint(tmp_path: Path) -> None:
    result = run_app(
        tmp_path,
        *SHORT_RUN,
        *FAULTY_TASK,
        "trainer.devices=2",
        "trainer.max_time=00:00:01",
        "trainer.max_epochs=1000",
        FAULT="slow:0:0.2",
        PYTHONPATH=SUPPORT_DIR,
    )
    assert result.code == 0, result.out + result.err
    assert result.status["status"] == "completed"
    assert len(result.csv("epoch_details/epoch001_train.csv")) < 12
    assert list(result.csv("summary_table.csv")["stage"]) == ["train", "valid", "test"]
