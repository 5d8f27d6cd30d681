"""Launch of ranks by this program, torchrun and srun."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.distributed.launch.local import launch_local
from app.experiment.entry import run_experiment
from tests.support.fake_slurm import STEP_VARIABLES
from tests.support.processes import (
    FAULTY_TASK,
    SHORT_RUN,
    SILENT_LOGGING,
    SUPPORT_DIR,
    assert_two_jobs_completed,
    free_port,
    occupied_port,
    run_torchrun,
    start_command,
    status_of,
)
from tests.support.runs import RunResult, job_for, run_app


def test_launch_local_concurrent_runs_are_independent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SUPPORT_DIR)
    overrides = ("trainer.max_epochs=1", "trainer.limit_test_batches=1", "trainer.devices=2")
    job = job_for(
        *SHORT_RUN, *overrides, "trainer.limit_train_batches=2", "trainer.sanity_valid_batches=0"
    )
    folders = [tmp_path / str(number) for number in range(8)]
    for folder in folders:
        folder.mkdir()
    with occupied_port(29500), ThreadPoolExecutor(len(folders)) as pool:
        results = list(
            pool.map(
                lambda folder: launch_local(run_experiment, job, folder, 2, SILENT_LOGGING), folders
            )
        )
    assert len({*results}) == 1
    assert [status_of(folder)["status"] for folder in folders] == ["completed"] * len(folders)


def test_local_ranks_warning_of_rank_one_names_rank(tmp_path: Path) -> None:
    overrides = (*SHORT_RUN, *FAULTY_TASK, "trainer.devices=2")
    result = run_app(tmp_path, *overrides, FAULT="warn:1:3", PYTHONPATH=SUPPORT_DIR)
    assert result.code == 0, result.err
    for console in (result.err, (result.folder / "run.log").read_text()):
        assert console.count("UserWarning: injected warning") == 1
        assert "rank 1: " in console
    rank_log = (result.folder / "logs" / "rank1.log").read_text()
    assert "injected warning" in rank_log
    assert "2 x cpu" in rank_log
    assert not (result.folder / "logs" / "rank0.log").exists()
    assert result.out.count("best accuracy") == 2  # once per epoch, from rank 0 only


def test_local_ranks_sweep_creates_folder_per_job(tmp_path: Path) -> None:
    result = run_app(tmp_path, "-m", "optimizer.lr=0.1,0.01", "trainer.devices=2", *SHORT_RUN)
    assert result.code == 0, result.err + result.out
    assert_two_jobs_completed(tmp_path)


def test_local_ranks_sweep_continues_after_failed_job(tmp_path: Path) -> None:
    overrides = [*SHORT_RUN, *FAULTY_TASK, "trainer.devices=2", "seed=0,1"]
    marker = tmp_path / "once"
    result = run_app(tmp_path, "-m", *overrides, FAULT=f"once:1:3:{marker}", PYTHONPATH=SUPPORT_DIR)
    assert result.code == 1
    folders = sorted((tmp_path / "outputs").glob("sweeps/*/*/[0-9]*/"))
    assert [status_of(folder)["status"] for folder in folders] == ["failed", "completed"]
    log = (folders[0] / "run.log").read_text()
    assert "the run failed: rank 1: RuntimeError: injected failure" in log
    assert "in trigger_fault\n    raise RuntimeError" in log


def test_torchrun_sweep_creates_folder_per_job(tmp_path: Path) -> None:
    result = run_torchrun(tmp_path, "-m", "optimizer.lr=0.1,0.01", "trainer.devices=2", *SHORT_RUN)
    assert result.returncode == 0, result.stderr
    assert_two_jobs_completed(tmp_path)


def test_torchrun_config_error_is_printed_once(tmp_path: Path) -> None:
    result = run_torchrun(tmp_path, "model=mlpp")
    assert result.returncode != 0
    assert (result.stderr + result.stdout).count("1 error in the configuration") == 1
    assert "Traceback" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_torchrun_killed_rank_is_named_in_status(tmp_path: Path) -> None:
    result = run_torchrun(tmp_path, *SHORT_RUN, *FAULTY_TASK, "hydra.run.dir=run", fault="kill:0:3")
    assert result.returncode != 0
    status = status_of(tmp_path / "run")
    assert (status["status"], status["rank"]) == ("failed", 0)
    assert status["error"] == "rank 0: exited without reporting an error"


def test_torchrun_failed_rank_is_named_in_status_and_log(tmp_path: Path) -> None:
    overrides = (*SHORT_RUN, *FAULTY_TASK, "hydra.run.dir=run")
    result = run_torchrun(tmp_path, *overrides, fault="raise:1:3")
    assert result.returncode != 0
    status = status_of(tmp_path / "run")
    assert (status["status"], status["rank"]) == ("failed", 1)
    assert (
        "the run failed: rank 1: RuntimeError: injected failure"
        in (tmp_path / "run" / "run.log").read_text()
    )


def run_srun(cwd: Path, *overrides: str, **environment: str) -> list[tuple[int, str]]:
    """Start two tasks with the variables that srun sets; return exit code and output of each."""
    port = str(free_port())
    tasks = [
        start_command(
            cwd,
            overrides,
            **STEP_VARIABLES,
            **{"MASTER_PORT": port, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            **environment,
        )
        for rank in "01"
    ]
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    return [(task.returncode, output) for task, output in zip(tasks, outputs, strict=True)]


def test_srun_sweep_creates_folder_per_job(tmp_path: Path) -> None:
    tasks = run_srun(tmp_path, "-m", "optimizer.lr=0.1,0.01", "trainer.devices=2", *SHORT_RUN)
    assert [code for code, _ in tasks] == [0, 0], tasks
    assert tasks[1][1] == ""  # only rank 0 writes to the console
    assert_two_jobs_completed(tmp_path)


def test_srun_wrong_number_of_devices_is_printed_once(tmp_path: Path) -> None:
    tasks = run_srun(tmp_path, "trainer.devices=3", *SHORT_RUN)
    assert [code for code, _ in tasks] == [2, 2]
    assert tasks[0][1] == ("trainer.devices=3, but srun has started 2 ranks; allowed: 2, null\n")
    assert tasks[1][1] == ""
    assert not list(tmp_path.iterdir())


def test_srun_help_ends_all_ranks(tmp_path: Path) -> None:
    tasks = run_srun(tmp_path, "--help")
    assert [code for code, _ in tasks] == [0, 0]
    assert "Groups" in tasks[0][1]
    assert tasks[1][1] == ""


def test_local_ranks_simultaneous_commands_use_different_folders(tmp_path: Path) -> None:
    with occupied_port(29500):
        commands = [start_command(tmp_path, (*SHORT_RUN, "trainer.devices=2")) for _ in range(2)]
        outputs = [command.communicate(timeout=200)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0], outputs
    result = RunResult(0, "", "", tmp_path)
    assert len(result.folders) == 2
    assert [status_of(folder)["status"] for folder in result.folders] == ["completed"] * 2


def test_fsdp_run_is_tested_on_one_device(tmp_path: Path) -> None:
    overrides = (*SHORT_RUN, "trainer.devices=2", "trainer.strategy=fsdp", "hydra.run.dir=run")
    assert run_app(tmp_path, *overrides).code == 0
    tested = run_app(tmp_path, "mode=test", "ckpt=run", "trainer.devices=1", "hydra.run.dir=tested")
    assert tested.code == 0, tested.err
    one, two = (
        pd.read_csv(tmp_path / folder / "test_summary_table.csv") for folder in ("run", "tested")
    )
    assert one["accuracy"][0] == two["accuracy"][0]
    assert one["loss_mean"][0] == pytest.approx(two["loss_mean"][0], abs=1e-6)
    plain = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in plain.values())


def test_predict_on_several_ranks_matches_one_rank(tmp_path: Path) -> None:
    overrides = (*SHORT_RUN[:-2], "callbacks/single@callbacks=[predictions]", "data.batch_size=300")
    assert run_app(tmp_path, *overrides, "trainer.devices=2", "hydra.run.dir=run").code == 0
    for devices in (1, 3):
        predicted = run_app(
            tmp_path,
            "mode=predict",
            "ckpt=run",
            f"trainer.devices={devices}",
            f"hydra.run.dir=by{devices}",
        )
        assert predicted.code == 0, predicted.err
    one, three = (pd.read_csv(tmp_path / by / "predictions.csv") for by in ("by1", "by3"))
    pd.testing.assert_frame_equal(one, three, atol=1e-6)
    assert len(one) == 10_000
    (written,) = (tmp_path / "run" / "predictions").glob("*_test/predictions.csv")
    pd.testing.assert_frame_equal(pd.read_csv(written), one, atol=1e-6)


SRUN = """#!{python}
import os, subprocess, sys, time
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {{"SLURM_PROCID": r, "SLURM_LOCALID": r}})
    for r in "01"
]
while all(task.poll() is None for task in tasks):
    time.sleep(0.01)
if any(task.poll() for task in tasks):
    [task.kill() for task in tasks]
sys.exit(max(map(abs, (task.wait() for task in tasks))))
"""


@pytest.mark.long
def test_slurm_batch_script_requeues_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "bin" / "srun").chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol-calls\n'
    )
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    script = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = STEP_VARIABLES | {
        "PATH": path,
        "SLURM_CPUS_PER_TASK": "1",
        "PYTHONPATH": SUPPORT_DIR,
    }

    def submit(fault: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script, "experiment=mnist_alexnet_sgd", *SHORT_RUN, *FAULTY_TASK],
            cwd=tmp_path,
            env=os.environ | environment | {"FAULT": fault, "SLOW": "0.05"},
            capture_output=True,
            text=True,
            timeout=200,
        )

    preempted, folder = submit("SIGUSR1:1:3"), tmp_path / "outputs" / "slurm" / "4711"
    assert status_of(folder)["status"] == "preempted", preempted.stdout + preempted.stderr
    assert (tmp_path / "scontrol-calls").read_text() == "requeue 4711\n"
    resumed = submit("none:0:0")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (status_of(folder)["status"], status_of(folder)["ranks"]) == ("completed", 2)
    assert len(pd.read_csv(folder / "train_summary_table.csv")) == 2


def test_unavailable_devices_are_reported_before_start(tmp_path: Path) -> None:
    for overrides, message in (
        (
            ["trainer.devices=[0,1]", "trainer.accelerator=cpu"],
            "cpu devices have no ids; allowed: a number",
        ),
        (["launch=inline", "trainer.devices=2"], "launch='inline' runs on one device"),
        (["-m", "resume=auto", "hydra.run.dir=x"], "resume='auto' is for a single run"),
    ):
        result = run_app(tmp_path, *overrides, "model=mlp")
        assert result.code == 2
        assert message in result.err
    assert not list(tmp_path.iterdir())


def test_set_num_threads_divides_cores_unless_variable_is_set() -> None:
    code = (
        "import os, torch; from app.distributed.launch.worker import set_num_threads\n"
        "cores = len(os.sched_getaffinity(0))\n"
        "for is_set in (True, False):\n"
        "    is_set or os.environ.pop('OMP_NUM_THREADS')\n"
        "    set_num_threads(cores)\n"
        "    print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == ["3 3", "1 1"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_match_one(tmp_path: Path) -> None:
    for devices in ("1", "[0,1]"):
        overrides = (*SHORT_RUN, f"trainer.devices={devices}", f"hydra.run.dir={len(devices)}")
        result = run_app(tmp_path, *overrides, "trainer.precision=fp32")
        assert result.code == 0, result.err
    one, two = (pd.read_csv(path) for path in sorted(tmp_path.glob("*/summary_table.csv")))
    assert list(one["loss_mean"]) == pytest.approx(list(two["loss_mean"]), rel=1e-4)
