"""A trained run to learn from, and overrides of short runs that do."""

from __future__ import annotations

from pathlib import Path

from app.experiment.run import execute
from tests.support.runs import job_for

SHORT = (
    "data.batch_size=16",
    "trainer.limit_train_batches=3",
    "trainer.limit_valid_batches=1",
    "trainer.limit_test_batches=1",
    "scheduler=constant",
    "~callbacks.plots",
    "~callbacks.batch_images",
)
DISTILL = (*SHORT, "model=mlp", "task=distill")


def train_teacher(folder: Path) -> Path:
    """Train a run for an epoch, and return its folder."""
    execute(job_for(*SHORT, "model=lenet", "trainer.max_epochs=1"), folder)
    return folder
