"""The command line: compose, check, freeze, launch, return the objective."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from app.config import resolvers
from app.config.check import USES_CKPT, checked
from app.config.compose import CONF, CONFIG_NAME, compositions, parse_overrides
from app.config.errors import ConfigError, Mistake, UserError
from app.config.freeze import freeze, over_saved, template_of, typed_trust
from app.config.schema import Job
from app.config.targets import trusted_by_environment
from app.files import write_text
from app.launch.inline import launch_inline

log = logging.getLogger(__name__)
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
    mistakes: list[Mistake] = []
    for composed, refused in compositions(args):
        mistakes += refused
        try:
            config = job_of(composed).config
            mode = config.mode
            if mode != "check":
                _check_folder(composed, args.multirun)
                _check_accelerator(config.trainer.accelerator)
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    if mode == "check":
        sys.stdout.write("no mistake in the configuration\n")
        sys.exit(0)


def job_of(composed: DictConfig) -> Job:
    """What is to be run.

    Args:
        composed: By Hydra, its own node included.

    Raises:
        UserError: All that is wrong with it.
    """
    words = OmegaConf.to_container(composed.hydra.overrides.task)
    assert isinstance(words, list)
    overrides = parse_overrides(words)
    trusted = [*typed_trust(overrides), *trusted_by_environment()]
    if trusted and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    (plain, mistakes), template = freeze(composed), template_of(composed)
    mistakes += _trust_mistakes(plain, overrides)
    differences: list[str] = []
    if plain.get("mode") in USES_CKPT and isinstance(plain.get("ckpt"), str):
        saved, its_template = _saved_config(plain["ckpt"])
        plain, template, differences = over_saved(saved, its_template, composed, overrides)
    config = checked(plain, trusted, mistakes)
    return Job(config, plain, OmegaConf.to_yaml(template), trusted, differences)


def _trust_mistakes(plain: dict[str, Any], overrides: Sequence[Override]) -> list[Mistake]:
    if not plain.get("trusted_targets") or typed_trust(overrides):
        return []
    problem = f"={plain['trusted_targets']!r} may be given on the command line only"
    return [Mistake("trusted_targets", problem)]


def _saved_config(ckpt: str) -> tuple[dict[str, Any], DictConfig]:
    if not Path(ckpt).exists():
        raise ConfigError([Mistake("ckpt", f"={ckpt!r} does not exist")])
    from app.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(Path(ckpt))
    if checkpoint.config is None:
        problem = f"={ckpt!r} was saved by a Trainer from Python and has no configuration"
        raise ConfigError([Mistake("ckpt", problem)])
    template = OmegaConf.create(checkpoint.template)
    assert isinstance(template, DictConfig)
    return checkpoint.config, template


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
            log.info("differs from the tested run: %s", difference)
        return launch_inline(job, folder)
    except UserError as error:
        log.error("%s", error)
        sys.exit(FAILURE)
    except KeyboardInterrupt:
        log.warning("interrupted")
        sys.exit(INTERRUPTED)
    except Exception:
        log.exception("the run failed")
        sys.exit(FAILURE)
