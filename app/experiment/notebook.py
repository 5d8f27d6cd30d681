"""The parts of a command line as objects, for notebooks and scripts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
import yaml
from hydra._internal.utils import get_args_parser

from app.callbacks.prediction_files import table
from app.callbacks.tables import truncate_to_history
from app.config import resolvers
from app.config.compose import composer
from app.config.instantiate import Instantiator
from app.config.schema import Job
from app.data.batch import BatchLoader
from app.experiment.factory import make_callbacks, make_components
from app.experiment.job import make_jobs, resolve_folder
from app.experiment.run import logit_keys, make_trainer, restore_from
from app.experiment.status import StatusWriter
from app.runtime.device import choose_device, count_devices
from app.runtime.errors import UserError, as_user_error
from app.runtime.files import remove_temp_files, write_text
from app.runtime.lock import run_lock
from app.runtime.nested import Nested, describe
from app.training.checkpoint.checkpoint import BEST
from app.training.events import Callbacks
from app.training.precision import make_deterministic


class Experiment:
    """The parts of one job. Used as a context manager, it closes what watches at the end.

    Args:
        job: Checked.
        folder: Of the run; it is made with the first file.

    Attributes:
        config: Typed.
        task: The steps, with the model as `task.model`.
        loaders: The batches, by stage.
        trainer: The loop.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        build, self.config, self.folder = Instantiator(job.trusted), job.config, folder
        device = choose_device(self.config.trainer.accelerator, self.config.trainer.devices)
        make_deterministic(self.config.trainer.deterministic)
        parts = make_components(self.config, build, device)
        about = {key: job.plain[key] for key in ("mode", "ckpt", "name", "tags", "notes", "seed")}
        self._goes_on = self.config.resume not in (None, "auto")
        self._status = StatusWriter(folder, about, self.config.goal, device, self._goes_on)
        watchers = make_callbacks(self.config, build, folder, parts.task.model, job)
        self._callbacks = Callbacks([self._status, *watchers])
        self._stack = ExitStack()
        self._epoch: int | None = None  # of the weights, where they are not the last
        self.job, self.task, self.loaders = job, parts.task, parts.loaders
        self.trainer = make_trainer(job, build, parts, self._callbacks, folder)
        self._status.nonfinite = self.trainer.nonfinite.stats
        if self.config.ckpt is not None:
            restore_from(self.trainer, self.config)

    def __enter__(self) -> Experiment:
        self._stack.enter_context(run_lock(self.folder))
        remove_temp_files(self.folder)
        self._go_on()
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.job.plain, sort_keys=False))
        self._stack.enter_context(self._status.recording())
        self._stack.callback(lambda: self._callbacks.on_run_end(self.trainer.state.history))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _go_on(self) -> None:
        """Once, where it is a run that was cut."""
        if self._goes_on:
            self._goes_on = False
            self.trainer.resume(Path(str(self.config.resume)))
            truncate_to_history(self.folder, self.trainer.state.history)

    def fit(self) -> pd.DataFrame:
        """Trains, puts the best weights back, and gives the summary: a line for each stage."""
        self._go_on()
        summary = self.trainer.fit(self._batches("train"), self.loaders.get("valid"))
        self._status.final_status = self.trainer.outcome
        if (self.folder / "checkpoints" / BEST).exists():
            self._epoch = self.trainer.state.load_best_weights()
        return summary

    def evaluate(self, stage: str = "test") -> pd.DataFrame:
        """Measures the weights as they are; gives the stage's line of the summary."""
        return self.trainer.evaluate(self._batches(stage), stage, self._epoch)

    def predict(self, stage: str = "test") -> pd.DataFrame:
        """A line for each sample: label and probabilities, or outputs.

        Raises:
            UserError: Outputs are no table; `trainer.predict(loaders[stage])` gives them.
        """
        outputs: Nested = self.trainer.predict(self._batches(stage))
        values = outputs.float().numpy() if hasattr(outputs, "numpy") else np.empty((0, 0, 0))
        if values.ndim > 2:
            raise UserError(
                f"the outputs are no table but {describe(outputs)}; trainer.predict(...)"
            )
        return table(values, None in logit_keys(self.task))

    def _batches(self, stage: str) -> BatchLoader:
        if stage not in self.loaders:
            raise UserError(f"there is no {stage} data; there is: {', '.join(self.loaders)}")
        return self.loaders[stage]


def compose(overrides: list[str], folder: str | None = None) -> Experiment:
    """The parts of the command line `python -m app <overrides>`.

    Raises:
        UserError: Whatever is wrong with it.
    """
    resolvers.register()
    with composer(get_args_parser().parse_args(list(overrides))) as composing:
        if composing.sweeps:
            raise UserError("several jobs at once: a sweep belongs on the command line")
        jobs = make_jobs(composing)
    composed, job = jobs[0]
    if job.config.mode == "check":
        raise UserError("mode='check' is for the command line: composing has checked already")
    trainer = job.config.trainer
    if count_devices(trainer.accelerator, trainer.devices) > 1:
        raise UserError(
            f"trainer.devices={trainer.devices!r}: several devices are for the command line; "
            "allowed here: null, 1, or one id"
        )
    where = Path(folder).absolute() if folder else resolve_folder(composed, "hydra.run.dir")
    with as_user_error():
        holds_a_run = (where / "status.json").exists()
    if holds_a_run and job.config.resume is None:
        raise UserError(f"folder={str(where)!r} holds a run; it is not overwritten")
    resume = job.config.resume
    if resume not in (None, "auto") and Path(str(resume)).parent.parent != where:
        raise UserError(f"folder={str(where)!r}: the run that goes on is in another, {resume}")
    return Experiment(job, where)
