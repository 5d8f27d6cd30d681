"""`app report <folder>...`: tables, pictures and the page of any runs, made anew at any time."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from app.runtime.errors import StorageError, UserError, as_user_error

log = logging.getLogger(__name__)
COMMAND = "report"


def main(words: Sequence[str] | None = None) -> int:
    """Reads the command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="app report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="sweeps, runs, or folders that have them somewhere"
    )
    parser.add_argument(
        "--to", type=Path, help="where it is written; else into the folder, where it is only one"
    )
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with as_user_error():
            report([folder.expanduser().absolute() for folder in args.folders], args.to)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code if isinstance(error, StorageError) else 2
    return 0


def report(folders: Sequence[Path], to: Path | None = None) -> Path:
    """Writes the tables, the pictures and the page.

    Args:
        folders: Of sweeps or runs, or above them.
        to: Where; else into the folder where it is only one, or into a new one.

    Returns:
        Where.

    Raises:
        UserError: There is no run.
    """
    from app.sweep.folder import SweepFolder
    from app.sweep.report.table import collect, list_runs
    from app.sweep.report.write import leaderboard, write_pictures, write_report, write_tables

    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(f"no folder: {', '.join(missing)}")
    if len(folders) == 1 and to is None and SweepFolder(folders[0]).exists:
        write_report(folders[0])
        return folders[0]
    runs = [run for folder in folders for run in list_runs(folder)]
    if not runs:
        raise UserError(f"no run in {', '.join(map(str, folders))}: no status.json, no .sweep")
    where = to.expanduser().absolute() if to else _default(folders)
    results = collect(where.name, runs, where)
    write_tables(results, where)
    write_pictures(results, where, {})
    log.info("%s\neverything is in %s", leaderboard(results, where), where)
    return where


def _default(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path("outputs", "reports", now).absolute()


if __name__ == "__main__":
    sys.exit(main())
