"""Killed at any moment and started again, a run ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.killed_runs import (
    Kill,
    assert_same_outcome,
    assert_readable,
    run_command,
    plan_kills,
    run_two_ranks,
)

Run = Callable[[Path, Iterable[str], Kill | None], int]
AGAIN = ("resume=auto", "hydra.run.dir=run")
RUNS: dict[int, tuple[Run, tuple[str, ...]]] = {
    1: (run_command, AGAIN),
    2: (run_two_ranks, ("resume=auto",)),
}
ENDS = (-signal.SIGKILL, -signal.SIGTERM, 143)  # SIGTERM before anybody listened, or heard


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """The run that nobody disturbs, and on how many ranks."""
    cwd = tmp_path_factory.mktemp("whole")
    run, words = RUNS[request.param]
    assert run(cwd, words, None) == 0
    return request.param, cwd / "run"


@pytest.fixture(scope="module")
def length(undisturbed: tuple[int, Path]) -> float:
    """Seconds that the run takes, from its process to its end."""
    ranks, whole = undisturbed
    run, _ = RUNS[ranks]
    began = time.monotonic()
    run(whole.parent, (f"hydra.run.dir={whole.parent / 'timed'}",), None)
    return time.monotonic() - began


def survive(cwd: Path, ranks: int, planned: list[Kill]) -> int:
    """Starts it again until it ends; gives how often it was ended before."""
    run, words = RUNS[ranks]
    survived = 0
    for kill in planned:
        code = run(cwd, words, kill)
        if code == 0:
            break
        assert code in ENDS, (kill, code, _told(cwd))
        survived += 1
        assert_readable(cwd / "run")
    code = run(cwd, words, None)
    assert code == 0, _told(cwd)
    return survived


def _told(cwd: Path) -> str:
    return (cwd / "told").read_text()[-3000:] if (cwd / "told").exists() else ""


def survive_often(
    home: Path,
    whole: Path,
    ranks: int,
    least: int,
    planned: Callable[[int, float], list[Kill]],
    older: bool = True,
) -> int:
    """Runs anew until so many kills are survived; one may end before the first of them comes.

    Args:
        home: Of the runs.
        whole: The run that nobody disturbs, which each must equal.
        ranks: How many.
        least: Kills, in all runs.
        planned: Of a run, by its number and the share of the time in which kills come.
        older: Nothing but the kill leaves its mark, so that older states are the same, too.
    """
    survived, number, share = 0, 0, 1.0
    while survived < least:
        number += 1
        cwd = home / str(number)
        cwd.mkdir()
        wanted = [kill for kill in planned(number, share) if ranks == 1 or kill.fault]
        came = survive(cwd, ranks, wanted)
        assert_same_outcome(whole, cwd / "run", older)
        survived += came
        share *= 1.0 if came else 0.5
    return survived


def test_killed_again_and_again(
    undisturbed: tuple[int, Path], length: float, tmp_path: Path
) -> None:
    ranks, whole = undisturbed
    survive_often(tmp_path, whole, ranks, 3, lambda n, share: plan_kills(16, n, share * length))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_killed_two_hundred_times(
    undisturbed: tuple[int, Path],
    length: float,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    ranks, whole = undisturbed
    least = int(os.environ.get("KILLS", "200"))
    survived = survive_often(
        tmp_path, whole, ranks, least, lambda n, share: plan_kills(40, n, share * length)
    )
    record_property("kills survived", survived)


def test_preempted_again_and_again(
    undisturbed: tuple[int, Path], length: float, tmp_path: Path
) -> None:
    ranks, whole = undisturbed
    if ranks > 1:
        pytest.skip("signals to several ranks have tests of their own")
    number = signal.SIGTERM
    survive_often(
        tmp_path, whole, 1, 2, lambda n, share: plan_kills(5, n, share * length, number), older=False
    )
