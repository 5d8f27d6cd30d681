"""Short runs in this process that a fault interrupts, and that resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from app.distributed.launch.failures import RankFailedError
from app.distributed.launch.local import launch_local
from app.distributed.launch.select import launch_inline
from app.experiment.entry import run_experiment
from tests.support.fork_server import start_fork_server
from tests.support.processes import SILENT_LOGGING, SUPPORT_DIR
from tests.support.runs import job_for

TINY_RUN = (  # five steps per epoch
    "data=indexed",
    "model=mlp",
    "task._target_=faulty.RecordedTask",
    "trusted_targets=[faulty]",
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
    "checkpoint.every_n_steps=1",
    "~callbacks.plots",
)
RunJob = Callable[..., Path]


@contextlib.contextmanager
def job_runner(home: Path, write_data: bool = True) -> Iterator[RunJob]:
    """Yield a function that runs a job, until a fault or to its end, and returns the run folder.

    The function takes the name of the run folder, a fault as `faulty.FaultyTask` reads it,
    overrides, and the number of ranks as `size`. A job whose folder exists is resumed.

    Args:
        home: Contains the run folders and the configuration of the data.
        write_data: Whether to write that configuration.
    """
    if write_data:
        write_indexed_data(home / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SUPPORT_DIR)

        def run(name: str, fault: str, *overrides: str, size: int = 1) -> Path:
            folder = home / name
            patch.setenv("FAULT", fault)
            patch.setenv("IDS", str(folder / "ids"))
            base = ("--config-dir", str(home / "conf"), "resume=auto", f"hydra.run.dir={folder}")
            job = job_for(*base, *TINY_RUN, f"trainer.devices={size}", *overrides)
            folder.mkdir(exist_ok=True)
            start_fork_server()
            try:
                launch_local(
                    run_experiment, job, folder, size, SILENT_LOGGING
                ) if size > 1 else launch_inline(run_experiment, job, folder)
            except (RuntimeError, RankFailedError) as error:
                assert "injected failure" in str(error), error
            return folder

        yield run


def write_indexed_data(conf: Path) -> None:
    """Write a data configuration whose samples start with their own index."""
    (conf / "data").mkdir(parents=True)
    source = "{_target_: faulty.IndexedDataset, count: %d}"
    (conf / "data" / "indexed.yaml").write_text(
        "defaults: [base/arrays@_here_, _self_]\n"
        "name: indexed\npath: null\nnum_classes: 2\ninput_shape: [4]\n"
        "channels: null\nimage_size: null\nbatch_size: 8\nnormalize: null\n"
        f"source:\n  train: {source % 36}\n  valid: {source % 12}\n  test: {source % 8}\n"
    )


def samples_per_step(folder: Path, ranks: int = 1) -> list[str]:
    """Return the indices of the samples of each training step, joined over the ranks."""
    lines = [(folder / f"ids{rank}").read_text().splitlines() for rank in range(ranks)]
    return [" ".join(parts) for parts in zip(*lines, strict=True)]


def iteration_values(folder: Path, stage: str, name: str) -> list[float]:
    """Return a column of the iteration tables, over all epochs."""
    files = sorted((folder / "epoch_details").glob(f"epoch*_{stage}.csv"))
    return [value for file in files for value in pd.read_csv(file)[name]]
