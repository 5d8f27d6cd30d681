"""Run a sweep from its first job to its report: the work of our Hydra sweepers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.config.overrides import SweepSpace, parse_space
from app.config.resolve import hydra_config, resolve
from app.config.secrets import redact_text
from app.runtime.errors import StorageError, UserError
from app.runtime.escaping import print_error
from app.runtime.folders import held_folder
from app.runtime.signals import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    StopSignal,
    TrainingInterrupted,
)
from app.sweep.driver import JobSource, SweepDriver, sweep_logging
from app.sweep.folder import SweepFolder
from app.sweep.report.write import has_finished, write_report

log = logging.getLogger(__name__)
NOT_SAVED = ("sweep.resume", "sweep.force", "hydra.mode", "hydra.sweep.dir")


@dataclass(frozen=True)
class Sweep:
    """What Hydra passes to a sweeper.

    Attributes:
        config: Configuration as composed by Hydra.
        context: Hydra's config loader and callbacks.
        task: Runs a job.
        arguments: Overrides on the command line, except those of Hydra itself.
        params: The same from the configuration, `hydra.sweeper.params`.
    """

    config: DictConfig
    context: HydraContext
    task: TaskFunction
    arguments: list[str]
    params: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return Path(str(self.config.hydra.sweep.dir)).absolute()


# Makes the source of jobs once the folder exists.
JobSourceFactory = Callable[[Sweep, SweepFolder, SweepSpace], JobSource]


def run_sweep(sweep: Sweep, make_source: JobSourceFactory) -> None:
    """Run a sweep; exit the process with an error code unless every job has finished."""
    try:
        with SweepFolder(sweep.folder).locked(), held_folder(sweep.folder):
            folder = SweepFolder(sweep.folder)  # read again: no other process changes it now
            with sweep_logging(folder):
                code = _run(sweep, folder, make_source)
    except UserError as error:
        print_error(redact_text(str(error)))
        sys.exit(error.exit_code if isinstance(error, StorageError) else EXIT_USER_ERROR)
    if code:
        sys.exit(code)


def _run(sweep: Sweep, folder: SweepFolder, make_source: JobSourceFactory) -> int:
    loader, space = _prepare_folder(sweep, folder)
    source = make_source(sweep, folder, space)
    context = HydraContext(config_loader=loader, callbacks=sweep.context.callbacks)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=sweep.task, config=sweep.config
    )
    driver = SweepDriver(folder, source, sweep.config, loader)
    try:
        with StopSignal().installed():
            driver.run(launcher)
        return 0 if has_finished(folder) else EXIT_FAILURE
    except TrainingInterrupted as stopped:
        log.warning("sweep %s", stopped)
        return stopped.exit_code
    except KeyboardInterrupt:
        log.warning("the sweep was interrupted")
        return EXIT_INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_FAILURE
    finally:
        folder.save()
        write_report(folder.path)
        if not has_finished(folder):
            names = ",".join(sweep.config.trusted_targets)
            trust = f" trusted_targets=[{names}]" if names else ""
            log.info("to resume: python -m app -m sweep.resume=%s%s", folder.path, trust)


def _prepare_folder(sweep: Sweep, folder: SweepFolder) -> tuple[ConfigLoader, SweepSpace]:
    """Save what resuming needs.

    Returns:
        A loader of the configuration files as they were when the sweep started, and its space.
    """
    loader = sweep.context.config_loader
    is_fresh = not folder.exists or sweep.config.sweep.force
    if is_fresh:
        folder.freeze(loader)
        folder.config_name = str(sweep.config.hydra.job.config_name)
        folder.working_folder = str(Path.cwd())
    frozen = folder.frozen_loader(loader)
    space = parse_space(sweep.arguments, sweep.params, frozen)
    if is_fresh:
        folder.save_base(shared_config(frozen.load_sweep_config(sweep.config, space.fixed)))
    folder.overrides = overrides_to_save(sweep.config)
    folder.save()
    OmegaConf.save(sweep.config, folder.path / "multirun.yaml")
    return frozen, space


def shared_config(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration that all jobs share."""
    with hydra_config(config):
        return resolve(config)[0]


def overrides_to_save(config: DictConfig) -> list[str]:
    """Return the overrides with which `sweep.resume` starts the sweep again."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    return [
        override
        for override in [*overrides["hydra"], *overrides["task"]]
        if override.partition("=")[0].lstrip("+") not in NOT_SAVED
    ]
