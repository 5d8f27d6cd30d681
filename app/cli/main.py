"""The command line: compose, check, freeze, launch, return the objective."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser

from app.cli import report
from app.cli.jobs import run_job
from app.cli.preflight import check_what_is_shown, is_a_run, preflight
from app.config import resolvers
from app.config.compose import CONF, CONFIG_NAME
from app.config.sources import strict_sources
from app.distributed.launch.environment import ClusterEnvironment, detect_environment
from app.distributed.launch.local import start_forkserver
from app.distributed.launch.torchrun import RankZero, follow_rank_zero
from app.experiment.entry import run_experiment
from app.runtime.errors import ConfigError, StorageError, UserError, as_user_error
from app.runtime.signals import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, TrainingInterrupted
from app.sweep.check import POOL, trust_mistakes
from app.sweep.folder import SweepFolder
from app.sweep.launchers.external import this_process

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)  # where errors came from is for run.log alone


def main() -> None:
    """The console script `app`, and `python -m app`."""
    if sys.argv[1:2] == [report.COMMAND]:
        sys.exit(report.main(sys.argv[2:]))
    resolvers.register()
    parser = get_args_parser()
    parser.prog = "app"
    args = parser.parse_args()
    runs, world = is_a_run(args), None
    try:
        args = with_saved_overrides(args)
        world = detect_environment(args.overrides, os.environ)
    except UserError as error:
        exit_with(str(error), EXIT_USER_ERROR)
    if world is None:
        sys.exit(run_rank_zero(args, None))
    if world.rank > 0:
        exit_now(run_follower(world) if runs else 0)
    leader, code = RankZero(world), EXIT_FAILURE
    try:
        code = run_rank_zero(args, leader)
    finally:
        if runs:
            leader.finish(code)
    exit_now(code)


@as_user_error("sweep.resume")
def with_saved_overrides(args: argparse.Namespace) -> argparse.Namespace:
    """Where nothing but `sweep.resume` is typed, the sweep's own words are meant.

    Raises:
        UserError: The folder is damaged, or words of its have to be typed.
    """
    typed = dict(word.partition("=")[::2] for word in args.overrides)
    own = ("sweep.", "hydra", "trusted_targets")
    if typed.get("sweep.resume") and all(key.startswith(own) for key in typed):
        folder = SweepFolder(Path(typed["sweep.resume"].strip("'\"")).expanduser())
        saved, mistakes = folder.words, list(trust_mistakes(folder, args.overrides))
        if mistakes:
            raise ConfigError(mistakes)
        other = ("hydra.launcher.",) if "hydra/launcher" in typed else ()  # keys of the one before
        keys = {word: word.partition("=")[0] for word in saved}
        added = [w for w, key in keys.items() if key not in typed and not key.startswith(other)]
        sys.argv += added  # from there Hydra reads them
        args.overrides += added
    return args


def run_rank_zero(args: argparse.Namespace, leader: RankZero | None) -> int:
    """All jobs, from the process that talks to Hydra; gives the exit code."""
    try:
        with strict_sources():
            if not is_a_run(args):
                check_what_is_shown(args)
            elif preflight(args, leader) == POOL:
                start_forkserver()
            run_jobs(leader)
        return 0
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code if isinstance(error, StorageError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def run_follower(world: ClusterEnvironment) -> int:
    """What rank 0 tells; gives the exit code."""
    try:
        return follow_rank_zero(run_experiment, world)
    except TrainingInterrupted as stopped:
        return stopped.code
    except Exception as error:  # noqa: BLE001 - rank 0 has said it, where it still can
        sys.stderr.write(f"rank {world.rank} ends: {type(error).__name__}: {error}\n")
        return EXIT_FAILURE


def exit_with(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


def exit_now(code: int) -> NoReturn:
    """At once: what a failed rank has left of its connections may hold it up for long."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_jobs(leader: RankZero | None) -> None:
    """All jobs, by Hydra."""
    task = partial(run_job, leader=leader, driver=this_process())
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=CONFIG_NAME)(task)()
