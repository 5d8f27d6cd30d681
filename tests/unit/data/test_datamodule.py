"""Batches by configuration: streams, sampling, sizes, caches, windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.config.instantiate import Instantiator
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.runtime.errors import UserError
from tests.support.own_data import CONF, STREAM, WORDS
from tests.support.runs import job_for, mistakes_in


def loaders(*words: str) -> dict[str, BatchLoader]:
    job = job_for(*WORDS, *words)
    build = Instantiator(job.trusted)
    device = torch.device("cpu")
    datasets = make_datasets(job.config, build)
    return make_loaders(job.config, build, datasets, device, torch.contiguous_format)


def sizes(batches: BatchLoader) -> list[int]:
    return [len(batch[0]) for batch in batches.epoch(1)]


def test_the_length_of_a_stream_may_be_known_or_limited() -> None:
    known = loaders(*STREAM, "+data.source.train.known=true")["train"]
    assert (known.num_samples, known.num_batches) == (100, 7)
    limited = loaders(*STREAM, "trainer.limit_train_batches=3")["train"]
    assert (limited.num_samples, limited.num_batches) == (None, 3)
    assert sizes(limited) == [16, 16, 16]


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
