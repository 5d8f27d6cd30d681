"""Short runs in this process that a fault ends, and that go on."""

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
from tests.support.processes import SILENT, TESTS
from tests.support.runs import job_for

TINY_RUN = (  # five steps in each epoch
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


def write_indexed_data(conf: Path) -> None:
    """Data whose samples say who they are."""
    (conf / "data").mkdir(parents=True)
    source = "{_target_: faulty.Indexed, count: %d}"
    (conf / "data" / "indexed.yaml").write_text(
        "defaults: [base/arrays@_here_, _self_]\n"
        "name: indexed\npath: null\nnum_classes: 2\ninput_shape: [4]\n"
        "channels: null\nimage_size: null\nbatch_size: 8\nnormalize: null\n"
        f"source:\n  train: {source % 36}\n  valid: {source % 12}\n  test: {source % 8}\n"
    )


@contextlib.contextmanager
def job_runner(home: Path, writes: bool = True) -> Iterator[RunJob]:
    """What runs a job until a fault ends it, or to its end, and gives the run folder."""
    if writes:
        write_indexed_data(home / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS)

        def run(name: str, fault: str, *words: str, size: int = 1) -> Path:
            folder = home / name
            patch.setenv("FAULT", fault)
            patch.setenv("IDS", str(folder / "ids"))
            where = ("--config-dir", str(home / "conf"), "resume=auto", f"hydra.run.dir={folder}")
            job = job_for(*where, *TINY_RUN, f"trainer.devices={size}", *words)
            folder.mkdir(exist_ok=True)
            try:
                launch_local(
                    run_experiment, job, folder, size, SILENT
                ) if size > 1 else launch_inline(run_experiment, job, folder)
            except (RuntimeError, RankFailedError) as error:
                assert "the rank broke" in str(error), error
            return folder

        yield run


def samples_per_step(folder: Path, ranks: int = 1) -> list[str]:
    """The samples of each step."""
    lines = [(folder / f"ids{rank}").read_text().splitlines() for rank in range(ranks)]
    return [" ".join(parts) for parts in zip(*lines, strict=True)]


def iteration_values(folder: Path, stage: str, name: str) -> list[float]:
    """Of the iterations of all epochs."""
    files = sorted((folder / "epoch_details").glob(f"epoch*_{stage}.csv"))
    return [value for file in files for value in pd.read_csv(file)[name]]
