"""Training on datasets defined by the user: iterable datasets and dict samples."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from app.experiment.run import execute
from app.runtime.errors import UserError
from tests.support.own_data import OWN_DATA, STREAM, write_own_data
from tests.support.runs import job_for


@pytest.fixture(autouse=True)
def own_data(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_own_data(tmp_cwd)
    monkeypatch.syspath_prepend(tmp_cwd)
    return tmp_cwd


def test_iterable_dataset_of_unknown_length_trains(own_data: Path) -> None:
    execute(job_for(*OWN_DATA, *STREAM, "scheduler=constant"), own_data / "run")
    summary = pd.read_csv(own_data / "run" / "train_summary_table.csv")
    assert summary["total_samples"].tolist() == [100, 100]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "'auto' is the length of the run, which is unknown"),
        (("scheduler=constant", "trainer.limit_train_batches=0.5"), "a fraction of an iterable"),
        (("scheduler=constant", "trainer.overfit_batches=2"), "needs data that is not iterable"),
        (("scheduler=constant", "data.source.valid=null", "data.split.valid=0.1"),
         "an iterable dataset cannot be split"),
        (("scheduler=constant", "data.sampling={_target_: app.data.sampling.BalancedClasses}"),
         "data.sampling needs"),
    ],
)  # fmt: skip
def test_iterable_dataset_with_unsupported_option_is_refused(
    own_data: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        execute(job_for(*OWN_DATA, *STREAM, *overrides), own_data / "run")
    assert not (own_data / "run" / "epoch_details").exists()


def test_dict_samples_train_and_unknown_keys_are_named(own_data: Path) -> None:
    overrides = ["data.inputs=x", "data.targets=y", "optimizer.lr=0.05", "trainer.max_epochs=3"]
    overrides += [f"data.source.{stage}._target_=own_data.Dicts" for stage in ("train", "valid")]
    assert (execute(job_for(*OWN_DATA, *overrides), own_data / "run") or 0) > 0.7
    with pytest.raises(
        UserError, match=r"data\.inputs, data\.targets: .*there is no 'z'; available: x, y"
    ):
        execute(job_for(*OWN_DATA, *overrides, "data.targets=z"), own_data / "other")
