"""Transforms belong to stages: those of training never reach validation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms import v2

from app.config.instantiate import Instantiator
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.data.transform import for_batches, transform_samples
from tests.support.data_files import write_data
from tests.support.runs import config_issues, job_for

CONF = Path(__file__).parents[3] / "conf" / "data"
DOWNLOADED = {"cifar10", "cifar100", "fashion_mnist", "kmnist", "svhn"}
FLIP = "+data.transforms.train.flip={_target_: torchvision.transforms.v2.RandomHorizontalFlip}"


def make_stage_loaders(*overrides: str) -> dict[str, BatchLoader]:
    job = job_for("data.loader.num_workers=0", *overrides)
    build = Instantiator(job.trusted)
    datasets = make_datasets(job.config, build)
    cpu = torch.device("cpu")
    return make_loaders(job.config, build, datasets, cpu, torch.contiguous_format)


def inputs_of(loader: BatchLoader, epoch: int, batches: int = 3) -> torch.Tensor:
    return torch.cat([batch[0] for batch in islice(loader.epoch(epoch), batches)])


@pytest.mark.parametrize("name", sorted({path.stem for path in CONF.glob("*.yaml")} - DOWNLOADED))
def test_validation_of_every_data_option_is_the_same_in_two_epochs(
    name: str, tmp_cwd: Path
) -> None:
    overrides = write_data(name, tmp_cwd) + ([] if name == "csv" else [FLIP])
    loaders = make_stage_loaders(f"data={name}", "data.batch_size=10", *overrides)
    for stage in ("valid", "test"):
        assert torch.equal(*(inputs_of(loaders[stage], epoch) for epoch in (1, 2))), stage


def test_overfitting_reads_untransformed_samples_in_both_stages(tmp_cwd: Path) -> None:
    overrides = write_data("image_folder", tmp_cwd)
    loaders = make_stage_loaders(
        "data=image_folder", *overrides, "data.batch_size=4", "trainer.overfit_batches=2"
    )
    train, valid = loaders["train"], loaders["valid"]
    assert torch.equal(inputs_of(train, 1), inputs_of(valid, 1))
    assert torch.equal(inputs_of(train, 1), inputs_of(train, 2))


def test_training_samples_are_transformed_by_epoch_from_files_and_in_memory(tmp_cwd: Path) -> None:
    files = make_stage_loaders(
        "data=image_folder", *write_data("image_folder", tmp_cwd), "data.batch_size=40"
    )
    memory = make_stage_loaders("data=npz", FLIP, *write_data("npz", tmp_cwd), "data.batch_size=24")
    for loader in (files["train"], memory["train"]):
        pixels = [inputs_of(loader, epoch) for epoch in (1, 2)]
        rows = [sorted(map(tuple, batch.flatten(1).tolist())) for batch in pixels]
        assert rows[0] != rows[1]


def test_samples_are_the_same_with_and_without_workers(tmp_cwd: Path) -> None:
    overrides = ["data=image_folder", *write_data("image_folder", tmp_cwd), "~data.augment.flip"]
    alone, workers = (
        make_stage_loaders(*overrides, f"data.loader.num_workers={count}") for count in (0, 2)
    )
    batches = [inputs_of(loaders["train"], 1) for loaders in (alone, workers)]
    assert torch.equal(*batches)


def test_deterministic_transforms_take_the_batch_and_random_ones_each_sample() -> None:
    images = torch.arange(64.0).reshape(4, 1, 4, 4)
    resize = v2.Resize([2, 2])
    assert for_batches(resize) is resize
    assert torch.equal(for_batches(resize)(images), torch.stack([resize(x) for x in images]))
    torch.manual_seed(0)
    flipped = for_batches(v2.RandomHorizontalFlip())(images.expand(4, 1, 4, 4).repeat(8, 1, 1, 1))
    drawn = {torch.equal(x, y) for x, y in zip(flipped, images.repeat(8, 1, 1, 1), strict=True)}
    assert drawn == {True, False}
    assert for_batches(v2.Compose([resize, v2.RandomHorizontalFlip()])) is not resize


class Count(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.tensor([float(index)]), index) for index in range(4)])


class CountWithEpoch(Count):
    def __len__(self) -> int:
        return 4

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_streams_are_transformed_and_keep_their_length_and_epoch() -> None:
    stream = transform_samples(Count(), [torch.neg], 0)
    assert not hasattr(stream, "set_epoch")
    with pytest.raises(TypeError):
        len(stream)  # type: ignore[arg-type]
    (batch,) = DataLoader(stream, batch_size=4)
    assert batch[0].flatten().tolist() == [0, -1, -2, -3]
    inner = CountWithEpoch()
    outer = transform_samples(inner, [torch.neg], 0)
    outer.set_epoch(3)  # type: ignore[attr-defined]
    assert (inner.epoch, len(outer)) == (3, 4)  # type: ignore[arg-type]


def test_samples_without_transforms_are_the_dataset_itself() -> None:
    dataset = TensorDataset(torch.zeros(2, 1), torch.zeros(2))
    assert transform_samples(dataset, [], 0) is dataset


def test_transforms_of_a_source_are_refused_with_the_new_key(tmp_cwd: Path) -> None:
    (tmp_cwd / "x").mkdir()
    (issue,) = config_issues(
        "data=image_folder",
        "data.path=x",
        "+data.source.train.transforms={flip: {_target_: app.data.augment.RandomFlip}}",
    )
    assert issue.startswith("data.source.train.transforms has moved")
    assert "use data.transforms.train and data.transforms.eval" in issue
