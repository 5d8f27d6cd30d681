"""The components of one job as objects, for notebooks and scripts."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
import torch
from hydra._internal.utils import get_args_parser

from app.callbacks.prediction_files import prediction_table
from app.callbacks.selection import pick_targets
from app.callbacks.tables import truncate_to_history
from app.config import resolvers
from app.config.compose import open_composer
from app.config.instantiate import Instantiator
from app.config.schema import AUTO, Job
from app.data.batch import BatchLoader
from app.data.images import without_ghostscript
from app.experiment.environment import Environment
from app.experiment.factory import make_components
from app.experiment.job import make_jobs, resolve_folder, save_config
from app.experiment.run import (
    closing_callbacks,
    load_ckpt_weights,
    logit_keys,
    make_run_callbacks,
    make_status,
    make_trainer,
    record_environment,
)
from app.experiment.shorthand import expand
from app.runtime.device import choose_device, count_devices
from app.runtime.errors import UserError, as_user_error
from app.runtime.files import remove_temp_files
from app.runtime.lock import run_lock
from app.runtime.nested import concat, describe, map_tensors
from app.runtime.wait_policy import adaptive_wait_policy
from app.training.checkpoint.rotation import BEST_CHECKPOINT
from app.training.precision import make_deterministic, set_matmul_precision


def compose(overrides: list[str], folder: str | None = None) -> Experiment:
    """Build the objects of the command line `python -m app <overrides>`.

    Raises:
        UserError: The configuration is invalid, or it needs the command line (a sweep, several
            devices).
    """
    resolvers.register()
    _show_log()
    with open_composer(get_args_parser().parse_args(expand(overrides, os.environ))) as composer:
        if composer.is_sweep:
            raise UserError("compose() builds a single job; run sweeps from the command line")
        jobs = make_jobs(composer)
    composed, job = jobs[0]
    if job.config.mode == "check":
        raise UserError(
            "mode='check' is for the command line; compose() checks every configuration anyway"
        )
    trainer = job.config.trainer
    if count_devices(trainer.accelerator, trainer.devices) > 1:
        raise UserError(
            f"trainer.devices={trainer.devices!r}: training on several devices needs the command "
            "line; allowed here: null, 1, or one id"
        )
    run_folder = Path(folder).absolute() if folder else resolve_folder(composed, "hydra.run.dir")
    with as_user_error():
        contains_run = (run_folder / "status.json").exists()
    if contains_run and job.config.resume is None:
        raise UserError(
            f"folder={str(run_folder)!r} already contains a run, which is not overwritten; "
            "use another folder, or resume=FOLDER to resume the run"
        )
    resumes_run = composed.resume not in (None, AUTO)
    if resumes_run and resolve_folder(composed, "hydra.run.dir") != run_folder:
        raise UserError(
            f"folder={str(run_folder)!r} is not the folder of the run to resume: "
            f"resume={composed.resume}"
        )
    return Experiment(job, run_folder)


def _show_log() -> None:
    """Print the log, as the command line does, unless the caller has set up logging."""
    log = logging.getLogger("app")
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)


class Experiment:
    """The objects of one job; as a context manager it locks the folder and closes the callbacks.

    Args:
        job: The validated job.
        folder: The run folder; it is created with the first file.

    Attributes:
        config: The typed configuration.
        task: The train and eval steps, with the model as `task.model`.
        loaders: The batch loader of each stage.
        trainer: The training loop.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        instantiator, self.config, self.folder = Instantiator(job.trusted), job.config, folder
        device = choose_device(self.config.trainer.accelerator, self.config.trainer.devices)
        make_deterministic(self.config.trainer.deterministic)
        set_matmul_precision(self.config.trainer.matmul_precision)
        components = make_components(self.config, instantiator, device)
        self._resume_pending = self.config.resume not in (None, AUTO)
        self._environment, self._stack = Environment(job, device), ExitStack()
        self._components = components
        self._status = make_status(job, folder, device, self._environment)
        callbacks = make_run_callbacks(job, instantiator, components, self._status)
        self._best_epoch: int | None = None  # set once the best weights are loaded
        self.job, self.task, self.loaders = job, components.task, components.loaders
        self.trainer = make_trainer(
            job, instantiator, components, callbacks, folder, None, self._status.nonfinite
        )
        if self.config.ckpt is not None:
            load_ckpt_weights(self.trainer, self.config)

    def __enter__(self) -> Experiment:
        self._stack.enter_context(run_lock(self.folder))
        remove_temp_files(self.folder)
        self._resume_once()
        save_config(self.job, self.folder)
        record_environment(self.job, self.folder, self._environment, self._components)
        self._stack.enter_context(without_ghostscript())
        self._stack.enter_context(self._status.recording())
        self._stack.enter_context(closing_callbacks(self.trainer.callbacks, self._status))
        if self._components.device.type == "cpu":
            self._stack.enter_context(adaptive_wait_policy())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def fit(self) -> pd.DataFrame:
        """Train, load the best weights, and return the summary table: a row per epoch and stage."""
        self._resume_once()
        summary = self.trainer.fit(self._loader("train"), self.loaders.get("valid"))
        self._status.set_outcome(self.trainer.outcome)
        if (self.folder / "checkpoints" / BEST_CHECKPOINT).exists():
            self._best_epoch = self.trainer.state.load_best_weights()
        return summary

    def evaluate(self, stage: str = "test") -> pd.DataFrame:
        """Evaluate the current weights on a stage, and return its row of the summary table."""
        return self.trainer.evaluate(self._loader(stage), stage, self._best_epoch)

    def predict(self, stage: str = "test") -> pd.DataFrame:
        """Return a row for each sample: its target, if it is a class, the label and probabilities.

        A model without logits has columns with its outputs instead.

        Raises:
            UserError: The outputs do not fit a table; `trainer.predict(loaders[stage])` returns
                them as tensors.
        """
        batches = self.trainer.predictions(self._loader(stage))
        pairs = [(pick_targets(data, self.job.plain), outputs) for data, outputs in batches]
        targets, outputs = concat([map_tensors(torch.Tensor.cpu, pair) for pair in pairs])
        values = outputs.float().numpy() if hasattr(outputs, "numpy") else np.empty((0, 0, 0))
        if values.ndim > 2:
            raise UserError(
                f"the outputs do not fit a table: {describe(outputs)}; "
                "use trainer.predict(loaders[stage])"
            )
        table = prediction_table(values, None in logit_keys(self.task))
        if isinstance(targets, torch.Tensor) and targets.shape == (len(table),):
            table.insert(1, "target", targets.numpy())
        return table

    def _loader(self, stage: str) -> BatchLoader:
        if stage not in self.loaders:
            raise UserError(f"there is no {stage} data; available: {', '.join(self.loaders)}")
        return self.loaders[stage]

    def _resume_once(self) -> None:
        if self._resume_pending:
            self._resume_pending = False
            self.trainer.resume(Path(str(self.config.resume)))
            truncate_to_history(self.folder, self.trainer.state.history)
