"""Fifty tiny jobs in one process leave it as it was."""

from __future__ import annotations

import logging
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.distributed.launch.select import launch_inline
from app.experiment.entry import run_experiment
from tests.support.interrupted_runs import TINY_RUN, write_indexed_data
from tests.support.processes import TESTS
from tests.support.runs import job_for

JOBS, SETTLED = 50, 10  # after so many, caches of the libraries are full


def world() -> dict[str, Any]:
    """What a job might leave behind in a process."""
    root = logging.getLogger()
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "handlers": list(root.handlers),
        "level": root.level,
        "folder": Path.cwd(),
        "environment": dict(os.environ),
    }


def open_files() -> int:
    """How many this process holds."""
    return len([*Path("/proc/self/fd").iterdir()])


def resident() -> int:
    """Bytes of this process that lie in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_fifty_jobs_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.setenv("FAULT", "none:0:0")
    monkeypatch.setenv("IDS", str(tmp_path / "ids"))
    write_indexed_data(tmp_path / "conf")
    words = ("--config-dir", str(tmp_path / "conf"), *TINY_RUN, "trainer.max_epochs=1")
    job = job_for(*words, "trainer.deterministic=true", "model.dropout=0.2")
    taken, files, before = 0, 0, {}
    for number in range(JOBS):
        folder = tmp_path / str(number)
        folder.mkdir()
        random.seed(number), np.random.seed(number), torch.manual_seed(number)
        launch_inline(run_experiment, job, folder)
        if number == SETTLED:
            taken, files, before = resident(), open_files(), world()
    assert world() == before
    assert open_files() <= files
    assert resident() - taken < 20 * 2**20, "memory stays flat"
    weights = [torch.load(tmp_path / str(n) / "model.pt", weights_only=True) for n in (0, JOBS - 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
