"""Pictures and masks: the same samples and metrics for any ranks, workers and caches."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from app.config.schema import Job
from app.data.batch import Batch
from app.training.events import Callback
from tests.support.data_files import write_data
from tests.support.fitting import build_trainer
from tests.support.rank_functions import run_on_ranks
from tests.support.runs import job_for

TRAIN_LIKE_EVAL = "data.transforms.train=${data.transforms.eval}"
Samples = list[list[tuple[bytes, bytes]]]  # input and target of each sample, by batch


def make_jobs(*overrides: str) -> dict[str, Job]:
    """Return a job for each way of reading the same pictures."""
    options = ("data.batch_size=7", "data.augment.flip=null", *overrides)
    crops, plain = job_for(*options), job_for(*options, TRAIN_LIKE_EVAL)
    return {
        "random crops": with_reader(crops, 0, None),
        "random crops, 2 workers": with_reader(crops, 2, None),
        "no cache": with_reader(plain, 0, None),
        "memory": with_reader(plain, 0, "memory"),
        "disk": with_reader(plain, 0, "disk"),
    }


def with_reader(job: Job, num_workers: int, cache: Literal["memory", "disk"] | None) -> Job:
    loader = replace(job.config.data.loader, num_workers=num_workers)
    data = replace(job.config.data, loader=loader, cache=cache)
    return replace(job, config=replace(job.config, data=data))


def read_and_test(jobs: dict[str, Job]) -> dict[str, tuple[Samples, dict[str, Any]]]:
    """Return this rank's samples, and the test metrics of a new model, for each job."""
    torch.set_num_threads(1)
    results = {}
    for name, job in jobs.items():
        trainer, components = build_trainer(job, Path(tempfile.mkdtemp()), Callback())
        passes = (("train", 1), ("train", 2), ("valid", 1), ("test", 1))
        batches = [batch for stage, n in passes for batch in components.loaders[stage].epoch(n)]
        row = trainer.run_stage("test", 1, components.loaders["test"]).row
        times = ("epoch_time", "samples/s")
        results[name] = (
            [list_samples(batch) for batch in batches],
            {key: value for key, value in row.items() if key not in times},
        )
    return results


def list_samples(batch: Batch) -> list[tuple[bytes, bytes]]:
    if batch is None:  # this rank has no share of the batch
        return []
    return [(x.numpy().tobytes(), y.numpy().tobytes()) for x, y in zip(*batch, strict=True)]


@pytest.mark.parametrize("name", ["image_folder", "masks"])
def test_samples_and_metrics_do_not_depend_on_ranks_workers_and_caches(
    name: str, tmp_cwd: Path
) -> None:
    overrides = [f"data={name}", *write_data(name, tmp_cwd)]
    overrides += ["model=mlp"] if name == "image_folder" else ["metric.test.instance_iou=null"]
    jobs = make_jobs(*overrides)
    one = read_and_test(jobs)
    assert one["random crops"][0] != one["no cache"][0]
    for size in (1, 2, 3):
        ranks = [one] if size == 1 else run_on_ranks(size, read_and_test, jobs)
        for reader in jobs:
            samples, row = one["random crops" if "crops" in reader else "no cache"]
            shares = [rank[reader][0] for rank in ranks]
            assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == samples, reader
            found = ranks[0][reader][1]
            assert found.keys() == row.keys()
            for key, value in row.items():
                is_mean = key.startswith("loss")  # a sum of floats in another order
                expected = pytest.approx(value, rel=1e-5) if is_mean and size > 1 else value
                assert found[key] == expected, (reader, size, key)
