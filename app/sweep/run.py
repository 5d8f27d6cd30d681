"""A sweep from its first job to its page: what a sweeper of Hydra's does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.config.overrides import SweepSpace, parse_space
from app.config.resolve import resolve
from app.runtime.errors import UserError
from app.runtime.signals import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    StopSignal,
    TrainingInterrupted,
)
from app.sweep.driver import JobSource, SweepDriver, sweep_logging
from app.sweep.folder import SweepFolder
from app.sweep.report.write import exit_code, write_report

log = logging.getLogger(__name__)
NOT_KEPT = ("sweep.resume", "sweep.force")


@dataclass(frozen=True)
class Sweep:
    """What a sweeper knows.

    Attributes:
        config: As Hydra composed it.
        context: How Hydra composes.
        task: Runs a job.
        arguments: What was typed, less what is Hydra's own.
        params: Likewise from the configuration.
    """

    config: DictConfig
    context: HydraContext
    task: TaskFunction
    arguments: list[str]
    params: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        return Path(str(self.config.hydra.sweep.dir)).absolute()


class BatchedJobSource(JobSource, Protocol):
    """A source of jobs that knows how many go together."""

    def batch_size(self, launcher: object) -> int:
        """How many jobs a launcher that runs them together is given."""


class JobSourceFactory(Protocol):
    """Makes the source of jobs, once there is a folder."""

    def __call__(
        self, sweep: Sweep, folder: SweepFolder, space: SweepSpace
    ) -> BatchedJobSource: ...


def run_sweep(sweep: Sweep, make_search: JobSourceFactory) -> None:
    """All of it; ends the process where not all went well."""
    try:
        with SweepFolder(sweep.folder).locked():
            folder = SweepFolder(sweep.folder)  # nobody else changes it from now on
            with sweep_logging(folder):
                code = _run(sweep, folder, make_search)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_USER_ERROR)
    if code:
        sys.exit(code)


def _run(sweep: Sweep, folder: SweepFolder, make_search: JobSourceFactory) -> int:
    loader = _begin(sweep, folder)
    space = parse_space(sweep.arguments, sweep.params, loader)
    context = HydraContext(config_loader=loader, callbacks=sweep.context.callbacks)
    search = make_search(sweep, folder, space)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=sweep.task, config=sweep.config
    )
    on_error = sweep.config.sweep.on_error
    drive = SweepDriver(folder, search, launcher, on_error, sweep.config, loader)
    try:
        with StopSignal().installed():
            drive.run(search.batch_size(launcher))
        return exit_code(folder, EXIT_FAILURE)
    except TrainingInterrupted as stopped:
        log.warning("the sweep was %s", stopped)
        return stopped.code
    except KeyboardInterrupt:
        log.warning("the sweep was interrupted")
        return EXIT_INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_FAILURE
    finally:
        folder.save()
        write_report(folder.path)
        if exit_code(folder, EXIT_FAILURE):
            names = ",".join(sweep.config.trusted_targets)
            trust = f" trusted_targets=[{names}]" if names else ""
            log.info("to go on: python -m app -m sweep.resume=%s%s", folder.path, trust)


def _begin(sweep: Sweep, folder: SweepFolder) -> ConfigLoader:
    """The configuration files as they were when the sweep began, or are taken now."""
    own = sweep.context.config_loader
    fresh = not folder.exists or sweep.config.sweep.force
    if fresh:
        folder.freeze(own)
    loader = folder.frozen_loader(own)
    space = parse_space(sweep.arguments, sweep.params, loader)
    if fresh:
        folder.save_base(shared_config(loader.load_sweep_config(sweep.config, space.fixed)))
    folder.overrides = overrides_to_save(sweep.config)
    folder.save()
    OmegaConf.save(sweep.config, folder.path / "multirun.yaml")
    return loader


def shared_config(config: DictConfig) -> dict[str, Any]:
    """What all jobs share, plainly."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        return resolve(config)[0]
    finally:
        HydraConfig.instance().cfg = before


def overrides_to_save(config: DictConfig) -> list[str]:
    """The command line of the sweep, with which it can be gone on with."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    words = [*overrides["hydra"], *overrides["task"]]
    left_out = (*NOT_KEPT, "hydra.mode", "hydra.sweep.dir")
    return [word for word in words if word.partition("=")[0].lstrip("+") not in left_out]
