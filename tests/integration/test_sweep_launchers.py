"""Sweeps by the launchers of others: joblib, submitit (SLURM by a stand-in), Ray.

joblib ends its processes in Python's own order of shutting down, so it is driven by a cold command.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import fake_slurm as slurm
from tests.support.processes import (
    SUPPORT_DIR,
    Command,
    descendants,
    wait_until_exited,
    status_of,
    write_numbered_data,
)
from tests.support.runs import RunResult, run_cold
from tests.support.sweeps import job_folders, job_statuses, start_sweep, step_pids, sweep_folder

RAY = "hydra_plugins.hydra_ray_launcher"
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", []),
    "ray": (RAY, ["+hydra.launcher.ray.init.num_cpus=2"]),
}


SHORTER = ("trainer.max_epochs=1",)
DONE, FAILED = ["completed"], ["failed"]


def words_of(launcher: str) -> list[str]:
    plugin, words = LAUNCHERS[launcher]
    if find_spec(plugin) is None:
        pytest.skip(f"the launcher is not installed: {launcher}")
    return [f"hydra/launcher={launcher}", *words]


def ended(process: Command) -> tuple[int, str]:
    """Its exit code, and what it has printed; whatever is left of it is ended."""
    try:
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_a_failed_job_does_not_end_the_others(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    words = ("+task.fault=raise,nothing", "+task.fault_step=1", *SHORTER)
    code, printed = ended(start_sweep(tmp_path, *words_of(launcher), *words))
    assert (code, job_statuses(sweep_folder(tmp_path))) == (1, FAILED + DONE), printed
    assert "job 0 failed: RuntimeError: the step broke" in printed
    assert "gave up" not in printed
    assert printed.count("job 1 completed") == 1
    assert "loss_mean" not in printed  # several jobs at once: each has its own log
    for job in job_folders(sweep_folder(tmp_path)):
        assert "run       mlp_mnist" in (job / "logs" / "rank0.log").read_text()


@pytest.mark.long
def test_joblibs_processes_start_ranks_and_readers_and_killed_they_are_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "none:0:0")
    write_numbered_data(tmp_path / "conf")
    readers = ("data=numbered", "data.loader.num_workers=1", "trusted_targets=[sweep_task,faulty]")
    words = (*readers, "trainer.devices=1,2", "+task.step_seconds=0.3", *SHORTER)
    flags = ("--config-dir", str(tmp_path / "conf"))
    process = start_sweep(tmp_path, *words_of("joblib"), *words, flags=flags, cold=True)
    pids = descendants(process.pid)
    os.kill(step_pids(tmp_path)[0], signal.SIGKILL)
    code, printed = ended(process)
    sweep = sweep_folder(tmp_path)
    assert (code, job_statuses(sweep)[:1]) == (1, FAILED), printed
    assert "completed" not in job_statuses(sweep)
    assert "the launcher gave up: TerminatedWorkerError" in printed
    assert wait_until_exited(pids)
    ran = run_cold(tmp_path, *flags, "-m", f"sweep.resume={sweep}", PYTHONPATH=SUPPORT_DIR)
    assert (ran.code, job_statuses(sweep)) == (0, DONE * 2), ran.out + ran.err
    assert [status_of(job)["ranks"] for job in job_folders(sweep)] == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_who_drives_is_told_to_stop_and_jobs_elsewhere_save_what_they_have(
    launcher: str, tmp_path: Path
) -> None:
    words = ("seed=0,1,2", "+task.step_seconds=0.3")
    process = start_sweep(tmp_path, *words_of(launcher), *words, steps=6, cold=True)
    pids = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)  # not to the jobs; on another machine they hear nothing
    code, printed = ended(process)
    assert code == 130, printed
    assert wait_until_exited(pids)
    sweep = sweep_folder(tmp_path)
    cut = [job for job in job_folders(sweep) if (job / "checkpoints" / "last.pt").exists()]
    assert len(cut) >= 1
    assert {status_of(job)["status"] for job in cut} <= {"interrupted", "preempted"}
    assert "completed" not in job_statuses(sweep)
    assert f"python -m app -m sweep.resume={sweep}" in printed


@pytest.mark.long
def test_slurm_runs_an_array_and_a_job_that_is_told_saves_and_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words_of("submitit_local")
    here = tmp_path / "slurm"
    slurm.install(here)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(here))
    words = ("hydra/launcher=slurm", "trainer.devices=1,2", "+task.step_seconds=0.3")
    process = start_sweep(tmp_path, *words, *SHORTER, steps=1, cold=True)
    until = time.monotonic() + 100
    while len(set(step_pids(tmp_path))) < 3:  # job 0, and both ranks of job 1
        assert time.monotonic() < until
        time.sleep(0.05)
    told = int((here / "process-1").read_text())
    for pid in (told, *descendants(told)):  # SLURM tells all processes of a step
        os.kill(pid, signal.SIGUSR2)
    code, printed = ended(process)
    sweep = sweep_folder(tmp_path)
    assert (code, job_statuses(sweep)) == (0, DONE * 2), printed
    assert (here / "ended-4242_0").read_text() == "COMPLETED 1"
    assert (here / "ended-4242_1").read_text() == "COMPLETED 2"
    assert len(step_pids(tmp_path)) == 12 + 2 * 12  # none is made twice
    assert "job 1 preempted" in printed
    assert "job 1 completed" in printed
    script = (here / "script").read_text()
    asked = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", script))
    wanted = {
        **{"array": "0-1%2", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1"},
        **{"cpus-per-task": "8", "mem": "32GB", "time": "240", "signal": "USR2@120"},
        **{"requeue": "", "open-mode": "append"},
    }
    assert {key: asked.get(key) for key in wanted} == wanted
    assert "partition" not in asked


@pytest.mark.skipif(find_spec(RAY) is not None, reason="Ray is installed")
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    install = 'hydra/launcher=ray is not installed: pip install "torch-experiment-app[ray]"'
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "launcher" / "mine.yaml").write_text("defaults: [ray]\n")
    for option in ("ray", "mine"):  # itself, or by what is made from it
        ran = app("--config-dir", "conf", "-m", f"hydra/launcher={option}", "seed=0,1")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == f"1 error in the configuration:\n  {install}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]
