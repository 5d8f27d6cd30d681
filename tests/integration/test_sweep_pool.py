"""Sweeps with parallel jobs, and sweeps that are interrupted or killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support import sweeps
from tests.support.processes import (
    alive_pids,
    assert_equal_runs,
    descendants,
    status_of,
    wait_until_exited,
)
from tests.support.sweeps import RunSweep


def test_pool_failing_jobs_other_jobs_complete_and_resume(sweep: RunSweep, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    faults = "+task.fault=nothing,nothing,raise,nothing,memory,kill"
    overrides = (
        sweeps.POOL,
        "hydra.launcher.slots=2",
        *sweeps.SWEEP_TASK,
        faults,
        "seed=3",
        "+task.fault_step=13",
    )
    assert sweep(*overrides) == 1
    folder = sweeps.sweep_folder(tmp_path)
    expected = ["completed", "failed", "failed", "failed"]
    assert sweeps.job_statuses(folder) == expected  # jobs with the same values run once
    errors = sweeps.read_sweep_table(folder)["error"]
    assert "the step broke" in errors[1]
    assert "allocate memory" in errors[2]
    assert "killed by SIGKILL" in errors[3]
    logs = [(job / "run.log").read_text() for job in sweeps.job_folders(folder)]
    assert ["the run failed" in log for log in logs] == [False, True, True, True]
    assert all("Traceback" in log for log in logs[1:3])
    (tmp_path / "broken").unlink()
    (tmp_path / "mark").unlink()
    before = sweeps.read_sweep_table(folder)["seconds"]
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert sweeps.job_statuses(folder) == ["completed"] * 4
    assert (sweeps.read_sweep_table(folder)["seconds"] > before).tolist() == [
        False,
        True,
        True,
        True,
    ]
    assert len(sweeps.step_pids(tmp_path)) == 3 * 12  # from the second epoch on
    first, *others = sweeps.job_folders(folder)
    for other in others:
        assert_equal_runs(first, other)


def test_pool_runs_jobs_in_parallel_processes(
    sweep: RunSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = "+hydra.callbacks.log._target_=hydra.experimental.callbacks.LogJobReturnCallback"
    overrides = (
        sweeps.POOL,
        "hydra.launcher.slots=2",
        *sweeps.SWEEP_TASK,
        "+task.wait_for_processes=2",
        "seed=0,1,2",
        "trainer.max_epochs=1",
    )
    assert sweep(*overrides, callback) == 0
    assert capsys.readouterr().out.count("Succeeded with return value: 0.") == 3
    pids = sweeps.step_pids(tmp_path)
    assert len({*pids}) == 3  # a new process for each job
    share = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {line.split()[1] for line in (tmp_path / "mark").read_text().splitlines()} == {share}
    assert os.getpid() not in pids
    first, second = (
        [step for step, p in enumerate(pids) if p == pid] for pid in list(dict.fromkeys(pids))[:2]
    )
    assert second[0] < first[-1]  # the second job started before the first had ended
    folder = sweeps.sweep_folder(tmp_path)
    assert "2 slots" in (folder / "sweep.log").read_text()
    assert "epoch" in (sweeps.job_folders(folder)[0] / "logs" / "rank0.log").read_text()


def test_pool_timeout_stops_job_after_saving(sweep: RunSweep, tmp_path: Path) -> None:
    overrides = (
        sweeps.POOL,
        "hydra.launcher.timeout=15",
        *sweeps.SWEEP_TASK,
        "+task.step_seconds=0,1",
    )
    assert sweep(*overrides) == 1
    folder = sweeps.sweep_folder(tmp_path)
    assert sweeps.job_statuses(folder) == ["completed", "failed"]
    assert (
        "the job took more than 15 s (hydra.launcher.timeout)"
        in sweeps.read_sweep_table(folder)["error"][1]
    )
    assert (
        sweeps.job_folders(folder)[1] / "checkpoints" / "last.safetensors"
    ).exists()  # it could save before it was stopped


@pytest.mark.parametrize("launcher", [pytest.param("basic", marks=pytest.mark.long), "pool"])
def test_resume_after_ctrl_c_equals_uninterrupted_run(
    tmp_path: Path, launcher: str, sweep: RunSweep
) -> None:
    """Ctrl-C comes in job 1 of 3; job 0 must not run again."""
    overrides = (f"hydra/launcher={launcher}", "seed=0,1,2", "+task.step_seconds=0.1")
    slots = ("hydra.launcher.slots=1",) if launcher == "pool" else ()
    process = sweeps.start_sweep(
        tmp_path, *overrides, *slots, steps=24 + 5, cold=launcher == "pool"
    )
    pids = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert wait_until_exited(pids)
    folder = sweeps.sweep_folder(tmp_path)
    assert sweeps.job_statuses(folder) == ["completed", "interrupted", "pending"]
    assert (folder / "sweep.html").exists()
    assert f"python -m app -m sweep.resume={folder}" in out
    before = (sweeps.job_folders(folder)[0] / "status.json").read_bytes()
    num_steps = len(sweeps.step_pids(tmp_path))
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert sweeps.job_statuses(folder) == ["completed"] * 3
    assert (sweeps.job_folders(folder)[0] / "status.json").read_bytes() == before
    assert num_steps + len(sweeps.step_pids(tmp_path)[num_steps:]) == 3 * 24
    uninterrupted = tmp_path / "uninterrupted"
    assert (
        sweep(
            *sweeps.SWEEP_TASK, overrides[0], "seed=1", *slots, f"hydra.sweep.dir={uninterrupted}"
        )
        == 0
    )
    assert_equal_runs(sweeps.job_folders(uninterrupted)[0], sweeps.job_folders(folder)[1])


def test_resume_after_parent_sigkill_continues_from_checkpoints(
    tmp_path: Path, sweep: RunSweep
) -> None:
    overrides = (
        sweeps.POOL,
        "hydra.launcher.slots=2",
        "seed=0,1,2",
        "+task.fault=hang",
        "+task.fault_step=17",
    )
    (tmp_path / "broken").touch()
    process = sweeps.start_sweep(
        tmp_path, *overrides, steps=2 * 17
    )  # both hang in their second epoch
    pids = descendants(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert wait_until_exited(pids, 10.0)
    folder = sweeps.sweep_folder(tmp_path)
    states = [
        status_of(job)["status"]
        for job in sweeps.job_folders(folder)
        if (job / "status.json").exists()
    ]
    assert states == ["running"] * 2
    num_steps = len(sweeps.step_pids(tmp_path))
    (tmp_path / "broken").unlink()
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert sweeps.job_statuses(folder) == ["completed"] * 3
    assert len(sweeps.step_pids(tmp_path)) - num_steps <= 12 + 12 + 24  # from their checkpoints
    assert sorted(sweeps.read_sweep_table(folder)["attempts"]) == [1, 1, 1]


def test_sweep_concurrent_only_in_different_folders(tmp_path: Path, sweep: RunSweep) -> None:
    process = sweeps.start_sweep(
        tmp_path, "seed=0,1", "+task.step_seconds=0.3", "hydra.sweep.dir=first"
    )
    try:
        assert sweep("sweep.resume=first", short=False) == 2
        assert sweep("seed=0,1", "hydra.sweep.dir=second") == 0
    finally:
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    assert (
        sweeps.job_statuses(tmp_path / "first")
        == sweeps.job_statuses(tmp_path / "second")
        == ["completed"] * 2
    )


@pytest.mark.parametrize("launcher", ["basic", "pool"])
def test_sweep_incompatible_values_only_that_job_fails(
    sweep: RunSweep, tmp_path: Path, launcher: str
) -> None:
    """Each value is valid by itself."""
    overrides = ("trainer.max_epochs=1,null", "trainer.max_steps=5,null")
    assert sweep(f"hydra/launcher={launcher}", *overrides) == 1
    folder = sweeps.sweep_folder(tmp_path)
    assert sweeps.job_statuses(folder) == ["completed", "completed", "completed", "failed"]
    assert "trainer.max_steps" in sweeps.read_sweep_table(folder)["error"][3]
    assert "trainer.max_steps" in (sweeps.job_folders(folder)[3] / "run.log").read_text()


def test_pool_sigterm_leaves_no_processes(tmp_path: Path) -> None:
    process = sweeps.start_sweep(
        tmp_path, sweeps.POOL, "seed=0,1", "+task.step_seconds=0.2", "+task.fault=hang"
    )
    (tmp_path / "broken").touch()
    pids = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not alive_pids(pids) or wait_until_exited(pids)
    assert set(sweeps.job_statuses(sweeps.sweep_folder(tmp_path))) <= {"preempted", "pending"}
