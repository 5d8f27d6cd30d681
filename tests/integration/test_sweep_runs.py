"""Complete sweeps: tables, failures, resuming and configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from app.config.compose import CONF
from app.sweep.folder import SweepFolder
from tests.support import sweeps
from tests.support.processes import SHORT_RUN, status_of
from tests.support.runs import run_app
from tests.support.sweeps import RunSweep
from tests.support.warm import WarmCommand


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep of two learning rates with two seeds each."""
    cwd = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        assert sweeps.sweep_runner(cwd, patch)("optimizer.lr=0.1,0.01", "seed=0,1") == 0
    return sweeps.sweep_folder(cwd)


def test_sweep_table_matches_run_folders(swept: Path) -> None:
    table = sweeps.read_sweep_table(swept)
    assert table.columns.tolist() == [
        *("job", "status", "optimizer.lr", "seed"),
        *("best_accuracy", "best_epoch", "last_accuracy"),
        *("test/loss", "test/accuracy", "test/total_correct", "test/f1"),
        *("seconds", "samples/s", "peak_memory_bytes", "attempts", "folder", "error"),
    ]
    assert table["job"].tolist() == [0, 1, 2, 3]
    assert table["optimizer.lr"].tolist() == [0.1, 0.1, 0.01, 0.01]
    assert table["seed"].tolist() == [0, 1, 0, 1]
    assert set(table["status"]) == {"completed"}
    for _, line in table.iterrows():
        run = swept / line["folder"]
        valid = pd.read_csv(run / "valid_summary_table.csv")
        test = pd.read_csv(run / "test_summary_table.csv")
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["optimizer"]["lr"], config["seed"]) == (line["optimizer.lr"], line["seed"])
        assert line["best_accuracy"] == valid["accuracy"].max()
        assert line["best_epoch"] == valid["epoch"][valid["accuracy"].idxmax()]
        assert line["last_accuracy"] == valid["accuracy"].iloc[-1]
        assert line["test/loss"] == test["loss_mean"].item()
        assert line["test/accuracy"] == test["accuracy"].item()
        assert line["seconds"] == status_of(run)["seconds"]


def test_sweep_by_config_averages_seeds(swept: Path) -> None:
    table, averages = sweeps.read_sweep_table(swept), pd.read_csv(swept / "sweep_by_config.csv")
    assert averages["optimizer.lr"].tolist() == [0.1, 0.01]
    assert averages["jobs"].tolist() == averages["completed"].tolist() == [2, 2]
    for name in ("best_accuracy", "test/loss", "seconds"):
        for row, rate in enumerate((0.1, 0.01)):
            values = table[table["optimizer.lr"] == rate][name]
            assert averages[f"{name}_mean"][row] == pytest.approx(values.mean(), rel=1e-12)
            assert averages[f"{name}_std"][row] == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_sweep_writes_page_plots_and_log(swept: Path) -> None:
    assert "<script>" in (swept / "sweep.html").read_text()
    names = {path.name for path in (swept / "plots").iterdir()}
    assert names == {"curves.png", "by_optimizer.lr.png", "by_seed.png"}
    log = (swept / "sweep.log").read_text()
    best = sweeps.read_sweep_table(swept).sort_values("best_accuracy").iloc[-1]
    assert f"best_accuracy={best['best_accuracy']:.6g} in {best['folder']}" in log
    assert log.count("completed: best accuracy=") == 4


def test_sweep_logged_command_tests_best_run(swept: Path) -> None:
    log = (swept / "sweep.log").read_text()
    command = next(line for line in log.splitlines() if "mode=test" in line).split()
    assert command[:3] == ["python", "-m", "app"]
    ran = run_app(swept.parents[3], *command[3:], "data.eval_batch_size=500")
    assert ran.code == 0, ran.err + ran.out
    (tested,) = (swept.parents[3] / "outputs").glob("2*/*/test_summary_table.csv")
    assert len(pd.read_csv(tested)) == 1


def test_report_restores_identical_files(swept: Path) -> None:
    before = {name: (swept / name).read_text() for name in ("sweep.csv", "sweep_by_config.csv")}
    page = (swept / "sweep.html").read_text()
    for name in (*before, "sweep.html"):
        (swept / name).unlink()
    command = WarmCommand(swept, [str(swept)], {}, module="app.cli.report")
    out, _ = command.communicate()
    assert command.returncode == 0, out
    assert before == {name: (swept / name).read_text() for name in before}
    assert (swept / "sweep.html").read_text() == page


def test_report_combines_sweeps_and_runs(swept: Path, sweep: RunSweep, tmp_path: Path) -> None:
    assert sweep("optimizer.lr=0.05", "hydra.run.dir=single", "trainer.max_epochs=1", flags=()) == 0
    assert run_app(tmp_path, "report", str(swept), "single", "--to", "joined").code == 0
    table = sweeps.read_sweep_table(tmp_path / "joined")
    assert len(table) == 5
    assert sorted(table["optimizer.lr"]) == [0.01, 0.01, 0.05, 0.1, 0.1]
    assert table["seed"].tolist() == [0, 1, 0, 1, 0]
    assert table["trainer.max_epochs"].tolist() == [2, 2, 2, 2, 1]
    assert (tmp_path / "joined" / table["folder"].iloc[-1] / "status.json").exists()
    assert (tmp_path / "joined" / table["folder"].iloc[-1] / "environment.json").exists()
    done = run_app(tmp_path, "report", "nowhere")
    assert (done.code, done.out) == (2, "")
    assert "no such folder" in done.err


def test_sweep_failed_job_others_run_and_resume_retries_it(sweep: RunSweep, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    pairs = (
        "+task.fault=raise,nothing",
        "seed=0,1",
        "sweep.together=[[task.fault,seed]]",
    )
    assert sweep(*sweeps.SWEEP_TASK, *pairs, "+task.fault_step=1", "trainer.max_epochs=1") == 1
    folder = sweeps.sweep_folder(tmp_path)
    assert sweeps.job_statuses(folder) == ["failed", "completed"]
    assert sweeps.read_sweep_table(folder)["error"][0] == "RuntimeError: the step broke"
    failed, completed = sweeps.job_folders(folder)
    assert "RuntimeError: the step broke" in (failed / "run.log").read_text()
    assert "Traceback" in (failed / "run.log").read_text()
    before = (completed / "status.json").read_bytes()
    (tmp_path / "broken").unlink()
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert sweeps.job_statuses(folder) == ["completed"] * 2
    assert (completed / "status.json").read_bytes() == before
    assert sweeps.read_sweep_table(folder)["attempts"].tolist() == [2, 1]


@pytest.mark.parametrize("launcher", [(), (sweeps.POOL, "hydra.launcher.slots=1")])
def test_sweep_on_error_stop_leaves_other_jobs_pending(
    sweep: RunSweep, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    (tmp_path / "broken").touch()
    options = (
        *sweeps.SWEEP_TASK,
        "+task.fault=raise,nothing",
        "+task.fault_step=1",
        "sweep.on_error=stop",
    )
    assert sweep(*options, *launcher) == 1
    assert sweeps.job_statuses(sweeps.sweep_folder(tmp_path)) == ["failed", "pending"]


def test_resume_after_max_retries_does_not_retry(sweep: RunSweep, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    assert (
        sweep(*sweeps.SWEEP_TASK, "+task.fault=raise", "+task.fault_step=1", "sweep.max_retries=1")
        == 1
    )
    folder = sweeps.sweep_folder(tmp_path)
    assert sweep(f"sweep.resume={folder}", short=False) == 1
    num_steps = len(sweeps.step_pids(tmp_path))
    assert sweep(f"sweep.resume={folder}", short=False) == 1
    assert len(sweeps.step_pids(tmp_path)) == num_steps
    assert "job 0 has failed 2 times and is not retried" in (folder / "sweep.log").read_text()


def test_pool_job_has_same_losses_as_sequential_job(swept: Path, sweep: RunSweep) -> None:
    assert sweep(sweeps.POOL, "optimizer.lr=0.1", "seed=0", "hydra.launcher.slots=1") == 0
    (job,) = sweeps.job_folders(sweeps.sweep_folder(Path.cwd()))
    folders = (job, sweeps.job_folders(swept)[0])
    values = [pd.read_csv(folder / "summary_table.csv")["loss_mean"] for folder in folders]
    np.testing.assert_allclose(*values, rtol=1e-4)  # the number of threads differs


def test_sweep_folder_in_use_or_occupied_is_refused(
    tmp_path: Path, sweep: RunSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("seed=0", "hydra.sweep.dir=first") == 0
    with SweepFolder(tmp_path / "first").locked():
        assert sweep("sweep.resume=first", short=False) == 2
    err = capsys.readouterr().err
    assert "is being run by another process" in err
    assert sweep("seed=0", "hydra.sweep.dir=first") == 2
    assert "already contains a sweep; resume it with sweep.resume=" in capsys.readouterr().err


@pytest.mark.parametrize(("where", "options"), [("first", []), ("nowhere", ["model=mlp"])])
def test_sweep_resume_without_multirun_is_refused(
    tmp_path: Path,
    sweep: RunSweep,
    capsys: pytest.CaptureFixture[str],
    where: str,
    options: list[str],
) -> None:
    folder = SweepFolder(tmp_path / "first")
    folder.overrides = ["seed=0,1"]
    folder.save()
    assert sweep(*options, f"sweep.resume={where}", short=False, flags=()) == 2
    expected = f"sweep.resume={where} also needs -m: python -m app -m sweep.resume={where}"
    assert capsys.readouterr().err.splitlines()[1:] == [f"  {expected}"]


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_sweep_resume_of_nothing_is_refused(
    sweep: RunSweep, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert sweep("sweep.resume=", short=False, flags=flags) == 2
    err = capsys.readouterr().err.splitlines()[1:]
    assert err == ["  sweep.resume='': allowed: null, the folder of a sweep"]


def test_sweep_edited_config_file_changes_no_later_job(tmp_path: Path) -> None:
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    text = "# @package _global_\noptimizer: {lr: %s}\nnotes: %s\n"
    (conf / "mine.yaml").write_text(text % (0.1, "before"))
    options = ("experiment=mine", "+task.step_seconds=0.1", "seed=0,1", "trainer.max_epochs=1")
    process = sweeps.start_sweep(tmp_path, *options, flags=("--config-dir", "conf"))
    (conf / "mine.yaml").write_text(text % (0.5, "after"))
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    configs = [
        yaml.safe_load((j / "config.yaml").read_text())
        for j in sweeps.job_folders(sweeps.sweep_folder(tmp_path))
    ]
    assert [config["optimizer"]["lr"] for config in configs] == [0.1, 0.1]
    assert [config["notes"] for config in configs] == ["before", "before"]


def test_resume_with_changed_config_is_refused_unless_forced(
    tmp_path: Path, sweep: RunSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("seed=0,1", "hydra.sweep.dir=first", "trainer.max_epochs=1") == 0
    longer = ("seed=0,1,2", "sweep.resume=first", "trainer.gradient_clip_norm=1.0")
    assert sweep(*longer, "trainer.max_epochs=1") == 2
    err = capsys.readouterr().err
    assert (
        "trainer.gradient_clip_norm: None -> 1.0: changed since the sweep was started; sweep.force="
        in err
    )
    assert len(sweeps.job_folders(tmp_path / "first")) == 2
    assert sweep(*longer, "trainer.max_epochs=1", "sweep.force=true") == 0
    folder = tmp_path / "first"
    assert sweeps.job_statuses(folder) == ["completed"] * 3
    configs = [
        yaml.safe_load((job / "config.yaml").read_text()) for job in sweeps.job_folders(folder)
    ]
    clips = [config["trainer"]["gradient_clip_norm"] for config in configs]
    assert clips == [None, None, 1.0]


def test_resume_alone_continues_with_copied_files_from_another_folder(
    tmp_path: Path, sweep: RunSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, base = tmp_path / "theirs", tmp_path / "base"
    (theirs / "experiment").mkdir(parents=True)
    (theirs / "experiment" / "short.yaml").write_text(
        "# @package _global_\ntrainer: {max_epochs: 1}\n"
    )
    (theirs / "main.yaml").write_text("defaults: [config, _self_]\nnotes: theirs\n")
    shutil.copytree(CONF, base)
    flags = ("-m", "--config-path", "base", "--config-dir", "theirs", "--config-name", "main")
    (tmp_path / "broken").touch()
    faults = (*sweeps.SWEEP_TASK, "+task.fault=raise,nothing", "+task.fault_step=1")
    short = [override for override in SHORT_RUN if "max_epochs" not in override]
    overrides = (*short, *faults, "experiment=short", "hydra.sweep.dir=first")
    assert sweep(*overrides, short=False, flags=flags) == 1
    for folder in (theirs, base):
        shutil.rmtree(folder)
    for name in ("broken", "mark"):
        (tmp_path / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert sweep("sweep.resume=../first", short=False) == 0
    assert sweeps.job_statuses(tmp_path / "first") == ["completed"] * 2
    assert len(sweeps.step_pids(tmp_path)) == 12  # only the failed job ran
    for job in sweeps.job_folders(tmp_path / "first"):
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert (config["notes"], config["trainer"]["max_epochs"]) == ("theirs", 1)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_resume_with_more_values_adds_jobs(tmp_path: Path, sweep: RunSweep) -> None:
    assert sweep("seed=0,1", "hydra.sweep.dir=first", "trainer.max_epochs=1") == 0
    before = [(job / "status.json").read_bytes() for job in sweeps.job_folders(tmp_path / "first")]
    assert sweep("seed=2,0,1", "sweep.resume=first", "trainer.max_epochs=1") == 0
    folder = tmp_path / "first"
    assert sweeps.read_sweep_table(folder)["seed"].tolist() == [0, 1, 2]
    assert [(job / "status.json").read_bytes() for job in sweeps.job_folders(folder)][:2] == before


def test_sweep_in_yaml_with_zip_group_pairs_values(tmp_path: Path, sweep: RunSweep) -> None:
    conf = tmp_path / "conf" / "sweep"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text(
        "# @package _global_\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      optimizer.lr: 0.1,0.01\n      data.batch_size: 64,32\n"
        "sweep:\n  together: [[optimizer.lr, data.batch_size]]\n"
    )
    assert sweep("sweep=mine", "trainer.max_epochs=1", flags=("--config-dir", "conf")) == 0
    table = sweeps.read_sweep_table(sweeps.sweep_folder(tmp_path))
    assert table["optimizer.lr"].tolist() == [0.1, 0.01]
    assert table["data.batch_size"].tolist() == [64, 32]


def test_basic_sweeper_writes_table(sweep: RunSweep, tmp_path: Path) -> None:
    assert sweep("hydra/sweeper=basic", "seed=0,1", "trainer.max_epochs=1") == 0
    assert len(sweeps.read_sweep_table(sweeps.sweep_folder(tmp_path))) == 2
