"""Measure what grows: runs with the number of steps, sweeps with jobs, reports and pages with runs.

    python -m benchmarks.growth

- steps: the processor time and the peak memory of whole runs of a tiny model, with all their
  tables. The cost of a step in a decade is the difference of two runs, divided by their difference
  in steps; one of a run that does not grow is the same in each decade. `--steps 1000000` measures
  the last decade, too.
- jobs: the processor time from the start of a command to its first job, at a sweep over a range,
  and the time to update its tables after a job.
- folders: the processor time of `app report` for copies of one run.
- page: its size, and the seconds until a browser has drawn it, with Chromium and Playwright.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--steps", "10000", "--folders", "100", "--rounds", "1")
TINY = ("model=mlp", "model.hidden=[8]", "data.batch_size=32", "trainer.accelerator=cpu")
SHORT_EVALUATION = ("trainer.limit_valid_batches=1", "trainer.limit_test_batches=1")
STEP_SECONDS = 0.005  # of the training that the cost of a step is compared with
EPOCHS = 20  # of each copied run
FIRST_JOB = """
import os, sys, time
from app.cli.main import main
from app.sweep.driver import SweepDriver
from app.sweep.report.write import update_tables

def run(self, launcher):
    self._next_job()
    start = time.process_time()
    print(start, flush=True)
    self.folder.save()
    update_tables(self.folder.path)
    print(time.process_time() - start, flush=True)
    os._exit(0)

SweepDriver.run = run
main()
"""
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)


def run_python(*arguments: str) -> tuple[float, str]:
    """Run a Python command with one thread; return its processor time and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, done.stdout


def decades(largest: int, first: int = 1_000) -> Iterator[int]:
    while first <= largest:
        yield first
        first *= 10


def measure_steps(folder: Path, largest: int) -> Table:
    """Measure the cost of a step, and the memory, in each decade of steps."""
    seconds: dict[int, float] = {}
    memory: dict[int, int] = {}
    for steps in decades(largest):
        run = folder / str(steps)
        length = ("trainer.max_epochs=null", f"trainer.max_steps={steps}")
        options = (*TINY, *SHORT_EVALUATION, *length, f"hydra.run.dir={run}")
        seconds[steps], _ = run_python("-m", "app", *options)
        memory[steps] = json.loads((run / "status.json").read_text())["peak_memory_bytes"]
    rows: list[dict[str, Any]] = []
    costs = [(after, (seconds[after] - seconds[n]) / (after - n)) for n, after in pairwise(seconds)]
    for steps, cost in costs:
        growth = (cost - costs[0][1]) / STEP_SECONDS
        rows.append(
            {
                "steps up to": steps,
                "CPU per step (ms)": cost * 1e3,
                "growth, % of a 5 ms step": growth * 100,
                "peak memory (MiB)": memory[steps] / 2**20,
            }
        )
    notes = ("Whole commands with all tables; growth is against the first decade.",)
    return Table("growth_steps", "Cost of a step, by the number of steps", rows, notes)


def measure_sweeps(folder: Path, rounds: int) -> Table:
    """Measure the start of a sweep by its number of jobs."""
    rows = []
    for jobs in (10, 100, 1_000, 10_000):
        starts, updates = [], []
        for number in range(rounds):
            sweep = f"hydra.sweep.dir={folder}/{jobs}_{number}"
            options = ("-m", f"seed=range({jobs})", *TINY, sweep)
            _, output = run_python("-c", FIRST_JOB, *options)
            start, update = map(float, output.split()[-2:])
            starts.append(start)
            updates.append(update)
        row = {"jobs": jobs, "CPU to the first job (s)": statistics.median(starts)}
        rows.append(row | {"update of the tables (s)": statistics.median(updates)})
    return Table("growth_sweeps", "Start of a sweep, by the number of jobs", rows)


def copy_runs(source: Path, count: int, folder: Path) -> None:
    """Write run folders with the files of a run that a report reads, other values, more epochs."""
    status = json.loads((source / "status.json").read_text())
    config = yaml.safe_load((source / "config.yaml").read_text())
    head, *rows = (source / "summary_table.csv").read_text().splitlines()
    rest = [row.partition(",")[2] for row in rows[:2]]
    lines = [head, *(f"{epoch},{row}" for epoch in range(1, EPOCHS + 1) for row in rest)]
    for number in range(count):
        run, seed, rate = folder / str(number), number % 5, 10.0 ** -(1 + number % 4)
        shutil.copytree(source / ".hydra", run / ".hydra")
        best = status["best"] | {"value": number / count}
        (run / "status.json").write_text(
            json.dumps(status | {"best": best, "seed": seed}, indent=2)
        )
        (run / "summary_table.csv").write_text("\n".join(lines) + "\n")
        config["seed"], config["optimizer"]["lr"] = seed, rate
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        typed = f"optimizer.lr={rate:g}" if number % 2 else "data.batch_size=32"
        (run / ".hydra" / "overrides.yaml").write_text(f"- {typed}\n- seed={seed}\n- model=mlp\n")


def measure_reports(folder: Path, largest: int, rounds: int) -> list[Table]:
    """Measure the report and its page by the number of runs."""
    source = folder / "source"
    options = (*TINY, *SHORT_EVALUATION, "trainer.max_steps=5", f"hydra.run.dir={source}")
    run_python("-m", "app", *options)
    reports, pages = [], []
    for count in (100, 500, 1_000, 10_000):
        if count > largest:
            break
        runs, target = folder / f"runs_{count}", folder / f"report_{count}"
        copy_runs(source, count, runs)
        times = [
            run_python("-m", "app", "report", str(runs), "--to", str(target))[0]
            for _ in range(rounds)
        ]
        reports.append({"run folders": count, "CPU (s)": statistics.median(times)})
        page = target / "sweep.html"
        size: dict[str, Any] = {"runs": count, "size (MB)": page.stat().st_size / 1e6}
        pages.append(size | {"until drawn (s)": seconds_to_draw(page, rounds)})
        shutil.rmtree(runs)
    notes = (f"Each run has {EPOCHS} epochs; of more than 1,000 runs the best 1,000 have curves.",)
    return [
        Table("growth_reports", "Report, by the number of run folders", reports, notes),
        Table("growth_pages", "Page of a report, by the number of runs", pages, notes),
    ]


def seconds_to_draw(page: Path, rounds: int) -> float | None:
    """Return the median time until a browser has loaded and drawn a page; None without one."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None or find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    times = []
    drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(BROWSER_FLAGS))
        for _ in range(rounds + 1):
            tab = browser.new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.evaluate(drawn)
            times.append(time.perf_counter() - start)
            tab.close()
        browser.close()
    return statistics.median(times[1:])  # the first is a warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100_000, help="largest number of steps")
    parser.add_argument("--folders", type=int, default=10_000, help="largest number of runs")
    parser.add_argument("--rounds", type=int, default=3, help="of all but the steps")
    add_output_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tables = [
            measure_sweeps(Path(name, "sweeps"), args.rounds),
            *measure_reports(Path(name), args.folders, args.rounds),
            measure_steps(Path(name, "steps"), args.steps),
        ]
    publish(tables, args.out)


if __name__ == "__main__":
    main()
