"""Write the report of a sweep: tables, plots, the page, and a leaderboard in the log."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from app.config.overrides import quote
from app.runtime.errors import UserError
from app.runtime.figures import save_figure
from app.runtime.files import write_csv, write_text
from app.runtime.lock import file_lock
from app.sweep.folder import STATE_FOLDER, SweepFolder
from app.sweep.outcome import read_run_status
from app.sweep.report.table import (
    Results,
    aggregate_by_config,
    best_run,
    collect_results,
    list_runs,
    sort_by_goal,
)

if TYPE_CHECKING:
    from app.sweep.report.page import Figure

log = logging.getLogger(__name__)
LEADERBOARD_ROWS = 20
TABLE_FILE, BY_CONFIG_FILE = "sweep.csv", "sweep_by_config.csv"
PAGE_FILE, PLOTS_FOLDER = "sweep.html", "plots"


def write_report(folder: Path) -> Results:
    """Write tables, plots and the page of a sweep, and log its leaderboard."""
    results = update_tables(folder, curves=True)
    write_page_and_plots(results, folder, search_figures(SweepFolder(folder)))
    lines = [
        "the runs, best first:",
        leaderboard(results, folder),
        f"results are in {folder}; the page is {PAGE_FILE}",
    ]
    log.info("%s", "\n".join(lines))
    return results


def update_tables(folder: Path, curves: bool = False) -> Results:
    """Write the tables of a sweep as it is now; several processes may do so at the same time.

    Returns:
        The results, with the learning curves only if `curves` is true.
    """
    with file_lock(folder / STATE_FOLDER / "table.lock"):
        results = collect_results(folder.name, list_runs(folder), folder, curves)
        write_tables(results, folder)
    return results


def write_tables(results: Results, folder: Path) -> None:
    """Write `sweep.csv`, and `sweep_by_config.csv` with the statistics over seeds and folds."""
    write_csv(folder / TABLE_FILE, results.table)
    write_csv(folder / BY_CONFIG_FILE, aggregate_by_config(results))


def search_figures(folder: SweepFolder) -> dict[str, Figure]:
    """Return figures of a search by heading; none for a grid."""
    if folder.study is None:
        return {}
    if find_spec("optuna") is None:
        log.warning("optuna is not installed: the page is written without plots of the search")
        return {}
    from app.sweep.report.optuna_figures import study_figures
    from app.sweep.study import study_from_record

    try:
        return study_figures(*study_from_record(folder))
    except UserError as error:
        log.warning("the page is written without plots of the search: %s", error)
        return {}


def write_page_and_plots(results: Results, folder: Path, figures: Mapping[str, Figure]) -> None:
    """Write `sweep.html`, with further figures by heading, and PNGs to `plots/`."""
    from app.sweep.report.page import render_page
    from app.sweep.report.plots import make_plots

    if (folder / PLOTS_FOLDER).is_symlink():
        raise UserError(f"{folder / PLOTS_FOLDER} is a link; reports never write through links")
    write_text(folder / PAGE_FILE, render_page(results, figures))
    for name, figure in make_plots(results).items():
        save_figure(folder / PLOTS_FOLDER / name, figure)


def leaderboard(results: Results, folder: Path) -> str:
    """Return the best runs as text, with the command that tests the best of them."""
    if results.table.empty:
        return "no runs yet"
    values = [f"{kind}_{goal.metric}" for goal in results.goals for kind in ("best", "last")]
    test = [name for name in results.table.columns if name.startswith("test/")][:2]
    columns = ["job", "status", *results.keys, *values, *test, "seconds"]
    table = sort_by_goal(results)[columns].astype(object)
    shown = table.where(table.notna(), "").head(LEADERBOARD_ROWS)
    lines = [shown.to_string(index=False, float_format="{:.6g}".format)]
    if len(table) > LEADERBOARD_ROWS:
        lines.append(f"... and {len(table) - LEADERBOARD_ROWS} more in {TABLE_FILE}")
    best = best_run(results)
    if best is not None:
        column = f"best_{results.goals[0].metric}"
        ckpt = folder / str(best["folder"])
        lines.append(f"best: {column}={best[column]:.6g} in {ckpt.name}; to test it:")
        lines.append(f"  python -m app mode=test {shlex.quote(f'ckpt={_override_value(ckpt)}')}")
    return "\n".join(lines)


def _override_value(path: Path) -> str:
    """A path as a value of an override, quoted if it has more than plain characters."""
    text = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return text if re.fullmatch(r"[\w/.-]+", text) else quote(text)


def has_finished(folder: SweepFolder) -> bool:
    """Return whether every job or a retry of it has finished."""
    finished = [job for job in folder.jobs if read_run_status(folder.run_folder(job)).is_finished]
    done = {job.number for job in finished} | {job.retry_of for job in finished}
    return all(job.number in done for job in folder.jobs)
