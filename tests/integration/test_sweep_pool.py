"""Sweeps that are cut, killed, or have jobs side by side."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.processes import (
    alive_pids,
    assert_equal_runs,
    descendants,
    wait_until_exited,
    status_of,
)
from tests.support.sweeps import (
    POOL,
    SWEEP_TASK,
    RunSweep,
    job_folders,
    job_statuses,
    read_sweep_table,
    start_sweep,
    step_pids,
    sweep_folder,
)


def test_a_pool_survives_whatever_happens_to_its_jobs(sweep: RunSweep, tmp_path: Path) -> None:
    """Row 20 of the list of faults."""
    (tmp_path / "broken").touch()
    does = "+task.fault=nothing,nothing,raise,nothing,memory,kill"
    words = (POOL, "hydra.launcher.slots=2", *SWEEP_TASK, does, "seed=3", "+task.fault_step=13")
    assert sweep(*words) == 1
    folder = sweep_folder(tmp_path)
    wanted = ["completed", "failed", "failed", "failed"]
    assert job_statuses(folder) == wanted  # the same values are the same job
    errors = read_sweep_table(folder)["error"]
    assert "the step broke" in errors[1]
    assert "allocate memory" in errors[2]
    assert "killed by SIGKILL" in errors[3]
    logs = [(job / "run.log").read_text() for job in job_folders(folder)]
    assert ["the run failed" in log for log in logs] == [False, True, True, True]
    assert all("Traceback" in log for log in logs[1:3])
    (tmp_path / "broken").unlink()
    (tmp_path / "mark").unlink()
    before = read_sweep_table(folder)["seconds"]
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert job_statuses(folder) == ["completed"] * 4
    assert (read_sweep_table(folder)["seconds"] > before).tolist() == [False, True, True, True]
    assert len(step_pids(tmp_path)) == 3 * 12  # from the second epoch on
    first, *others = job_folders(folder)
    for other in others:
        assert_equal_runs(first, other)


def test_the_pools_jobs_run_side_by_side(
    sweep: RunSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "+hydra.callbacks.told._target_=hydra.experimental.callbacks.LogJobReturnCallback"
    words = (POOL, "hydra.launcher.slots=2", *SWEEP_TASK, "+task.wait_for_processes=2", "seed=0,1,2")
    assert sweep(*words, told) == 0
    assert capsys.readouterr().out.count("Succeeded with return value: 0.") == 3
    pids = step_pids(tmp_path)
    assert len({*pids}) == 3  # a fresh process for each job
    share = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {line.split()[1] for line in (tmp_path / "mark").read_text().splitlines()} == {share}
    assert os.getpid() not in pids
    first, second = (
        sorted(place for place, p in enumerate(pids) if p == one)
        for one in list(dict.fromkeys(pids))[:2]
    )
    assert second[0] < first[-1]  # the second began before the first had ended
    folder = sweep_folder(tmp_path)
    assert "2 slots" in (folder / "sweep.log").read_text()
    assert "epoch" in (job_folders(folder)[0] / "logs" / "rank0.log").read_text()


def test_a_job_that_takes_too_long_is_ended(sweep: RunSweep, tmp_path: Path) -> None:
    words = (POOL, "hydra.launcher.timeout=15", *SWEEP_TASK, "+task.step_seconds=0,1")
    assert sweep(*words) == 1
    folder = sweep_folder(tmp_path)
    assert job_statuses(folder) == ["completed", "failed"]
    assert "it took more than 15 s (hydra.launcher.timeout)" in read_sweep_table(folder)["error"][1]
    assert (job_folders(folder)[1] / "checkpoints" / "last.pt").exists()  # it was asked first


@pytest.mark.parametrize("launcher", [pytest.param("basic", marks=pytest.mark.long), "pool"])
def test_ctrl_c_and_going_on(tmp_path: Path, launcher: str, sweep: RunSweep) -> None:
    """In job 1 of 3; job 0 is not run again."""
    words = (f"hydra/launcher={launcher}", "seed=0,1,2", "+task.step_seconds=0.1")
    slots = ("hydra.launcher.slots=1",) if launcher == "pool" else ()
    process = start_sweep(tmp_path, *words, *slots, steps=24 + 5, cold=launcher == "pool")
    pids = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert wait_until_exited(pids)
    folder = sweep_folder(tmp_path)
    assert job_statuses(folder) == ["completed", "interrupted", "pending"]
    assert (folder / "sweep.html").exists()
    assert f"python -m app -m sweep.resume={folder}" in out
    before = (job_folders(folder)[0] / "status.json").read_bytes()
    made = len(step_pids(tmp_path))
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert job_statuses(folder) == ["completed"] * 3
    assert (job_folders(folder)[0] / "status.json").read_bytes() == before
    assert made + len(step_pids(tmp_path)[made:]) == 3 * 24
    whole = tmp_path / "undisturbed"
    assert sweep(*SWEEP_TASK, words[0], "seed=1", *slots, f"hydra.sweep.dir={whole}") == 0
    assert_equal_runs(job_folders(whole)[0], job_folders(folder)[1])


def test_the_parent_killed_nothing_is_left_and_it_goes_on(tmp_path: Path, sweep: RunSweep) -> None:
    words = (POOL, "hydra.launcher.slots=2", "seed=0,1,2", "+task.fault=hang", "+task.fault_step=17")
    (tmp_path / "broken").touch()
    process = start_sweep(tmp_path, *words, steps=2 * 17)  # both hang in their second epoch
    pids = descendants(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert wait_until_exited(pids, 10.0)
    folder = sweep_folder(tmp_path)
    states = [
        status_of(job)["status"] for job in job_folders(folder) if (job / "status.json").exists()
    ]
    assert states == ["running"] * 2
    made = len(step_pids(tmp_path))
    (tmp_path / "broken").unlink()
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert job_statuses(folder) == ["completed"] * 3
    assert len(step_pids(tmp_path)) - made <= 12 + 12 + 24  # from their checkpoints
    assert sorted(read_sweep_table(folder)["attempts"]) == [1, 1, 1]


def test_two_sweeps_at_once_and_one_folder_for_one(tmp_path: Path, sweep: RunSweep) -> None:
    process = start_sweep(tmp_path, "seed=0,1", "+task.step_seconds=0.1", "hydra.sweep.dir=first")
    try:
        assert sweep("sweep.resume=first", short=False) == 2
        assert sweep("seed=0,1", "hydra.sweep.dir=second") == 0
    finally:
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    assert (
        job_statuses(tmp_path / "first") == job_statuses(tmp_path / "second") == ["completed"] * 2
    )


@pytest.mark.parametrize("launcher", ["basic", "pool"])
def test_values_that_do_not_go_together_fail_alone(
    sweep: RunSweep, tmp_path: Path, launcher: str
) -> None:
    """Each value is sound by itself."""
    words = ("trainer.max_epochs=1,null", "trainer.max_steps=5,null")
    assert sweep(f"hydra/launcher={launcher}", *words) == 1
    folder = sweep_folder(tmp_path)
    assert job_statuses(folder) == ["completed", "completed", "completed", "failed"]
    assert "trainer.max_steps" in read_sweep_table(folder)["error"][3]
    assert "trainer.max_steps" in (job_folders(folder)[3] / "run.log").read_text()


def test_nothing_of_the_pool_is_left(tmp_path: Path) -> None:
    process = start_sweep(tmp_path, POOL, "seed=0,1", "+task.step_seconds=0.2", "+task.fault=hang")
    (tmp_path / "broken").touch()
    pids = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not alive_pids(pids) or wait_until_exited(pids)
    assert set(job_statuses(sweep_folder(tmp_path))) <= {"preempted", "pending"}
