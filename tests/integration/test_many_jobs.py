"""Many jobs in one process leak neither state, nor files, nor memory."""

from __future__ import annotations

import logging
import os
import random
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.distributed.launch.select import launch_inline
from app.experiment.entry import run_experiment
from tests.support.interrupted_runs import TINY_RUN, write_indexed_data
from tests.support.processes import SUPPORT_DIR
from tests.support.runs import job_for

WARMUP_JOBS = 10  # until then, caches of the libraries grow


def process_state() -> dict[str, Any]:
    """Global settings of this process that a job might change."""
    root = logging.getLogger()
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "python threads": threading.active_count(),
        "grad": torch.is_grad_enabled(),
        "handlers": list(root.handlers),
        "level": root.level,
        "folder": Path.cwd(),
        "environment": dict(os.environ),
    }


def num_open_files() -> int:
    """Number of open file descriptors of this process."""
    return len([*Path("/proc/self/fd").iterdir()])


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "num_jobs", [50, pytest.param(500, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_many_jobs_in_one_process_leave_it_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_jobs: int
) -> None:
    monkeypatch.syspath_prepend(SUPPORT_DIR)
    monkeypatch.setenv("FAULT", "none:0:0")
    monkeypatch.setenv("IDS", str(tmp_path / "ids"))
    write_indexed_data(tmp_path / "conf")
    overrides = ("--config-dir", str(tmp_path / "conf"), *TINY_RUN, "trainer.max_epochs=1")
    job = job_for(*overrides, "trainer.deterministic=true", "model.dropout=0.2")
    memory, files, state = 0, 0, {}
    for number in range(num_jobs):
        folder = tmp_path / str(number)
        folder.mkdir()
        random.seed(number), np.random.seed(number), torch.manual_seed(number)
        launch_inline(run_experiment, job, folder)
        if number == WARMUP_JOBS:
            memory, files, state = resident_bytes(), num_open_files(), process_state()
    assert process_state() == state
    assert num_open_files() <= files
    assert resident_bytes() - memory < 20 * 2**20, "memory must not grow"
    weights = [
        torch.load(tmp_path / str(n) / "model.pt", weights_only=True) for n in (0, num_jobs - 1)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
