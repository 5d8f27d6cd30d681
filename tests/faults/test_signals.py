"""Runs that are asked to stop, and go on where they were."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.support.processes import (
    FAULTY,
    SHORT,
    TESTS,
    alive,
    assert_equal_runs,
    begun,
    descendants,
    gone,
    started,
    status_of,
)
from tests.support.runs import run_app


@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c_saves_and_ends(tmp_path: Path, devices: int) -> None:
    process = started(tmp_path, f"trainer.devices={devices}", cold=devices == 2)
    pids = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert out.count("stopping after this step; Ctrl-C again ends it at once") == 1
    assert "Traceback" not in out
    assert status_of(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert len(pd.read_csv(tmp_path / "run" / "epoch_details" / "epoch001_train.csv")) < 12
    assert gone(pids)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_ctrl_c_kills(tmp_path: Path, devices: int) -> None:
    process = started(tmp_path, f"trainer.devices={devices}", fault="slow:0:3")
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert status_of(tmp_path / "run")["status"] == "interrupted"
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert gone(pids)


def test_asked_before_the_ranks_are_up_it_does_not_begin(tmp_path: Path) -> None:
    words = (*SHORT, "trainer.devices=2", "hydra.run.dir=run")
    process = begun(tmp_path, words, cold=True)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "config.yaml").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not (tmp_path / "run" / "epoch_details").exists()


@pytest.mark.parametrize(("number", "whom"), [("SIGTERM", "all"), ("SIGUSR1", "one")])
def test_preempted_it_saves_and_ends(tmp_path: Path, number: str, whom: str) -> None:
    process = started(tmp_path, "trainer.devices=2", cold=number == "SIGTERM")
    pids = descendants(process.pid)
    send = os.killpg if whom == "all" else os.kill
    send(process.pid, getattr(signal, number))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert status_of(tmp_path / "run")["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert gone(pids)


def test_nobody_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path, "trainer.devices=2", cold=True)
    pids = descendants(process.pid)
    assert len(alive(pids)) >= 2 + 4  # ranks, and the readers of each
    process.kill()
    process.communicate(timeout=30)
    assert gone(pids)


def test_preempted_and_started_again_it_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """By the same command, in the same folder; SLURM was asked to start it again."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (bin_ / "scontrol").chmod(0o755)
    words = (*SHORT, *FAULTY, "trainer.devices=2", "resume=auto", "trainer.requeue=true")
    words = (*words, "trainer.limit_train_batches=40", "metric/single@metric.train=[auroc]")
    environment = {
        "PYTHONPATH": TESTS,
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLOW": "0.02",
    }
    cut = run_app(tmp_path, *words, "hydra.run.dir=run", FAULT="SIGUSR1:1:45", **environment)
    assert cut.code == 143, cut.out + cut.err
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert (last["epoch"], last["training"]["is_over"]) == (1, True)
    assert 5 <= last["training"]["under_way"]["batches"] < 40
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    again = run_app(tmp_path, *words, "hydra.run.dir=run", FAULT="none:0:0", **environment)
    assert again.code == 0, again.out + again.err
    whole = run_app(tmp_path, *words, "hydra.run.dir=whole", FAULT="none:0:0", **environment)
    assert whole.code == 0, whole.out + whole.err
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    complete = run_app(tmp_path, *words, "hydra.run.dir=run", FAULT="none:0:0", **environment)
    assert complete.code == 0
    assert "is complete: there is nothing to go on with" in complete.out


def test_time_ends_training_and_the_best_is_tested(tmp_path: Path) -> None:
    ran = run_app(
        tmp_path,
        *SHORT,
        *FAULTY,
        "trainer.devices=2",
        "trainer.max_time=00:00:01",
        "trainer.max_epochs=1000",
        FAULT="slow:0:0.2",
        PYTHONPATH=TESTS,
    )
    assert ran.code == 0, ran.out + ran.err
    assert ran.status["status"] == "completed"
    assert len(ran.csv("epoch_details/epoch001_train.csv")) < 12
    assert list(ran.csv("summary_table.csv")["stage"]) == ["train", "valid", "test"]
