"""What a sweep leaves: tables, pictures, the page, and a few lines on the terminal."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from app.config.overrides import quote
from app.runtime.errors import as_storage_error
from app.runtime.figures import save_figure
from app.runtime.files import write_csv, write_text
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

log = logging.getLogger(__name__)
SHOWN = 20  # lines of the leaderboard on the terminal
TABLE, BY_CONFIG, PAGE, PICTURES = "sweep.csv", "sweep_by_config.csv", "sweep.html", "plots"


def update_tables(folder: Path, curves: bool = False) -> Results:
    """The tables as they stand now; several processes may do so at once."""
    lock = FileLock(folder / STATE_FOLDER / "table.lock")
    try:
        (folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise as_storage_error(error) from error
    try:
        results = collect_results(folder.name, list_runs(folder), folder, curves)
        write_tables(results, folder)
    finally:
        lock.release()
    return results


def write_report(folder: Path) -> Results:
    """Everything, at the end of a sweep."""
    results = update_tables(folder, curves=True)
    write_page_and_plots(results, folder, optuna_figures(SweepFolder(folder)))
    told = [
        "the runs, best first:",
        leaderboard(results, folder),
        f"everything is in {folder}; the page is {PAGE}",
    ]
    log.info("%s", "\n".join(told))
    return results


def optuna_figures(folder: SweepFolder) -> dict[str, str]:
    """Optuna's own, where it was a search: by heading, plotly's JSON."""
    study = folder.study
    if study is None:
        return {}
    if find_spec("optuna") is None:
        log.warning("the library optuna is not installed: the page is without its pictures")
        return {}
    from app.sweep.report.optuna_figures import study_figures

    storage = folder.storage_name(study["storage"])
    return study_figures(storage, study["name"], study["objectives"])


def write_tables(results: Results, folder: Path) -> None:
    """`sweep.csv`, and `sweep_by_config.csv` over seeds."""
    write_csv(folder / TABLE, results.table)
    write_csv(folder / BY_CONFIG, aggregate_by_config(results))


def write_page_and_plots(results: Results, folder: Path, figures: Mapping[str, str]) -> None:
    """`sweep.html`, and `plots/` for papers."""
    from app.sweep.report.page import render_page
    from app.sweep.report.plots import make_plots

    write_text(folder / PAGE, render_page(results, figures))
    for name, figure in make_plots(results).items():
        save_figure(folder / PICTURES / name, figure)


def leaderboard(results: Results, folder: Path) -> str:
    """The best runs, and how to test the best of them."""
    if results.table.empty:
        return "no run yet"
    values = [f"{kind}_{goal.metric}" for goal in results.goals for kind in ("best", "last")]
    test = [name for name in results.table.columns if name.startswith("test/")][:2]
    columns = ["job", "status", *results.keys, *values, *test, "seconds"]
    shown = sort_by_goal(results)[columns].map(_brief)
    lines = [shown.head(SHOWN).to_string(index=False)]
    if len(shown) > SHOWN:
        lines.append(f"... and {len(shown) - SHOWN} more in {TABLE}")
    best = best_run(results)
    if best is not None:
        column = f"best_{results.goals[0].metric}"
        ckpt = folder / str(best["folder"])
        lines.append(f"best: {column}={best[column]:.6g} in {ckpt.name}; to test it:")
        lines.append(f"  python -m app mode=test {shlex.quote(f'ckpt={_typed(ckpt)}')}")
    return "\n".join(lines)


def _typed(path: Path) -> str:
    """As Hydra reads it: in quotes where it has more than plain characters."""
    text = str(_short(path))
    plain = all(letter.isalnum() or letter in "/._-" for letter in text)
    return text if plain else quote(text)


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _brief(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def exit_code(folder: SweepFolder, failure: int) -> int:
    """0 where every job, or its repetition, is over; else `failure`."""
    over = [job for job in folder.jobs if read_run_status(folder.run_folder(job)).is_finished]
    done = {job.number for job in over} | {job.retry_of for job in over}
    return 0 if all(job.number in done for job in folder.jobs) else failure
