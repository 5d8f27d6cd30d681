"""The command line: compose, check, freeze, launch, return the objective."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from app.config import resolvers
from app.config.compose import CONF, CONFIG_NAME
from app.config.errors import ConfigError, Mistake, UserError
from app.files import write_text
from app.job import job_of, jobs_of
from app.launch.inline import launch_inline

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)  # where errors came from is for run.log alone
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes


def main() -> None:
    """The console script `app`, and `python -m app`."""
    resolvers.register()
    parser = get_args_parser()
    parser.prog = "app"
    args = parser.parse_args()
    try:
        if is_a_run(args):
            preflight(args)
        hydra_main()
    except UserError as error:
        _leave(str(error), MISTAKE)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)


def is_a_run(args: argparse.Namespace) -> bool:
    """Whether jobs are to run; not so for help, completion and printed configurations."""
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    return not shows and args.experimental_rerun is None


def _leave(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


def preflight(args: argparse.Namespace) -> None:
    """Looks for mistakes in every job before the first starts and before any file is written.

    Raises:
        UserError: All that was found.
    """
    mode = None
    for composed, job in jobs_of(args):
        mode = job.config.mode
        if mode != "check":
            _check_folder(composed, args.multirun)
            _check_accelerator(job.config.trainer.accelerator)
    if mode == "check":
        sys.stdout.write("no mistake in the configuration\n")
        sys.exit(0)


def _check_folder(composed: DictConfig, multirun: bool) -> None:
    """The run folder can be made, and is not that of another run."""
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    folder = Path(str(OmegaConf.select(composed, key))).absolute()
    if (folder / "status.json").exists():
        raise ConfigError([Mistake(key, f"={str(folder)!r} holds a run; it is not overwritten")])
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not _is_writable(nearest):
        reason = f"{str(nearest)!r} is no folder that can be written to"
        raise ConfigError([Mistake(key, f"={str(folder)!r} cannot be made: {reason}")])


def _check_accelerator(name: str) -> None:
    from app.device import choose_device

    choose_device(name)


def _is_writable(folder: Path) -> bool:
    import os

    return os.access(folder, os.W_OK | os.X_OK)


def _errors_to_stderr() -> None:
    """Of the two consoles that the logging configuration makes, each gets its own lines."""
    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(lambda record: record.levelno < logging.ERROR)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name=CONFIG_NAME)
def hydra_main(composed: DictConfig) -> float | None:
    """One job."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with_hydra = OmegaConf.merge({"hydra": HydraConfig.get()}, composed)
    assert isinstance(with_hydra, DictConfig)
    _errors_to_stderr()
    logging.captureWarnings(True)
    try:
        job = job_of(with_hydra)
        write_text(folder / "config.yaml", yaml.safe_dump(job.plain, sort_keys=False))
        for difference in job.differences:
            log.info("differs from the saved run: %s", difference)
        return launch_inline(job, folder)
    except UserError as error:
        log.error("%s", error)
        log.debug("it came from", exc_info=error)
        sys.exit(FAILURE)
    except KeyboardInterrupt:
        log.warning("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        log.exception("the run failed: %s: %s", type(error).__name__, error)
        sys.exit(FAILURE)
