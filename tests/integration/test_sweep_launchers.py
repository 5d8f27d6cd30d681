"""Sweeps with third-party launchers: joblib, submitit (with a fake SLURM) and Ray.

joblib stops its processes when the interpreter shuts down, so its tests use a cold command.
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
from tests.support import sweeps
from tests.support.processes import (
    SUPPORT_DIR,
    Command,
    descendants,
    status_of,
    wait_until_exited,
    write_numbered_data,
)
from tests.support.runs import RunResult, run_cold

RAY = "hydra_plugins.hydra_ray_launcher"
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", []),
    "ray": (RAY, ["+hydra.launcher.ray.init.num_cpus=2"]),
}
SHORTER = ("trainer.max_epochs=1",)
DONE, FAILED = ["completed"], ["failed"]


def launcher_overrides(launcher: str) -> list[str]:
    plugin, overrides = LAUNCHERS[launcher]
    if find_spec(plugin) is None:
        pytest.skip(f"the launcher is not installed: {launcher}")
    return [f"hydra/launcher={launcher}", *overrides]


def wait_for_exit(process: Command) -> tuple[int, str]:
    """Return the exit code and output of a command; kill what is left of its process group."""
    try:
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_launcher_failed_job_other_jobs_complete(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    overrides = ("+task.fault=raise,nothing", "+task.fault_step=1", *SHORTER)
    code, printed = wait_for_exit(
        sweeps.start_sweep(tmp_path, *launcher_overrides(launcher), *overrides)
    )
    assert (code, sweeps.job_statuses(sweeps.sweep_folder(tmp_path))) == (1, FAILED + DONE), printed
    assert "job 0 failed: RuntimeError: the step broke" in printed
    assert "the launcher failed" not in printed
    assert printed.count("job 1 completed") == 1
    assert "loss_mean" not in printed  # several jobs at once: each has its own log
    for job in sweeps.job_folders(sweeps.sweep_folder(tmp_path)):
        assert "run       mlp_mnist" in (job / "logs" / "rank0.log").read_text()


@pytest.mark.long
def test_joblib_killed_process_stops_sweep_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "none:0:0")
    write_numbered_data(tmp_path / "conf")
    readers = ("data=numbered", "data.loader.num_workers=1", "trusted_targets=[sweep_task,faulty]")
    overrides = (*readers, "trainer.devices=1,2", "+task.step_seconds=0.3", *SHORTER)
    flags = ("--config-dir", str(tmp_path / "conf"))
    process = sweeps.start_sweep(
        tmp_path, *launcher_overrides("joblib"), *overrides, flags=flags, cold=True
    )
    pids = descendants(process.pid)
    os.kill(sweeps.step_pids(tmp_path)[0], signal.SIGKILL)
    code, printed = wait_for_exit(process)
    sweep = sweeps.sweep_folder(tmp_path)
    assert (code, sweeps.job_statuses(sweep)[:1]) == (1, FAILED), printed
    assert "completed" not in sweeps.job_statuses(sweep)
    assert "the launcher failed: TerminatedWorkerError" in printed
    assert wait_until_exited(pids)
    ran = run_cold(tmp_path, *flags, "-m", f"sweep.resume={sweep}", PYTHONPATH=SUPPORT_DIR)
    assert (ran.code, sweeps.job_statuses(sweep)) == (0, DONE * 2), ran.out + ran.err
    assert [status_of(job)["ranks"] for job in sweeps.job_folders(sweep)] == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_launcher_sigint_to_driver_external_jobs_save_and_stop(
    launcher: str, tmp_path: Path
) -> None:
    overrides = ("seed=0,1,2", "+task.step_seconds=0.3")
    process = sweeps.start_sweep(
        tmp_path, *launcher_overrides(launcher), *overrides, steps=6, cold=True
    )
    pids = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)  # not to the jobs, which may be on another machine
    code, printed = wait_for_exit(process)
    assert code == 130, printed
    assert wait_until_exited(pids)
    sweep = sweeps.sweep_folder(tmp_path)
    interrupted = [
        job
        for job in sweeps.job_folders(sweep)
        if (job / "checkpoints" / "last.safetensors").exists()
    ]
    assert len(interrupted) >= 1
    assert {status_of(job)["status"] for job in interrupted} <= {"interrupted", "preempted"}
    assert "completed" not in sweeps.job_statuses(sweep)
    assert f"python -m app -m sweep.resume={sweep}" in printed


@pytest.mark.long
def test_slurm_sigusr2_job_saves_and_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher_overrides("submitit_local")
    slurm_folder = tmp_path / "slurm"
    slurm.install(slurm_folder)
    monkeypatch.setenv("PATH", f"{slurm_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(slurm_folder))
    overrides = ("hydra/launcher=slurm", "trainer.devices=1,2", "+task.step_seconds=0.3")
    process = sweeps.start_sweep(tmp_path, *overrides, *SHORTER, steps=1, cold=True)
    deadline = time.monotonic() + 100
    while len(set(sweeps.step_pids(tmp_path))) < 3:  # job 0, and both ranks of job 1
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step_pid = int((slurm_folder / "process-1").read_text())
    for pid in (step_pid, *descendants(step_pid)):  # SLURM signals all processes of a step
        os.kill(pid, signal.SIGUSR2)
    code, printed = wait_for_exit(process)
    sweep = sweeps.sweep_folder(tmp_path)
    assert (code, sweeps.job_statuses(sweep)) == (0, DONE * 2), printed
    assert (slurm_folder / "ended-4242_0").read_text() == "COMPLETED 1"
    assert (slurm_folder / "ended-4242_1").read_text() == "COMPLETED 2"
    assert len(sweeps.step_pids(tmp_path)) == 12 + 2 * 12  # no step is repeated
    assert "job 1 preempted" in printed
    assert "job 1 completed" in printed
    script = (slurm_folder / "script").read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", script))
    expected = {
        **{"array": "0-1%2", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1"},
        **{"cpus-per-task": "8", "mem": "32GB", "time": "240", "signal": "USR2@120"},
        **{"requeue": "", "open-mode": "append"},
    }
    assert {key: options.get(key) for key in expected} == expected
    assert "partition" not in options


@pytest.mark.skipif(find_spec(RAY) is not None, reason="Ray is installed")
def test_launcher_not_installed_error_names_extra(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    install = 'hydra/launcher=ray is not installed: pip install "torch-experiment-app[ray]"'
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "launcher" / "mine.yaml").write_text("defaults: [ray]\n")
    for option in ("ray", "mine"):  # directly, or through another config
        ran = app("--config-dir", "conf", "-m", f"hydra/launcher={option}", "seed=0,1")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == f"1 error in the configuration:\n  {install}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]
