"""Batches by configuration: streams, sampling, sizes, caches, windows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import job_for, mistakes_in

from app.config.instantiate import Instantiator
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.experiment.run import execute
from app.runtime.errors import UserError

OWN = """
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset


def points(count):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 1).long()


def table(count: int):
    return TensorDataset(*points(count))


def turned(count: int):
    return TensorDataset(*points(count)[::-1])


class Stream(IterableDataset):
    def __init__(self, count: int, known: bool = False) -> None:
        self.count, self.known = count, known

    def __len__(self):
        if not self.known:
            raise TypeError
        return self.count

    def __iter__(self):
        return iter(zip(*points(self.count)))


class Dicts(Dataset):
    def __init__(self, count: int) -> None:
        self.points = points(count)

    def __len__(self):
        return len(self.points[0])

    def __getitem__(self, index):
        return {"x": self.points[0][index], "y": self.points[1][index]}
"""
CONF = """
defaults: [base/arrays@_here_, _self_]
name: own
path: null
channels: null
image_size: null
num_classes: 2
input_shape: [2]
normalize: null
batch_size: 16
source:
  train: {_target_: own_data.table, count: 100}
  valid: {_target_: own_data.table, count: 40}
"""
WORDS = ("--config-dir", "conf", "data=own", "model=mlp", "trusted_targets=[own_data]")
STREAM = ("data.source.train._target_=own_data.Stream", "trainer.max_epochs=2")


@pytest.fixture(autouse=True)
def own_data(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (elsewhere / "own_data.py").write_text(OWN)
    (elsewhere / "conf" / "data").mkdir(parents=True)
    (elsewhere / "conf" / "data" / "own.yaml").write_text(CONF)
    monkeypatch.syspath_prepend(elsewhere)
    return elsewhere


def loaders(*words: str) -> dict[str, BatchLoader]:
    job = job_for(*WORDS, *words)
    build = Instantiator(job.trusted)
    device = torch.device("cpu")
    datasets = make_datasets(job.config, build)
    return make_loaders(job.config, build, datasets, device, torch.contiguous_format)


def sizes(batches: BatchLoader) -> list[int]:
    return [len(batch[0]) for batch in batches.epoch(1)]


def test_a_stream_of_unknown_length_trains_from_the_command_line(own_data: Path) -> None:
    execute(job_for(*WORDS, *STREAM, "scheduler=constant"), own_data / "run")
    summary = pd.read_csv(own_data / "run" / "train_summary_table.csv")
    assert summary["total_samples"].tolist() == [100, 100]


def test_the_length_of_a_stream_may_be_known_or_limited() -> None:
    known = loaders(*STREAM, "+data.source.train.known=true")["train"]
    assert (known.num_samples, known.num_batches) == (100, 7)
    limited = loaders(*STREAM, "trainer.limit_train_batches=3")["train"]
    assert (limited.num_samples, limited.num_batches) == (None, 3)
    assert sizes(limited) == [16, 16, 16]


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


def test_workers_that_may_all_read_the_same_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaders(*STREAM, "data.loader.num_workers=1")
    assert not caplog.text
    loaders(*STREAM, "data.loader.num_workers=2")
    assert "each of 2 workers reads the whole iterable dataset" in caplog.text


def test_balanced_sampling_by_configuration() -> None:
    plain = loaders("data.source.train.count=2000")["train"]
    balanced = loaders(
        "data.source.train.count=2000",
        "data.sampling={_target_: app.data.sampling.BalancedClasses}",
    )["train"]
    share = [
        torch.cat([batch[1] for batch in one.epoch(1)]).double().mean() for one in (plain, balanced)
    ]
    assert share[0] < 0.2
    assert 0.45 < share[1] < 0.55
    assert balanced.num_samples == 2000
    first, again, later = (torch.cat([b[0] for b in balanced.epoch(epoch)]) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_validation_is_never_sampled_and_may_have_other_batches() -> None:
    found = loaders(
        "data.sampling={_target_: app.data.sampling.BalancedClasses}", "data.eval_batch_size=40"
    )
    assert sizes(found["valid"]) == [40]
    assert sizes(found["train"]) == [16] * 6 + [4]


@pytest.mark.parametrize("target", ["table", "Stream", "Dicts"])
def test_a_short_last_batch_of_training_may_be_left_out(target: str) -> None:
    keys = ("data.inputs=x", "data.targets=y") if target == "Dicts" else ()
    words = (f"data.source.train._target_=own_data.{target}", "data.drop_last=true", *keys)
    batches = loaders(*words)["train"]
    assert [
        len(next(iter(b.values())) if isinstance(b, dict) else b[0]) for b in batches.epoch(1)
    ] == [16] * 6
    if target == "table":
        with pytest.raises(UserError, match="100 samples make no batch of 128"):
            loaders("data.drop_last=true", "data.batch_size=128")


def test_samples_that_are_dicts_by_configuration(own_data: Path) -> None:
    words = ["data.inputs=x", "data.targets=y", "optimizer.lr=0.05", "trainer.max_epochs=3"]
    words += [f"data.source.{stage}._target_=own_data.Dicts" for stage in ("train", "valid")]
    assert (execute(job_for(*WORDS, *words), own_data / "run") or 0) > 0.7
    with pytest.raises(
        UserError, match=r"data\.inputs, data\.targets: .*there is no 'z'; it has: x, y"
    ):
        execute(job_for(*WORDS, *words, "data.targets=z"), own_data / "other")


def test_a_cached_dataset_by_configuration(own_data: Path) -> None:
    (own_data / "conf" / "data" / "kept.yaml").write_text(
        CONF.replace(
            "{_target_: own_data.table, count: 100}",
            "{_target_: app.data.cached.cached, file: kept.npz, "
            "dataset: {_target_: own_data.table, count: 100}}",
        )
    )
    assert sizes(loaders("data=kept")["train"]) == [16] * 6 + [4]
    assert (own_data / "kept.npz").is_file()


def test_mistakes_in_the_parts_of_a_batch() -> None:
    assert mistakes_in("data.inputs=null") == [
        "data.inputs=None: a whole batch cannot be normalised; data.normalize=null"
    ]
    (mistake,) = mistakes_in("data.drop_last=2")
    assert mistake == "data.drop_last=2 does not fit; allowed: true or false"
    (mistake,) = mistakes_in("data.sampling={_target_: app.data.sampling.Balancd}")
    assert "did you mean 'Balanced'" in mistake


def test_statistics_are_those_of_the_part_that_is_the_input() -> None:
    words = ("++data.normalize.mean=auto", "++data.normalize.std=auto")
    batches = loaders(
        "data.source.train._target_=own_data.turned", "data.inputs=1", "data.targets=0", *words
    )["train"]
    values = torch.cat([batch[1] for batch in batches.epoch(1)])
    torch.testing.assert_close(values.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
