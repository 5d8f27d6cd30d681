"""Run a finished run again, and say whether the results are equal: `app repeat RUN`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from app.config.overrides import quote
from app.distributed.launch.environment import detect_environment
from app.runtime.errors import NonFiniteError, StorageError, UserError, as_user_error
from app.runtime.escaping import escape_control, escape_log_records, print_error
from app.runtime.files import write_text
from app.runtime.small_files import read_json
from app.sweep.outcome import COMPLETED, DIVERGED

COMMAND = "repeat"
DIFFERENT = 1  # exit code
TRUST_KEYS = ("resume=", "trusted_targets=", "hydra.")


def main(arguments: Sequence[str], run_command: Callable[[list[str]], int]) -> int:
    """Parse the command line, run the run again, and return the exit code.

    Args:
        arguments: What follows `app repeat`.
        run_command: Runs a command line of `app`, and returns its exit code.
    """
    parser = argparse.ArgumentParser(prog="app repeat", description=__doc__)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument(
        "--output", help="the folder of the new run (default: beside the run, as RUN_repeat)"
    )
    parser.add_argument(
        "overrides", nargs="*", help="such as trusted_targets=[my_module], as with resume=RUN"
    )
    args = parser.parse_intermixed_args(arguments)
    escape_log_records()
    try:
        with as_user_error():
            run = Path(os.path.abspath(Path(args.run).expanduser()))  # noqa: PTH100 - without `..`
            return repeat(run, args.output, args.overrides, run_command)
    except UserError as error:
        print_error(error)
        return error.exit_code if isinstance(error, StorageError) else 2


def repeat(
    run: Path, output: str | None, overrides: Sequence[str], run_command: Callable[[list[str]], int]
) -> int:
    """Run a run again in a new folder, compare both, and return the exit code.

    Raises:
        UserError: The run cannot be repeated.
    """
    from app.experiment.environment import code_record, read_attempts
    from app.experiment.job import START_CONFIG, read_start_config
    from app.training.checkpoint.rotation import CHECKPOINT_DIR

    if detect_environment([], os.environ) is not None:
        raise UserError("app repeat starts its ranks itself; run it without torchrun or srun")
    _check_finished(run)
    saved = read_start_config(run / CHECKPOINT_DIR / START_CONFIG)
    folder = _new_folder(run, output)
    attempts = read_attempts(run)
    reported = _warn(_iter_warnings(attempts, code_record(), saved), set())
    # A run that was interrupted before its first checkpoint starts again from this file.
    start_file = folder / CHECKPOINT_DIR / START_CONFIG
    write_text(start_file, json.dumps(saved))
    code = run_command([f"resume={quote(str(folder))}", *overrides])
    if code not in (0, NonFiniteError.exit_code):
        _remove_unused(folder, start_file)
        return code
    (record,) = read_attempts(folder)[-1:] or [{}]
    _warn(_iter_warnings(attempts, record, saved), reported)
    return _report(run, folder)


def _check_finished(run: Path) -> None:
    status = read_json(run, "status.json")
    if not status:
        raise UserError(f"{run} contains no run: it has no status.json")
    if status.get("mode") != "train":
        raise UserError(f"{run} is a run of mode={status.get('mode')!r}; only training is repeated")
    if status.get("status") not in (COMPLETED, DIVERGED):
        raise UserError(
            f"{run} is {status.get('status')!r}, so that there are no final results to compare; "
            f"allowed: a run that is {COMPLETED} or {DIVERGED}"
        )


def _new_folder(run: Path, output: str | None) -> Path:
    """Return a folder for the new run, which does not exist or is empty."""
    if output is None:
        names = chain([f"{run.name}_repeat"], (f"{run.name}_repeat-{n}" for n in count(2)))
        return next(path for name in names if not os.path.lexists(path := run.with_name(name)))
    folder = Path(output).expanduser().absolute()
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={output!r} is not empty; name a new folder")
    return folder


def _remove_unused(folder: Path, start_file: Path) -> None:
    """Remove what was written for a run that did not start."""
    if (folder / "status.json").exists():
        return
    with suppress(OSError):  # Hydra may have written there
        start_file.unlink()
        start_file.parent.rmdir()
        folder.rmdir()


def _iter_warnings(
    attempts: list[dict[str, Any]], now: dict[str, Any], saved: dict[str, Any]
) -> Iterable[str]:
    """Yield why the results may differ."""
    from app.experiment.environment import iter_differences

    if not attempts:
        yield "it is unknown what made the run: its environment.json is missing"
    for attempt in attempts:
        yield from iter_differences(attempt, now)
    for attempt in attempts[1:]:
        changed = [text for text in _texts(attempt.get("overrides")) if not _is_harmless(text)]
        if changed:
            settings = " ".join(changed)
            yield f"the run was resumed with {settings}, which now applies from the beginning"
    trainer = saved.get("trainer")
    if isinstance(trainer, dict) and trainer.get("max_time") is not None:
        yield "trainer.max_time ends the run by the clock"


def _texts(node: object) -> list[str]:
    return [text for text in node if isinstance(text, str)] if isinstance(node, list) else []


def _is_harmless(override: str) -> bool:
    return override.startswith(TRUST_KEYS)


def _warn(warnings: Iterable[str], reported: set[str]) -> set[str]:
    """Print the warnings that were not reported before, and return all."""
    found = dict.fromkeys(warnings)
    for warning in found:
        if warning not in reported:
            print_error(f"warning: {warning}")
    return reported | found.keys()


def _report(run: Path, folder: Path) -> int:
    """Print whether two runs are equal, and return the exit code."""
    from app.experiment.comparison import compare_tables, compare_weights

    num_files, table = compare_tables(run, folder)
    num_tensors, weight = compare_weights(run, folder)
    lines = [
        f"tables: {'different' if table else f'equal ({num_files} files, except times)'}",
        f"weights: {'different' if weight else f'equal ({num_tensors} tensors)'}",
    ]
    difference = table or weight
    if difference is not None:
        one, other = difference.values
        lines.append(f"first difference: {difference.where}: {one} in the run, {other} now")
    verdict = "equal" if difference is None else "different"
    lines.append(f"{verdict}: {run} and {folder}")
    sys.stdout.write(escape_control("\n".join(lines)) + "\n")
    return 0 if difference is None else DIFFERENT
