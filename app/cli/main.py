"""The command line: compose and check the configuration, run the jobs, return an exit code."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from typing import NoReturn

import hydra.version
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from app.cli import repeat, report
from app.cli.jobs import run_job
from app.cli.preflight import preflight
from app.config import resolvers
from app.config.compose import open_composer
from app.config.habits import usage
from app.config.resolve import resolve
from app.config.secrets import redact_text
from app.distributed.launch.environment import ClusterEnvironment, detect_environment
from app.distributed.launch.local import start_forkserver
from app.distributed.launch.torchrun import RankZero, follow_rank_zero
from app.experiment.entry import run_experiment
from app.experiment.shorthand import expand
from app.runtime.errors import ConfigError, ConfigIssue, StorageError, UserError
from app.runtime.escaping import escape_control, escape_log_records, print_error
from app.runtime.signals import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, TrainingInterrupted
from app.sweep.launchers import POOL_LAUNCHER
from app.sweep.launchers.external import current_process_id
from app.sweep.resume import use_saved_command

DISTRIBUTION = "torch-experiment-app"
HYDRA_VERSION = "1.3"  # whose defaults apply


def main() -> None:
    """Run the console script `app`, or `python -m app`."""
    escape_log_records()
    if sys.argv[1:2] == [report.COMMAND]:
        sys.exit(report.main(sys.argv[2:]))
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"app {version(DISTRIBUTION)}\n")
        sys.exit(0)
    if sys.argv[1:2] == [repeat.COMMAND]:
        sys.exit(repeat.main(sys.argv[2:], run_command))
    try:
        args, parser = parse_arguments(sys.argv[1:])
        runs_jobs, world = is_run_command(args), None
        use_saved_command(args)
        world = detect_environment(args.overrides, os.environ)
    except UserError as error:
        print_error(error)
        sys.exit(EXIT_USER_ERROR)
    if world is None:
        sys.exit(run_rank_zero(args, parser, None))
    if world.rank > 0:
        exit_now(run_follower(world) if runs_jobs else 0)
    rank_zero, code = RankZero(world), EXIT_FAILURE
    try:
        code = run_rank_zero(args, parser, rank_zero)
    finally:
        if runs_jobs:
            rank_zero.finish(code)
    exit_now(code)


def parse_arguments(
    arguments: Sequence[str],
) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Parse a command line of Hydra's options and of overrides.

    Raises:
        ConfigError: There are options that Hydra does not have, or no latest run.
    """
    resolvers.register()
    parser = get_args_parser()
    parser.prog = "app"
    args, unknown = parser.parse_known_args(arguments)
    # argparse does not take overrides on both sides of an option: `model=mlp -m seed=0,1`.
    args.overrides += [text for text in unknown if "=" in text and text[0] != "-"]
    unknown = [text for text in unknown if text not in args.overrides]
    if unknown:
        raise ConfigError([_option_issue(option, arguments) for option in unknown])
    args.overrides = expand(args.overrides, os.environ)
    return args, parser


def _option_issue(option: str, arguments: Sequence[str]) -> ConfigIssue:
    name, _, value = option.partition("=")
    following = arguments[list(arguments).index(option) + 1 :]
    if not value and following and "=" not in following[0] and following[0][:1] != "-":
        value = following[0]
    key = name.lstrip("-")
    hint = usage(key, value or True) or f"for example {key}={value or '...'}"
    return ConfigIssue(name, f" is not an option; keys are typed as key=value: {hint}")


def run_command(arguments: Sequence[str]) -> int:
    """Run a command line in this process, and return its exit code."""
    args, parser = parse_arguments(arguments)
    return run_rank_zero(args, parser, None)


def run_rank_zero(
    args: argparse.Namespace, parser: argparse.ArgumentParser, rank_zero: RankZero | None
) -> int:
    """Run all jobs from the process that talks to Hydra, and return the exit code."""
    hydra.version.setbase(HYDRA_VERSION)
    try:
        if is_run_command(args):
            run_jobs(args, rank_zero)
        else:
            print_config(args, parser)
        return 0
    except UserError as error:
        print_error(redact_text(str(error)))
        return error.exit_code if isinstance(error, StorageError) else EXIT_USER_ERROR
    except HydraException as error:
        print_error(redact_text("\n".join(str(p) for p in (error, error.__cause__) if p)))
        return EXIT_FAILURE
    except OmegaConfBaseException as error:  # Hydra resolves its own keys when it needs them
        print_error(f"{error.full_key} does not resolve: {str(error).splitlines()[0]}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - of a plugin or callback of Hydra; other ranks wait for the code
        print_error(redact_text(traceback.format_exc()))
        return EXIT_FAILURE


def is_run_command(args: argparse.Namespace) -> bool:
    """Whether the command runs jobs, rather than print help, completions or configurations."""
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    return not shows and args.experimental_rerun is None


def run_jobs(args: argparse.Namespace, rank_zero: RankZero | None) -> None:
    """Check all jobs, and let Hydra run them from the configurations that were checked."""
    with open_composer(args) as composer:
        if preflight(composer, rank_zero) == POOL_LAUNCHER:
            start_forkserver()
        composer.run(partial(run_job, rank_zero=rank_zero, main_process=current_process_id()))


def print_config(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Let Hydra print help, completions or the configuration.

    Raises:
        UserError: A configuration is invalid, or the command would rerun a job from a pickle.
    """
    if args.experimental_rerun is not None:
        problem = (
            f"={args.experimental_rerun!r} would execute code from a pickle file; "
            "use resume=FOLDER instead"
        )
        raise ConfigError([ConfigIssue("--experimental-rerun", problem)])
    printed = io.StringIO()
    with open_composer(args) as composer, redirect_stdout(printed):
        hydra, name, overrides = composer.hydra, composer.config_name, composer.overrides
        if args.help or args.cfg or args.info:
            for composed, _ in composer.compositions():
                resolve(composed)  # as Hydra may do, but within limits
        if args.help:
            hydra.app_help(name, parser, args)
        elif args.hydra_help:
            hydra.hydra_help(name, parser, args)
        elif args.cfg:
            hydra.show_cfg(name, overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            hydra.show_info(args.info, name, overrides)
        else:
            hydra.shell_completion(name, overrides)
    sys.stdout.write(escape_control(printed.getvalue()))


def run_follower(world: ClusterEnvironment) -> int:
    """Run the jobs that rank 0 sends, and return the exit code."""
    try:
        return follow_rank_zero(run_experiment, world)
    except TrainingInterrupted as interrupt:
        return interrupt.exit_code
    except Exception as error:  # noqa: BLE001 - rank 0 has logged it if it was still able to
        print_error(redact_text(f"rank {world.rank} failed: {type(error).__name__}: {error}"))
        return EXIT_FAILURE


def exit_now(code: int) -> NoReturn:
    """Exit without interpreter cleanup, which can hang on the connections of a failed rank."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
