"""Loaders built from the configuration: iterable data, sampling, batch sizes, caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.config.instantiate import Instantiator
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.runtime.errors import UserError
from tests.support.own_data import DATA_CONFIG, OWN_DATA, STREAM, write_own_data
from tests.support.runs import config_issues, job_for


@pytest.fixture(autouse=True)
def own_data(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_own_data(tmp_cwd)
    monkeypatch.syspath_prepend(tmp_cwd)
    return tmp_cwd


def loaders_for(*overrides: str) -> dict[str, BatchLoader]:
    job = job_for(*OWN_DATA, *overrides)
    build = Instantiator(job.trusted)
    device = torch.device("cpu")
    datasets = make_datasets(job.config, build)
    return make_loaders(job.config, build, datasets, device, torch.contiguous_format)


def batch_sizes(loader: BatchLoader) -> list[int]:
    return [len(batch[0]) for batch in loader.epoch(1)]


def test_iterable_loader_length_is_known_or_limited() -> None:
    known = loaders_for(*STREAM, "+data.source.train.has_length=true")["train"]
    assert (known.num_samples, known.num_batches) == (100, 7)
    limited = loaders_for(*STREAM, "trainer.limit_train_batches=3")["train"]
    assert (limited.num_samples, limited.num_batches) == (None, 3)
    assert batch_sizes(limited) == [16, 16, 16]


def test_iterable_loader_with_several_workers_warns_about_sharding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaders_for(*STREAM, "data.loader.num_workers=1")
    assert not caplog.text
    loaders_for(*STREAM, "data.loader.num_workers=2")
    assert "each of 2 workers reads the entire iterable dataset" in caplog.text


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 2)])
def test_automatic_number_of_workers_is_that_of_the_cores_of_a_rank(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    files = "data.source.train._target_=own_data.Dicts", "data.inputs=x", "data.targets=y"
    loader = loaders_for(*files, "data.loader.num_workers=auto")["train"]
    assert loader.loader.num_workers == workers  # type: ignore[attr-defined]


def test_balanced_sampling_equalizes_classes_and_varies_by_epoch() -> None:
    unbalanced = loaders_for("data.source.train.count=2000")["train"]
    balanced = loaders_for(
        "data.source.train.count=2000",
        "data.sampling={_target_: app.data.sampling.BalancedClasses}",
    )["train"]
    fractions = [
        torch.cat([batch[1] for batch in loader.epoch(1)]).double().mean()
        for loader in (unbalanced, balanced)
    ]
    assert fractions[0] < 0.2
    assert 0.45 < fractions[1] < 0.55
    assert balanced.num_samples == 2000
    first, again, later = (torch.cat([b[0] for b in balanced.epoch(epoch)]) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_validation_is_not_sampled_and_uses_eval_batch_size() -> None:
    loaders = loaders_for(
        "data.sampling={_target_: app.data.sampling.BalancedClasses}", "data.eval_batch_size=40"
    )
    assert batch_sizes(loaders["valid"]) == [40]
    assert batch_sizes(loaders["train"]) == [16] * 6 + [4]


@pytest.mark.parametrize("target", ["table", "Stream", "Dicts"])
def test_drop_last_leaves_out_incomplete_training_batch(target: str) -> None:
    keys = ("data.inputs=x", "data.targets=y") if target == "Dicts" else ()
    overrides = (f"data.source.train._target_=own_data.{target}", "data.drop_last=true", *keys)
    loader = loaders_for(*overrides)["train"]
    assert [
        len(next(iter(b.values())) if isinstance(b, dict) else b[0]) for b in loader.epoch(1)
    ] == [16] * 6
    if target == "table":
        with pytest.raises(UserError, match="100 samples do not fill a batch of 128"):
            loaders_for("data.drop_last=true", "data.batch_size=128")


def test_cached_dataset_in_configuration_writes_its_file(own_data: Path) -> None:
    (own_data / "conf" / "data" / "cached.yaml").write_text(
        DATA_CONFIG.replace(
            "{_target_: own_data.table, count: 100}",
            "{_target_: app.data.cached.cached, file: cache.npz, "
            "dataset: {_target_: own_data.table, count: 100}}",
        )
    )
    assert batch_sizes(loaders_for("data=cached")["train"]) == [16] * 6 + [4]
    assert (own_data / "cache.npz").is_file()


def test_invalid_data_options_are_reported() -> None:
    assert config_issues("data.inputs=null") == [
        "data.inputs=None: a whole batch cannot be normalized; set data.normalize=null"
    ]
    (issue,) = config_issues("data.drop_last=2")
    assert issue == "data.drop_last=2 is not valid; allowed: true or false"
    (issue,) = config_issues("data.sampling={_target_: app.data.sampling.Balancd}")
    assert "did you mean 'BalancedClasses'" in issue


def test_normalization_statistics_use_selected_input() -> None:
    loader = loaders_for(
        "data.source.train._target_=own_data.targets_first",
        "data.inputs=1",
        "data.targets=0",
        "++data.normalize.mean=auto",
        "++data.normalize.std=auto",
    )["train"]
    values = torch.cat([batch[1] for batch in loader.epoch(1)])
    torch.testing.assert_close(values.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
