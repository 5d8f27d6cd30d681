"""Fixtures of all lanes; each test is marked with the name of its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.distributed.launch.local import launch_local
from app.experiment.entry import run_experiment
from tests.support.fork_server import start_fork_server
from tests.support.processes import FAULTY_TASK, SHORT_RUN, SILENT_LOGGING, SUPPORT_DIR
from tests.support.runs import FEW_BATCHES, RunResult, job_for, run_app
from tests.support.sweeps import RunSweep, sweep_runner

LANES = Path(__file__).parent
SLOWEST = ("test_sweep_pool", "test_sweep_search", "test_ranks", "test_launch", "test_sweep_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its lane, and start the slowest files first to keep all workers busy."""
    for item in items:
        item.add_marker(item.path.relative_to(LANES).parts[0])
    items.sort(key=lambda item: item.path.stem not in SLOWEST)


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., RunResult]:
    """Function that runs the program in a temporary folder."""

    def run(*arguments: str, **environment: str) -> RunResult:
        return run_app(tmp_path, *arguments, **environment)

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """An MLP trained for two short epochs and tested on all of MNIST."""
    cwd = tmp_path_factory.mktemp("trained")
    overrides = ("model=mlp", "trainer.max_epochs=2", "tags=[a,b]", "notes=a note", *FEW_BATCHES)
    result = run_app(cwd, *overrides)
    assert result.code == 0, result.err + result.out
    return result


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSweep:
    """Function that runs sweeps of short jobs in a temporary folder and returns the exit code."""
    return sweep_runner(tmp_path, monkeypatch)


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Function that trains on several ranks with an injected fault and returns the run folder."""
    monkeypatch.syspath_prepend(SUPPORT_DIR)

    def run(fault: str, *overrides: str, size: int = 2, flags: tuple[str, ...] = ()) -> Path:
        monkeypatch.setenv("FAULT", fault)
        arguments = (*flags, *SHORT_RUN, *FAULTY_TASK, f"trainer.devices={size}", *overrides)
        start_fork_server()
        launch_local(run_experiment, job_for(*arguments), tmp_path, size, SILENT_LOGGING)
        return tmp_path

    return run
