"""Who starts the ranks: this program, torchrun or srun; what is chosen, and what is refused."""

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
from tests.support.fake_slurm import STEP
from tests.support.processes import (
    FAULTY,
    SHORT,
    SILENT,
    TESTS,
    assert_two_jobs,
    begun,
    free_port,
    port_taken,
    status_of,
    torchrun,
)
from tests.support.runs import Ran, job_for, run_app


def test_many_runs_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS)
    words = ("trainer.max_epochs=1", "trainer.limit_test_batches=1", "trainer.devices=2")
    job = job_for(*SHORT, *words, "trainer.limit_train_batches=2", "trainer.sanity_valid_batches=0")
    folders = [tmp_path / str(number) for number in range(8)]
    for folder in folders:
        folder.mkdir()
    with port_taken(29500), ThreadPoolExecutor(len(folders)) as pool:
        values = list(
            pool.map(lambda folder: launch_local(run_experiment, job, folder, 2, SILENT), folders)
        )
    assert len({*values}) == 1
    assert [status_of(folder)["status"] for folder in folders] == ["completed"] * len(folders)


def test_warnings_of_other_ranks_are_marked(tmp_path: Path) -> None:
    words = (*SHORT, *FAULTY, "trainer.devices=2")
    ran = run_app(tmp_path, *words, FAULT="warn:1:3", PYTHONPATH=TESTS)
    assert ran.code == 0, ran.err
    for console in (ran.err, (ran.folder / "run.log").read_text()):
        assert console.count("UserWarning: the rank is uneasy") == 1
        assert "rank 1: " in console
    own = (ran.folder / "logs" / "rank1.log").read_text()
    assert "the rank is uneasy" in own
    assert "2 x cpu" in own
    assert not (ran.folder / "logs" / "rank0.log").exists()
    assert ran.out.count("best accuracy") == 2  # of rank 0 alone, in each epoch


def test_a_sweep_on_two_ranks_leaves_a_folder_for_each_job(tmp_path: Path) -> None:
    ran = run_app(tmp_path, "-m", "optimizer.lr=0.1,0.01", "trainer.devices=2", *SHORT)
    assert ran.code == 0, ran.err + ran.out
    assert_two_jobs(tmp_path)


def test_a_job_of_a_sweep_goes_on_after_one_that_failed(tmp_path: Path) -> None:
    words = [*SHORT, *FAULTY, "trainer.devices=2", "seed=0,1"]
    once = tmp_path / "once"
    ran = run_app(tmp_path, "-m", *words, FAULT=f"once:1:3:{once}", PYTHONPATH=TESTS)
    assert ran.code == 1
    folders = sorted((tmp_path / "outputs").glob("sweeps/*/*/[0-9]*/"))
    assert [status_of(folder)["status"] for folder in folders] == ["failed", "completed"]
    log = (folders[0] / "run.log").read_text()
    assert "the run failed: rank 1: RuntimeError: the rank broke" in log
    assert "in do\n    raise RuntimeError" in log


def test_torchrun_sweeps(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, "-m", "optimizer.lr=0.1,0.01", "trainer.devices=2", *SHORT)
    assert ran.returncode == 0, ran.stderr
    assert_two_jobs(tmp_path)


def test_torchrun_says_a_mistake_once(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, "model=mlpp")
    assert ran.returncode != 0
    assert (ran.stderr + ran.stdout).count("1 mistake in the configuration") == 1
    assert "Traceback" not in ran.stdout
    assert not list(tmp_path.iterdir())


def test_torchrun_kills_and_the_status_says_so(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, *SHORT, *FAULTY, "hydra.run.dir=run", fault="kill:0:3")
    assert ran.returncode != 0
    status = status_of(tmp_path / "run")
    assert (status["status"], status["rank"]) == ("failed", 0)
    assert status["error"] == "rank 0: it is gone without a word"


def test_torchrun_names_the_rank_that_failed(tmp_path: Path) -> None:
    words = (*SHORT, *FAULTY, "hydra.run.dir=run")
    ran = torchrun(tmp_path, *words, fault="raise:1:3")
    assert ran.returncode != 0
    status = status_of(tmp_path / "run")
    assert (status["status"], status["rank"]) == ("failed", 1)
    assert (
        "the run failed: rank 1: RuntimeError: the rank broke"
        in (tmp_path / "run" / "run.log").read_text()
    )


def srun(cwd: Path, *words: str, **environment: str) -> list[tuple[int, str]]:
    """What srun does: a task for each rank, told by variables which it is."""
    port = str(free_port())
    tasks = [
        begun(
            cwd,
            words,
            **STEP,
            **{"MASTER_PORT": port, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            **environment,
        )
        for rank in "01"
    ]
    told = [task.communicate(timeout=200)[0] for task in tasks]
    return [(task.returncode, text) for task, text in zip(tasks, told, strict=True)]


def test_srun_joins_its_tasks_for_a_sweep(tmp_path: Path) -> None:
    told = srun(tmp_path, "-m", "optimizer.lr=0.1,0.01", "trainer.devices=2", *SHORT)
    assert [code for code, _ in told] == [0, 0], told
    assert told[1][1] == ""  # one console
    assert_two_jobs(tmp_path)


def test_devices_that_disagree_with_what_was_started_are_one_error(tmp_path: Path) -> None:
    told = srun(tmp_path, "trainer.devices=3", *SHORT)
    assert [code for code, _ in told] == [2, 2]
    assert told[0][1] == ("trainer.devices=3, but srun has started 2 ranks; allowed: 2, null\n")
    assert told[1][1] == ""
    assert not list(tmp_path.iterdir())


def test_help_ends_all_ranks(tmp_path: Path) -> None:
    told = srun(tmp_path, "--help")
    assert [code for code, _ in told] == [0, 0]
    assert "Groups" in told[0][1]
    assert told[1][1] == ""


def test_commands_at_the_same_instant_get_folders_of_their_own(tmp_path: Path) -> None:
    with port_taken(29500):
        both = [begun(tmp_path, (*SHORT, "trainer.devices=2")) for _ in range(2)]
        told = [one.communicate(timeout=200)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    ran = Ran(0, "", "", tmp_path)
    assert len(ran.folders) == 2
    assert [status_of(folder)["status"] for folder in ran.folders] == ["completed"] * 2


def test_a_run_of_sharded_weights_is_tested_on_one_device(tmp_path: Path) -> None:
    words = (*SHORT, "trainer.devices=2", "trainer.strategy=fsdp", "hydra.run.dir=run")
    assert run_app(tmp_path, *words).code == 0
    tested = run_app(tmp_path, "mode=test", "ckpt=run", "trainer.devices=1", "hydra.run.dir=tested")
    assert tested.code == 0, tested.err
    one, two = (
        pd.read_csv(tmp_path / folder / "test_summary_table.csv") for folder in ("run", "tested")
    )
    assert one["accuracy"][0] == two["accuracy"][0]
    assert one["loss_mean"][0] == pytest.approx(two["loss_mean"][0], abs=1e-6)
    plain = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in plain.values())


def test_predictions_of_several_ranks_are_those_of_one(tmp_path: Path) -> None:
    words = (*SHORT[:-2], "callbacks/single@callbacks=[predictions]", "data.batch_size=300")
    assert run_app(tmp_path, *words, "trainer.devices=2", "hydra.run.dir=run").code == 0
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
def test_the_batch_script_runs(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "bin" / "srun").chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    script = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = STEP | {"PATH": path, "SLURM_CPUS_PER_TASK": "1", "PYTHONPATH": TESTS}

    def submitted(fault: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script, "experiment=mnist_alexnet_sgd", *SHORT, *FAULTY],
            cwd=tmp_path,
            env=os.environ | environment | {"FAULT": fault, "SLOW": "0.05"},
            capture_output=True,
            text=True,
            timeout=200,
        )

    cut, folder = submitted("SIGUSR1:1:3"), tmp_path / "outputs" / "slurm" / "4711"
    assert status_of(folder)["status"] == "preempted", cut.stdout + cut.stderr
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    again = submitted("none:0:0")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (status_of(folder)["status"], status_of(folder)["ranks"]) == ("completed", 2)
    assert len(pd.read_csv(folder / "train_summary_table.csv")) == 2


def test_devices_that_are_not_there_are_named_before_anything_starts(tmp_path: Path) -> None:
    for words, told in (
        (["trainer.devices=[0,1]", "trainer.accelerator=cpu"], "cpu has no ids; allowed: a number"),
        (["launch=inline", "trainer.devices=2"], "launch='inline' is one device"),
        (["-m", "resume=auto", "hydra.run.dir=x"], "resume='auto' is for a single run"),
    ):
        ran = run_app(tmp_path, *words, "model=mlp")
        assert ran.code == 2
        assert told in ran.err
    assert not list(tmp_path.iterdir())


def test_threads_are_shared_out_unless_somebody_has_said_how_many() -> None:
    code = (
        "import os, torch; from app.distributed.launch.worker import share_threads\n"
        "cores = len(os.sched_getaffinity(0))\n"
        "for said in (True, False):\n"
        "    said or os.environ.pop('OMP_NUM_THREADS')\n"
        "    share_threads(cores)\n"
        "    print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == ["3 3", "1 1"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_learn_what_one_does(tmp_path: Path) -> None:
    for devices in ("1", "[0,1]"):
        words = (*SHORT, f"trainer.devices={devices}", f"hydra.run.dir={len(devices)}")
        ran = run_app(tmp_path, *words, "trainer.precision=fp32")
        assert ran.code == 0, ran.err
    one, two = (pd.read_csv(path) for path in sorted(tmp_path.glob("*/summary_table.csv")))
    assert list(one["loss_mean"]) == pytest.approx(list(two["loss_mean"]), rel=1e-4)
