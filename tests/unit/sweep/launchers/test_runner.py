"""Jobs that run in batches with Hydra's launcher interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from app.runtime.files import write_json
from app.sweep.folder import SweepFolder
from app.sweep.launchers.runner import BatchRunner, ComposedJob
from app.sweep.outcome import read_run_status


class FakeLauncher:
    """Completes its jobs, except for those with the override `die` or `raise`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[tuple[int, int]] = []  # first number and size

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        self.batches.append((first, len(job_overrides)))
        results = []
        for number, overrides in enumerate(job_overrides, first):
            if "launcher fails" in overrides:
                raise OSError("no connection")
            error = RuntimeError("broken") if "raise" in overrides else None
            status = JobStatus.FAILED if error else JobStatus.COMPLETED
            (self.folder / str(number)).mkdir()
            if not error and "die" not in overrides:
                write_json(self.folder / str(number) / "status.json", {"status": "completed"})
            results.append(JobReturn(_return_value=error, status=status))
        return results


def run_batches(tmp_path: Path, batch_size: int, *overrides: str) -> tuple[FakeLauncher, list[int]]:
    """Run one job per override; return the launcher and the numbers of the jobs that ended."""
    numbered = enumerate(overrides)
    jobs = (ComposedJob(n, [o], DictConfig({}), tmp_path / str(n)) for n, o in numbered)
    launcher, ended = FakeLauncher(tmp_path), list[int]()
    folder = SweepFolder(tmp_path)
    runner = BatchRunner(launcher, batch_size, True, folder, log_status=lambda _: None)
    runner.run_jobs(lambda: None if folder.is_stopped else next(jobs, None), ended.append)
    return launcher, ended


def test_batch_runner_divides_jobs_into_batches(tmp_path: Path) -> None:
    launcher, ended = run_batches(tmp_path, 2, "", "", "")
    assert launcher.batches == [(0, 2), (2, 1)]
    assert ended == [0, 1, 2]


def test_batch_runner_job_without_status_is_recorded_as_failed(tmp_path: Path) -> None:
    run_batches(tmp_path, 3, "", "raise", "die")
    outcomes = [read_run_status(tmp_path / str(number)) for number in range(3)]
    assert [outcome.status for outcome in outcomes] == ["completed", "failed", "failed"]
    assert "RuntimeError: broken" in str(outcomes[1].error)
    assert "exited without reporting an error" in str(outcomes[2].error)
    assert "RuntimeError: broken" in (tmp_path / "1" / "run.log").read_text()


def test_batch_runner_launcher_failure_stops_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launcher, ended = run_batches(tmp_path, 1, "launcher fails", "")
    assert (launcher.batches, ended) == ([(0, 1)], [0])
    assert "the launcher failed: OSError: no connection" in caplog.text
    assert SweepFolder(tmp_path).stops_running_jobs
    assert read_run_status(tmp_path / "0").status == "pending"
