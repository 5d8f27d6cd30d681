"""Overrides on top of the saved configuration of a run."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest

from app.config.overrides import parse_overrides
from app.config.resume import apply_overrides_to_saved, first_difference, replace_value
from app.config.saved import resolve_saved
from app.config.schema import Change, Job
from app.runtime.errors import ConfigError
from tests.support.runs import job_for

RUN = ("model=mlp", "scheduler=onecycle", "name=first", "tags=[a]")


def saved_run() -> dict[str, Any]:
    return copy.deepcopy(cached_job().saved)


@cache
def cached_job() -> Job:
    return job_for(*RUN)


def apply(*words: str, saved: Any = None, resumes: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Return the resolved configuration, and each difference as a text."""
    saved = saved or saved_run()
    now = job_for("model=mlp", *words).saved
    changed, changes = apply_overrides_to_saved(saved, now, parse_overrides(words), resumes)
    return resolve_saved(changed), [str(change) for change in changes]


def test_apply_overrides_reaches_what_refers_to_the_changed_key() -> None:
    plain, changes = apply("optimizer.lr=0.5")
    assert plain["scheduler"]["lr_scheduler"]["max_lr"] == plain["optimizer"]["lr"] == 0.5
    assert changes == [
        "optimizer.lr: 0.001 -> 0.5",
        "scheduler.lr_scheduler.max_lr: 0.001 -> 0.5",
    ]


def test_apply_overrides_to_number_of_classes_names_the_model_that_would_change() -> None:
    with pytest.raises(ConfigError) as refused:
        apply("data.num_classes=7", "data.class_names=null")
    assert [issue.key for issue in refused.value.issues] == ["model.num_classes: 10 -> 7"]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.hidden=[7]", "model.hidden"),
        ("model.hidden.0=7", "model.hidden"),
        ("data.split.seed=4", "data.split.seed"),
        ("optimizer=sgd", "optimizer._target_"),
        ("average=ema", "average"),
        ("~loss.cross_entropy.weight", "loss.cross_entropy.weight"),
    ],
)
def test_apply_overrides_refuses_what_training_has_fixed(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match="cannot be changed; the run was trained with") as refused:
        apply(word)
    assert any(issue.key.startswith(f"{key}: ") for issue in refused.value.issues)


def test_apply_overrides_keeps_the_name_of_a_resumed_run_and_not_of_a_tested_one() -> None:
    plain, changes = apply("notes=more")
    assert (plain["name"], plain["tags"], plain["notes"], changes) == ("first", ["a"], "more", [])
    plain, _ = apply("notes=more", resumes=False)
    assert (plain["name"], plain["tags"], plain["notes"]) == ("mlp_mnist", [], "more")


def test_apply_overrides_removes_adds_and_replaces_groups() -> None:
    plain, changes = apply(
        "~callbacks.plots", "+metric/single@metric.test=[auroc]", "scheduler=constant"
    )
    assert "plots" not in plain["callbacks"]
    assert plain["metric"]["test"]["auroc"]["num_classes"] == 10
    assert plain["scheduler"]["lr_scheduler"] is None
    assert sorted(changes) == [
        "callbacks.plots: app.callbacks.plots.Plots -> removed",
        "metric.test.auroc: None -> torchmetrics.classification.MulticlassAUROC",
        "scheduler.lr_scheduler: torch.optim.lr_scheduler.OneCycleLR -> None",
    ]


def test_apply_overrides_of_several_groups_is_for_resumed_runs_only() -> None:
    with pytest.raises(ConfigError, match="sets keys of several groups"):
        apply("debug=fast", resumes=False)
    plain, _ = apply("debug=fast")
    assert plain["trainer"]["fast_dev_run"]


def test_apply_overrides_fills_keys_that_did_not_exist() -> None:
    saved = saved_run()
    del saved["data"]["drop_last"], saved["find"], saved["mode"]
    plain, changes = apply(saved=saved)
    assert plain["data"]["drop_last"] is False
    assert plain["find"]["steps"] == 100
    assert "data.drop_last: did not exist when the run was saved -> False" in changes
    assert len(changes) == 2


def test_apply_overrides_keeps_the_batch_size_that_was_found() -> None:
    saved = saved_run()
    saved["trainer"]["batch_size_finder"], saved["data"]["batch_size"] = True, 512
    plain, changes = apply("data.batch_size=8", saved=saved)
    assert (plain["data"]["batch_size"], changes) == (512, [])


def test_replace_value_reaches_what_refers_to_it() -> None:
    job = replace_value(job_for(*RUN), "optimizer.lr", 0.25)
    assert job.config.scheduler.lr_scheduler is not None
    assert job.config.scheduler.lr_scheduler["max_lr"] == 0.25
    assert job.plain == resolve_saved(job.saved)


def test_first_difference_is_the_first_of_nested_values() -> None:
    before = {"a": 1, "b": {"c": 2, "d": 3}}
    assert first_difference(before, {"a": 1, "b": {"c": 4}}, "x") == Change("x.b.c", "2", "4")
    assert first_difference(before, before, "x") is None
