"""The command line: compose and check the configuration, run the jobs, return an exit code."""

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
from app.cli.preflight import check_config_output, is_run_command, preflight
from app.config import resolvers
from app.config.compose import CONF, CONFIG_NAME
from app.config.sources import strict_sources
from app.distributed.launch.environment import ClusterEnvironment, detect_environment
from app.distributed.launch.local import start_forkserver
from app.distributed.launch.torchrun import RankZero, follow_rank_zero
from app.experiment.entry import run_experiment
from app.runtime.errors import ConfigError, StorageError, UserError, as_user_error
from app.runtime.signals import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, TrainingInterrupted
from app.sweep.check import iter_trust_issues
from app.sweep.folder import SweepFolder
from app.sweep.launchers import POOL_LAUNCHER
from app.sweep.launchers.external import current_process_id


def main() -> None:
    """Run the console script `app`, or `python -m app`."""
    if sys.argv[1:2] == [report.COMMAND]:
        sys.exit(report.main(sys.argv[2:]))
    resolvers.register()
    parser = get_args_parser()
    parser.prog = "app"
    args = parser.parse_args()
    runs_jobs, world = is_run_command(args), None
    try:
        args = with_saved_overrides(args)
        world = detect_environment(args.overrides, os.environ)
    except UserError as error:
        exit_with(str(error), EXIT_USER_ERROR)
    if world is None:
        sys.exit(run_rank_zero(args, None))
    if world.rank > 0:
        exit_now(run_follower(world) if runs_jobs else 0)
    rank_zero, code = RankZero(world), EXIT_FAILURE
    try:
        code = run_rank_zero(args, rank_zero)
    finally:
        if runs_jobs:
            rank_zero.finish(code)
    exit_now(code)


@as_user_error("sweep.resume")
def with_saved_overrides(args: argparse.Namespace) -> argparse.Namespace:
    """Add the saved overrides of a sweep when `sweep.resume` comes with no overrides of its own.

    Raises:
        UserError: The sweep folder is damaged, or some overrides have to be repeated by the user.
    """
    typed = dict(override.partition("=")[::2] for override in args.overrides)
    allowed_prefixes = ("sweep.", "hydra", "trusted_targets")
    if typed.get("sweep.resume") and all(key.startswith(allowed_prefixes) for key in typed):
        folder = SweepFolder(Path(typed["sweep.resume"].strip("'\"")).expanduser())
        saved, issues = folder.overrides, list(iter_trust_issues(folder, args.overrides))
        if issues:
            raise ConfigError(issues)
        # With a new launcher, the options of the saved one no longer apply.
        dropped = ("hydra.launcher.",) if "hydra/launcher" in typed else ()
        keys = {override: override.partition("=")[0] for override in saved}
        added = [o for o, key in keys.items() if key not in typed and not key.startswith(dropped)]
        sys.argv += added  # Hydra parses sys.argv
        args.overrides += added
    return args


def run_rank_zero(args: argparse.Namespace, rank_zero: RankZero | None) -> int:
    """Run all jobs from the process that talks to Hydra, and return the exit code."""
    try:
        with strict_sources():
            if not is_run_command(args):
                check_config_output(args)
            elif preflight(args, rank_zero) == POOL_LAUNCHER:
                start_forkserver()
            run_jobs(rank_zero)
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
    """Run the jobs that rank 0 sends, and return the exit code."""
    try:
        return follow_rank_zero(run_experiment, world)
    except TrainingInterrupted as interrupt:
        return interrupt.exit_code
    except Exception as error:  # noqa: BLE001 - rank 0 has logged it if it was still able to
        sys.stderr.write(f"rank {world.rank} failed: {type(error).__name__}: {error}\n")
        return EXIT_FAILURE


def run_jobs(rank_zero: RankZero | None) -> None:
    """Let Hydra run all jobs."""
    task = partial(run_job, rank_zero=rank_zero, main_process=current_process_id())
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=CONFIG_NAME)(task)()


def exit_with(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


def exit_now(code: int) -> NoReturn:
    """Exit without interpreter cleanup, which can hang on the connections of a failed rank."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
