"""Long runs: many steps, and half an hour of random faults.

`SOAK_MINUTES=5 pytest tests -m long -k soak` runs the faults for five minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from app.distributed.launch.select import launch_inline
from app.experiment.entry import run_experiment
from tests.faults.test_storage import STORAGE_EXIT_CODE, fill_disk, small_disk
from tests.support.killed_runs import (
    FAULT_POINTS,
    STATEFUL_RUN,
    assert_readable,
    assert_same_outcome,
)
from tests.support.processes import FAULTY_TASK, SUPPORT_DIR
from tests.support.runs import job_for, run_app
from tests.support.warm import WarmCommand

__all__ = ["small_disk"]  # a fixture

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]

RUN = (*STATEFUL_RUN, *FAULTY_TASK)
FAULTS_PER_RUN = 6
MAX_GROWTH = 20 * 2**20  # bytes of resident memory
ENVIRONMENT = {"PYTHONPATH": SUPPORT_DIR, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(("epochs", "steps"), [(1, 50_000), (500, 100)])
def test_fifty_thousand_steps_take_the_same_memory_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, steps: int
) -> None:
    monkeypatch.syspath_prepend(SUPPORT_DIR)
    job = job_for(
        "model=mlp",
        "model.hidden=[8]",
        "data.batch_size=1",
        f"trainer.max_epochs={epochs}",
        f"trainer.limit_train_batches={steps}",
        "trainer.limit_valid_batches=1",
        "trainer.limit_test_batches=1",
        "checkpoint.every_n_epochs=50",
        "checkpoint.every_n_steps=null",
        "goal.patience=null",
        "~callbacks.plots",
        "+callbacks.memory={_target_: faulty.MemoryRecorder, every: 1000}",
        "trusted_targets=[faulty]",
    )
    launch_inline(run_experiment, job, tmp_path)
    memory = pd.read_csv(tmp_path / "memory.csv")["bytes"]
    assert len(memory) >= 50
    assert memory.iloc[-1] - memory.iloc[19] < MAX_GROWTH, memory.tolist()
    tables = [pd.read_csv(path) for path in sorted(tmp_path.rglob("epoch*train*.csv"))]
    times = pd.concat(tables)["iter_time"].to_numpy()
    assert len(times) == 50_000
    early, late = (pd.Series(part).median() for part in (times[5_000:15_000], times[-10_000:]))
    assert late < 1.5 * early, (early, late)


def test_soak_run_survives_random_faults(small_disk: Path, tmp_path: Path) -> None:
    result = run_app(tmp_path, *RUN, "hydra.run.dir=expected", FAULT="none:0:0", **ENVIRONMENT)
    assert result.code == 0, result.out
    duration = 5.0
    rng, number, counts = random.Random(0), 0, dict.fromkeys(FAULTS, 0)
    deadline = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "30"))
    while time.monotonic() < deadline:
        number += 1
        run = small_disk / f"run{number}"
        for _ in range(FAULTS_PER_RUN):
            kind = rng.choice([*FAULTS])
            FAULTS[kind](run, rng, duration)
            counts[kind] += 1
            assert_readable(run)
        start = time.monotonic()
        running = start_run(run)
        out, _ = running.communicate()
        duration = time.monotonic() - start
        assert running.returncode == 0, out
        assert_same_outcome(tmp_path / "expected", run, compare_older=False)
        shutil.rmtree(run)
    assert min(counts.values()) > 0, counts


def start_run(run: Path, **environment: str) -> WarmCommand:
    variables = {"FAULT": "none:0:0", **ENVIRONMENT, **environment}
    return WarmCommand(run.parent, [*RUN, f"hydra.run.dir={run}", "resume=auto"], variables)


def expect(running: WarmCommand, *codes: int) -> None:
    out, _ = running.communicate()
    assert running.returncode in (0, *codes), out


def kill_at_random_time(run: Path, rng: random.Random, duration: float) -> None:
    running = start_run(run)
    running.process.join(rng.uniform(0.1, 1) * duration)
    running.kill()
    expect(running, -signal.SIGKILL)


def kill_at_fault_point(run: Path, rng: random.Random, _: float) -> None:
    running = start_run(run, APP_FAULT=f"{rng.choice(FAULT_POINTS)}:{rng.randint(1, 3)}")
    expect(running, -signal.SIGKILL)


def preempt(run: Path, rng: random.Random, duration: float) -> None:
    running = start_run(run)
    running.process.join(rng.uniform(0.3, 1) * duration)
    running.send_signal(signal.SIGTERM)
    expect(running, 143, -signal.SIGTERM)


def suspend(run: Path, rng: random.Random, duration: float) -> None:
    running = start_run(run)
    running.process.join(rng.uniform(0.1, 1) * duration)
    running.send_signal(signal.SIGSTOP)
    time.sleep(2)
    running.send_signal(signal.SIGCONT)
    expect(running)


def fill_the_disk(run: Path, rng: random.Random, duration: float) -> None:
    running = start_run(run)
    running.process.join(rng.uniform(0.1, 1) * duration)
    with suppress(OSError):  # the run has used the space itself in the meantime
        fill_disk(run.parent, rng.choice([0, 10_000, 2_000_000]))
    expect(running, STORAGE_EXIT_CODE)
    (run.parent / "filler").unlink()


def set_clock_back(run: Path, rng: random.Random, _: float) -> None:
    expect(start_run(run, FAULT=f"clock:0:{rng.randint(1, 25)}"))


FAULTS: dict[str, Callable[[Path, random.Random, float], None]] = {
    "kill at a random time": kill_at_random_time,
    "kill at a fault point": kill_at_fault_point,
    "preempt": preempt,
    "suspend": suspend,
    "fill the disk": fill_the_disk,
    "set the clock back": set_clock_back,
}
