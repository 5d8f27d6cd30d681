"""Fixtures of all lanes; marks come from the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.distributed.launch.local import launch_local
from app.experiment.entry import run_experiment
from tests.support.processes import FAULTY, SHORT, SILENT, TESTS
from tests.support.runs import FEW, Ran, job_for, run_app
from tests.support.sweeps import Sweeps, in_this_process

LANES = Path(__file__).parent
SLOWEST = ("test_sweep_pool", "test_sweep_search", "test_ranks", "test_launch", "test_sweep_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its lane; start the slowest files first, so that no worker ends alone."""
    for item in items:
        item.add_marker(item.path.relative_to(LANES).parts[0])
    items.sort(key=lambda item: item.path.stem not in SLOWEST)


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., Ran]:
    """Runs the program in a folder of the test's own."""

    def run(*words: str, **environment: str) -> Ran:
        return run_app(tmp_path, *words, **environment)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """An MLP trained for two short epochs and tested on all of MNIST."""
    cwd = tmp_path_factory.mktemp("trained")
    ran = run_app(cwd, "model=mlp", "trainer.max_epochs=2", "tags=[a,b]", "notes=a note", *FEW)
    assert ran.code == 0, ran.err + ran.out
    return ran


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """Runs sweeps of short jobs in a folder of the test's own; gives their exit codes."""
    return in_this_process(tmp_path, monkeypatch)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs two ranks in which something goes wrong; gives the run folder."""
    monkeypatch.syspath_prepend(TESTS)

    def run(fault: str, *words: str, size: int = 2, flags: tuple[str, ...] = ()) -> Path:
        monkeypatch.setenv("FAULT", fault)
        job = job_for(*flags, *SHORT, *FAULTY, f"trainer.devices={size}", *words)
        launch_local(run_experiment, job, tmp_path, size, SILENT)
        return tmp_path

    return run
