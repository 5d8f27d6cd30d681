"""A run that is killed at any moment and restarted ends like an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.killed_runs import (
    EARLY_FAULTS,
    Kill,
    assert_readable,
    assert_same_outcome,
    plan_kills,
    run_arguments,
    run_command,
    run_two_ranks,
)

Run = Callable[[Path, Iterable[str], Kill | None], int]
RUNS: dict[int, tuple[Run, tuple[str, ...]]] = {  # number of ranks: function, overrides
    1: (run_command, ("resume=auto", "hydra.run.dir=run")),
    2: (run_two_ranks, ("resume=auto",)),
}
# SIGTERM kills the process until its handlers are installed; after that it exits with 143.
EXPECTED_CODES = (-signal.SIGKILL, -signal.SIGTERM, 143)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """Number of ranks, and the folder of an undisturbed run on them."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run, overrides = RUNS[request.param]
    assert run(cwd, overrides, None) == 0
    return request.param, cwd / "run"


@pytest.fixture(scope="module")
def duration(undisturbed: tuple[int, Path], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that the run takes, including the start of its process."""
    ranks, _ = undisturbed
    run, overrides = RUNS[ranks]
    start = time.monotonic()
    run(tmp_path_factory.mktemp("timed"), overrides, None)
    return time.monotonic() - start


def run_despite_kills(cwd: Path, ranks: int, planned: list[Kill]) -> int:
    """Restart a run until it completes; return how often it was killed."""
    run, overrides = RUNS[ranks]
    survived = 0
    for kill in planned:
        is_started = (cwd / "run" / "checkpoints" / "start.json").exists()
        if ranks == 1 and is_started:  # its own configuration is all that it needs
            code = run_arguments(cwd, ["resume=run"], kill)
        else:
            code = run(cwd, overrides, kill)
        if code == 0:
            break
        assert code in EXPECTED_CODES, (kill, code, _output_tail(cwd))
        survived += 1
        assert_readable(cwd / "run")
    code = run(cwd, overrides, None)
    assert code == 0, _output_tail(cwd)
    return survived


def _output_tail(cwd: Path) -> str:
    return (cwd / "output").read_text()[-3000:] if (cwd / "output").exists() else ""


def survive_kills(
    home: Path,
    expected: Path,
    ranks: int,
    min_kills: int,
    plan: Callable[[int, float], list[Kill]],
    compare_older: bool = True,
) -> int:
    """Repeat runs until enough kills are survived, and compare each with the undisturbed run.

    A run may complete before its first kill; the next ones are then killed earlier.

    Args:
        home: Folder of the runs.
        expected: The undisturbed run.
        ranks: Number of ranks.
        min_kills: How many kills to survive, over all runs.
        plan: Returns the kills of a run, by its number and the share of its time to kill it in.
        compare_older: Whether to compare `last-1.safetensors` and `last-2.safetensors`, too.

    Returns:
        Number of kills survived.
    """
    survived, number, share = 0, 0, 1.0
    while survived < min_kills:
        number += 1
        cwd = home / str(number)
        cwd.mkdir()
        planned = [kill for kill in plan(number, share) if ranks == 1 or kill.fault]
        count = run_despite_kills(cwd, ranks, planned)
        assert_same_outcome(expected, cwd / "run", compare_older)
        survived += count
        share *= 1.0 if count else 0.5
    return survived


def test_run_killed_repeatedly_ends_like_undisturbed_run(
    undisturbed: tuple[int, Path], duration: float, tmp_path: Path
) -> None:
    ranks, expected = undisturbed
    survive_kills(
        tmp_path, expected, ranks, 3, lambda n, share: plan_kills(16, n, share * duration)
    )


def test_run_killed_before_first_checkpoint_is_started_again_by_resume(
    undisturbed: tuple[int, Path], tmp_path: Path
) -> None:
    """Only the first commands have options; whatever is killed later is started by `resume=run`."""
    ranks, expected = undisturbed
    # Epochs are checkpointed, but no steps, so that all of the first epoch is before a checkpoint.
    options = ("checkpoint.every_n_steps=null", f"trainer.devices={ranks}", "hydra.run.dir=run")
    faults = EARLY_FAULTS if ranks == 1 else EARLY_FAULTS[:2] + EARLY_FAULTS[-3:]
    assert run_command(tmp_path, options, Kill(faults[0])) == -signal.SIGKILL
    assert run_arguments(tmp_path, ["resume=run"]) == 2
    assert "nothing was started there" in _output_tail(tmp_path)
    assert run_command(tmp_path, options, Kill(faults[1])) == -signal.SIGKILL
    for fault in faults[2:]:
        # A rank that is killed fails the command, which survives.
        assert run_arguments(tmp_path, ["resume=run"], Kill(fault)) in (-signal.SIGKILL, 1), fault
        assert_readable(tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert run_arguments(tmp_path, ["resume=run"]) == 0, _output_tail(tmp_path)
    assert_same_outcome(expected, tmp_path / "run", compare_older=False)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_run_killed_two_hundred_times_ends_like_undisturbed_run(
    undisturbed: tuple[int, Path],
    duration: float,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    ranks, expected = undisturbed
    min_kills = int(os.environ.get("KILLS", "200"))
    survived = survive_kills(
        tmp_path, expected, ranks, min_kills, lambda n, share: plan_kills(40, n, share * duration)
    )
    record_property("kills survived", survived)


def test_run_preempted_repeatedly_ends_like_undisturbed_run(
    undisturbed: tuple[int, Path], duration: float, tmp_path: Path
) -> None:
    ranks, expected = undisturbed
    if ranks > 1:
        pytest.skip("signals to several ranks are tested elsewhere")
    signum = signal.SIGTERM
    survive_kills(
        tmp_path,
        expected,
        1,
        2,
        lambda n, share: plan_kills(5, n, share * duration, signum),
        compare_older=False,
    )
