"""Selection of callbacks in the configuration."""

from __future__ import annotations

from tests.support.runs import job_for


def test_callbacks_option_adds_one_callback_to_the_default() -> None:
    callbacks = job_for("callbacks=wandb").plain["callbacks"]
    default = [
        "tables",
        "progress",
        "model_summary",
        "console",
        "slowdown",
        "plots",
        "batch_images",
    ]
    assert list(callbacks) == [*default, "wandb"]


def test_callbacks_list_adds_several_callbacks() -> None:
    both = "callbacks/single@callbacks=[tensorboard,samples]"
    callbacks = job_for(both, "callbacks.samples.count=2", "~callbacks.plots").plain["callbacks"]
    assert list(callbacks) == [
        "tables",
        "progress",
        "model_summary",
        "console",
        "slowdown",
        "batch_images",
        "tensorboard",
        "samples",
    ]
    assert callbacks["samples"]["count"] == 2
