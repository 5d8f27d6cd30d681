"""Train from a configuration without the command line, and record the events."""

from __future__ import annotations

from pathlib import Path

import torch

from app.config.instantiate import Instantiator
from app.config.schema import Job
from app.experiment import run
from app.experiment.factory import Components, make_components
from app.training.accumulator import StageResult
from app.training.events import Callback, Callbacks, EpochEnd, StageStart
from app.training.history import History
from app.training.trainer import Trainer
from tests.support.runs import job_for


class EventRecorder(Callback):
    """Records the events that it receives."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.epoch_ends: list[EpochEnd] = []
        self.results: list[StageResult] = []

    def on_stage_start(self, start: StageStart) -> None:
        self.events.append(f"start {start.stage} {start.epoch}")

    def on_stage_end(self, result: StageResult, history: History) -> None:
        assert history[-1] is result.row
        self.results.append(result)
        self.events.append(f"end {result.stage} {result.epoch}")

    def on_epoch_end(self, end: EpochEnd) -> None:
        self.epoch_ends.append(end)


def build_trainer(job: Job, folder: Path, *callbacks: Callback) -> tuple[Trainer, Components]:
    """Build the trainer of a job, and what it is made of, on the CPU."""
    instantiator = Instantiator(job.trusted)
    components = make_components(job.config, instantiator, torch.device("cpu"))
    trainer = run.make_trainer(job, instantiator, components, Callbacks(callbacks), folder)
    return trainer, components


def fit(folder: Path, *overrides: str) -> tuple[Trainer, EventRecorder]:
    """Train by the overrides of a command line."""
    recorder = EventRecorder()
    trainer, components = build_trainer(job_for(*overrides), folder, recorder)
    trainer.fit(components.loaders["train"], components.loaders.get("valid"))
    return trainer, recorder
