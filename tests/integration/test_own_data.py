"""Batches by configuration: streams, sampling, sizes, caches, windows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from app.experiment.run import execute
from app.runtime.errors import UserError
from tests.support.own_data import STREAM, WORDS
from tests.support.runs import job_for


def test_a_stream_of_unknown_length_trains_from_the_command_line(own_data: Path) -> None:
    execute(job_for(*WORDS, *STREAM, "scheduler=constant"), own_data / "run")
    summary = pd.read_csv(own_data / "run" / "train_summary_table.csv")
    assert summary["total_samples"].tolist() == [100, 100]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "'auto' is the length of the run, which is not known"),
        (("scheduler=constant", "trainer.limit_train_batches=0.5"), "a share of an iterable"),
        (("scheduler=constant", "trainer.overfit_batches=2"), "needs data that is not iterable"),
        (("scheduler=constant", "data.source.valid=null", "data.split.valid=0.1"),
         "nothing can be cut from an iterable"),
        (("scheduler=constant", "data.sampling={_target_: app.data.sampling.BalancedClasses}"),
         "data.sampling needs"),
    ],
)  # fmt: skip
def test_what_a_stream_cannot_do_is_said(
    own_data: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        execute(job_for(*WORDS, *STREAM, *words), own_data / "run")
    assert not (own_data / "run" / "epoch_details").exists()


def test_samples_that_are_dicts_by_configuration(own_data: Path) -> None:
    words = ["data.inputs=x", "data.targets=y", "optimizer.lr=0.05", "trainer.max_epochs=3"]
    words += [f"data.source.{stage}._target_=own_data.Dicts" for stage in ("train", "valid")]
    assert (execute(job_for(*WORDS, *words), own_data / "run") or 0) > 0.7
    with pytest.raises(
        UserError, match=r"data\.inputs, data\.targets: .*there is no 'z'; it has: x, y"
    ):
        execute(job_for(*WORDS, *words, "data.targets=z"), own_data / "other")
