"""Write the tables, plots and HTML page of existing runs: `app report FOLDER...`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from app.runtime.errors import StorageError, UserError, as_user_error
from app.runtime.escaping import escape_log_records, print_error

log = logging.getLogger(__name__)
COMMAND = "report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the report, and return the exit code."""
    parser = argparse.ArgumentParser(prog="app report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="sweeps, runs, or folders that contain them"
    )
    parser.add_argument(
        "--to",
        type=Path,
        help="where to write the report (default: the given folder if there is only one, "
        "else a new folder under outputs/reports)",
    )
    args = parser.parse_args(arguments)
    escape_log_records()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with as_user_error():
            report([folder.expanduser().absolute() for folder in args.folders], args.to)
    except UserError as error:
        print_error(error)
        return error.exit_code if isinstance(error, StorageError) else 2
    return 0


def report(folders: Sequence[Path], to: Path | None = None) -> Path:
    """Write the tables, the plots and the page.

    Args:
        folders: Sweeps, runs, or folders that contain them.
        to: Where to write; by default the given folder if there is only one, else a new folder.

    Returns:
        The folder that was written to.

    Raises:
        UserError: A folder does not exist, or there is no run in any of them.
    """
    from app.sweep.folder import SweepFolder
    from app.sweep.report.table import collect_results, list_runs
    from app.sweep.report.write import leaderboard, write_page_and_plots, write_report, write_tables

    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(f"no such folder: {', '.join(missing)}")
    if len(folders) == 1 and to is None and SweepFolder(folders[0]).exists:
        write_report(folders[0])
        return folders[0]
    runs = [run for folder in folders for run in list_runs(folder)]
    if not runs:
        searched = ", ".join(map(str, folders))
        raise UserError(f"no runs found in {searched}: neither status.json nor .sweep")
    target = to.expanduser().absolute() if to else _default_target(folders)
    results = collect_results(target.name, runs, target)
    write_tables(results, target)
    write_page_and_plots(results, target, {})
    log.info("%s\nreport written to %s", leaderboard(results, target), target)
    return target


def _default_target(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path("outputs", "reports", now).absolute()


if __name__ == "__main__":
    sys.exit(main())
